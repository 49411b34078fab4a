"""The doctor: what is sound is called sound; each damage is named, with a cure."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from gpt_jax import checkpoint, doctor, runs, tokenizers
from gpt_jax import model as models
from gpt_jax.checkpoint import arrays
from tests import tiny

ROOT = Path(__file__).parents[1]
TOKENIZER = tokenizers.train("byte", [])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A run folder with two checkpoints; tests copy it before they damage it."""
    folder = tmp_path_factory.mktemp("runs") / "bytes"
    config = common.tiny(common.base())
    runs.create(folder, config, TOKENIZER)
    cfg = runs.model_config(config, TOKENIZER)
    params = tiny.jit(partial(models.init, cfg))(jax.random.key(3))
    with checkpoint.Checkpoints(folder / "checkpoints", keep=2) as store:
        for step in (2, 4):
            told = {"tokenizer": TOKENIZER.sha256}
            store.save(step, {"params": params}, metric=float(step), meta=told)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "run"))


def told(folder, level):
    """Returns "about: found" of the findings of a level."""
    found = list(doctor.run(folder))
    return [f"{f.about}: {f.found}" for f in found if f.level == level]


def test_a_sound_run_has_no_finding(sound):
    found = list(doctor.run(sound))
    assert {f.level for f in found} == {"ok"} and not any(f.cure for f in found)
    assert [f.about for f in found if f.about.startswith("checkpoint")] == [
        *("checkpoint 2", "checkpoint 4"),
    ]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_of_any_checkpoint_is_named_with_its_file(folder):
    data = max(
        (p for p in (folder / "checkpoints" / "2").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    flip(data)
    (found,) = told(folder, "problem")
    assert found.startswith("checkpoint 2: ") and str(data) in found


def test_weights_that_are_not_finite_are_named(folder, monkeypatch):
    params = jax.tree.map(np.array, runs.open(folder).params)
    params["embed"]["embedding"][3, 1] = np.nan
    monkeypatch.setattr(arrays, "FINITE", ())  # a version without that promise
    with checkpoint.Checkpoints(folder / "checkpoints", keep=3) as store:
        store.save(6, {"params": params}, metric=None, meta={})
    monkeypatch.undo()
    (found,) = told(folder, "problem")
    assert found == "checkpoint 6: params/embed/embedding holds NaN or Inf"


def test_a_config_and_a_tokenizer_of_other_weights_are_named(folder):
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"d_model": 32', '"d_model": 64'))
    found = told(folder, "problem")
    assert len(found) == 2 and "block_0/attn/key/bias: wanted (2, 32)" in found[0]
    path.write_text(text.replace('"vocab_size": 0', '"vocab_size": 257'))
    tokenizers.train("bpe:300", ["a text " * 9]).save(folder / "tokenizer.json")
    assert "do not belong together" in told(folder, "problem")[0]
    path.write_text(text)
    tokenizers.train("bpe:257", ["as many tokens"]).save(folder / "tokenizer.json")
    assert all("sha256" in found for found in told(folder, "problem"))
    assert len(told(folder, "problem")) == 2
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in told(folder, "problem")[0]


def test_what_is_left_over_is_told_and_left_alone(folder):
    inside = folder / "checkpoints"
    for name in ("8.orbax-checkpoint-tmp", "12", "damaged-1", "aside-9"):
        (inside / name).mkdir()
    (folder / "config.json.tmp").touch()
    (folder / "run.lock").write_text(
        json.dumps({"host": os.uname().nodename, "pid": 2**30, "started": ""})
    )
    before = sorted(folder.rglob("*"))
    found = "\n".join(told(folder, "warning"))
    for word in ("8.orbax", "/12 ", "damaged-1", "aside-9", "config.json.tmp", "died"):
        assert word in found
    assert sorted(folder.rglob("*")) == before and not told(folder, "problem")


def test_a_record_that_goes_back_is_told(folder):
    lines = [json.dumps({"step": step}) for step in (1, 2, 2, 5, 4)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert any("goes back to step 4" in line for line in told(folder, "warning"))


def test_packages_are_compared_with_the_lock(tmp_path):
    (tmp_path / "requirements.txt").write_text(
        "# a comment\nnumpy==0.0.1\n    # via x\nno-such-package==1\n"
        f"pytest=={pytest.__version__}\nnever==1 ; sys_platform == 'amiga'\n"
    )
    found = {f.found: f for f in doctor.packages(tmp_path)}
    wanted = f"numpy is {np.__version__}, tested is 0.0.1"
    assert found[wanted].level == "warning" and "pip install" in found[wanted].cure
    assert found["no-such-package is not installed"].level == "problem"
    assert found["1 of 3 are those of requirements.txt"].level == "warning"
    assert not any("never" in line for line in found)


def test_a_cache_that_others_can_write_to_is_a_problem(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert doctor.cache(str(tmp_path / "cache")).level == "problem"
    (tmp_path / "cache").chmod(0o700)
    assert doctor.cache(str(tmp_path / "cache")).level == "ok"


def test_a_download_that_was_changed_is_named(tmp_path):
    (tmp_path / "the-verdict.txt").write_text("It was not so.")
    first, last = doctor.downloaded(tmp_path)
    assert first.level == "warning" and "the-verdict.txt" in first.found
    assert last.found.startswith("0 texts")


@pytest.mark.parametrize(
    ("found", "accelerator", "level", "words"),
    [
        ([("cpu", "cpu", 1e-5)] * 2, "", "ok", "2 x cpu"),
        ([("cpu", "cpu", 1e-5)], "cuda13", "warning", "there is an accelerator"),
        ([("gpu", "H100", 1e-5)], "cuda13", "ok", "H100"),
        ([("gpu", "H100", 1e-5), ("gpu", "H100", 3.0)], "", "problem", "wrong by"),
        ([("gpu", "H100", float("nan"))], "", "problem", "wrong by"),
        ([("gpu", "H100", 1e-5), ("gpu", "H100", np.nan)], "", "problem", "wrong by"),
    ],
)
def test_devices_are_judged_by_what_they_compute(found, accelerator, level, words):
    finding = doctor.judge(found, accelerator)
    assert finding.level == level and words in finding.found


def door(*arguments, **env):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.doctor", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_the_door_exits_1_for_a_problem_and_prints_json(folder):
    flip(folder / "checkpoints" / "4" / "manifest.json")
    code, out, _ = door(f"--run={folder}", "--json")
    found = {f["about"]: f["level"] for f in json.loads(out)}
    assert code == 1 and found["checkpoint 4"] == "problem"
    assert found["checkpoint 2"] == found["devices"] == found["config"] == "ok"


@pytest.mark.slow
def test_the_door_exits_0_without_a_problem_and_2_for_a_mistake(sound):
    code, out, _ = door(f"--run={sound}")
    assert code == 0 and re.search(r"\d+ ok, \d+ warning, 0 problem\n$", out)
    code, _, err = door("--run=no/such/run")
    assert code == 2 and "no such folder" in err
    code, out, _ = door(JAX_PLATFORMS="no_such_platform")
    assert code == 1 and "JAX cannot start" in out
