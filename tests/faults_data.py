"""The same bits wherever and however a run is started, and data that does not come.

Whole runs in processes of their own. Run by `make test-faults`; its name keeps it out
of `make test`.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt_jax import checkpoint, metrics

ROOT = Path(__file__).parents[1]
CONFIG = "--config=configs/quickstart.py:size=tiny"
pytestmark = pytest.mark.timeout(600)


def train(folder, *flags, cwd, seed, code=None):
    """Trains in a process; returns what it said when it, and all it began, ended."""
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    config = CONFIG.replace("configs/", f"{ROOT}/configs/")
    flags = (config, f"--workdir={folder}", "--config.compile_cache=", *flags)
    start = ["-c", code] if code else ["-m", "experiments.train"]
    return subprocess.run(
        [sys.executable, *start, *flags],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


def bits(folder):
    """Returns the hash of a run's last weights and optimizer memory, and its losses."""
    store = checkpoint.Checkpoints(folder / "checkpoints", keep=None)
    tree, _, step = store.restore(None)
    leaves = checkpoint.leaves(tree)
    found = hashlib.sha256(json.dumps(leaves, sort_keys=True).encode())
    flat = [np.asarray(x) for x in _leaves(tree)]
    for leaf in flat:
        found.update(leaf.tobytes())
    rows = metrics.read(folder)
    losses = [
        (row["step"], name, value)
        for row in rows
        for name, value in row.items()
        if name.endswith("loss") or name == "grad_norm"
    ]
    return step, found.hexdigest(), losses


def _leaves(tree):
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, dict | list | tuple):
            yield from _leaves(value)
        else:
            yield value


@pytest.mark.fault(17, injections=4)
def test_hash_seed_folder_and_workers_change_no_bit(tmp_path):
    found = []
    for i, (seed, workers) in enumerate([("0", 1), ("0", 1), ("1", 3), ("random", 8)]):
        place = tmp_path / f"place{i}"
        place.mkdir()
        data = f"--config.data.folder={place / 'data'}"
        threads = f"--config.data.workers={workers}"
        done = train(place / "run", data, threads, cwd=place if i else ROOT, seed=seed)
        assert done.returncode == 0, done.stderr
        found.append(bits(place / "run"))
    assert found[0][0] == 6 and len(found[0][2]) > 4
    assert found == [found[0]] * 4


BROKEN = """
import sys, runpy, threading
from gpt_jax import data
take, calls = data.Windows.take, []
def broken(self, indices):
    calls.append(1)
    if threading.current_thread().name == "gpt_jax-batches" and len(calls) > 3:
        {fault}
    return take(self, indices)
data.Windows.take = broken
sys.argv[0] = "experiments/train.py"
runpy.run_module("experiments.train", run_name="__main__", alter_sys=False)
"""


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("threading.Event().wait()", 1, "did not arrive within data_timeout_s = 2 s"),
        ("raise OSError(5, 'Input/output error', 'a disk')", 1, "a disk"),
    ],
    ids=["stalls", "raises"],
)
def test_data_that_stalls_or_fails_ends_a_run_with_a_sentence(
    tmp_path, fault, code, words
):
    began = time.monotonic()
    done = train(
        tmp_path / "run",
        f"--config.data.folder={tmp_path / 'data'}",
        "--config.data_timeout_s=2",
        "--config.steps=500",
        cwd=ROOT,
        seed="0",
        code=BROKEN.format(fault=fault),
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    if "Event" in fault:
        assert "shard-00000.bin" in done.stderr
    assert time.monotonic() - began < 200
