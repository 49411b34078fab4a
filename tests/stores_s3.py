"""Runs, a sweep and texts on S3, as moto serves it on loopback: `make test-stores`.

moto is no store of anyone: it answers as Amazon documents it. Processes are killed and
go on as those of another machine do, with another home folder.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from gpt_jax import checkpoint, metrics, stores

ROOT = Path(__file__).parents[1]
TEXT = "the quick brown fox jumps over the lazy dog. " * 300
TINY = ("--config=configs/quickstart.py:size=tiny", "--config.steps=60")
TINY += ("--config.eval_every=20", "--config.checkpoint_every=10")
TINY += ("--config.sample_every=0", "--config.log_every=10")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Starts S3, where drivers find it."""
    python = os.environ.get("EMULATORS", "")
    if not python:
        pytest.fail("EMULATORS must name the Python that has moto: make test-stores")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("w")
    server = subprocess.Popen(
        [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=log, stderr=log,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while True:
            try:
                made = urllib.request.Request(f"{address}/bucket", method="PUT")
                urllib.request.urlopen(made, timeout=10).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", address)
            environment.setenv("AWS_ALLOW_HTTP", "true")
            environment.setenv("AWS_REGION", "us-east-1")
            environment.setenv("AWS_ACCESS_KEY_ID", "any")
            environment.setenv("AWS_SECRET_ACCESS_KEY", "any")
            yield
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def start(store, tmp_path):
    """Returns a function that starts a door on a machine of that name."""
    (tmp_path / "text.txt").write_text(TEXT)

    def begin(machine: str, door: str, *flags: str) -> subprocess.Popen:
        home = tmp_path / machine
        home.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", f"experiments.{door}", *flags],
            cwd=ROOT, env={**os.environ, "HOME": str(home)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    return begin


def ended(process: subprocess.Popen, code: int = 0) -> str:
    said = process.communicate(timeout=300)[0]
    assert process.returncode == code, said
    return said


def killed_when(process: subprocess.Popen, there) -> None:
    """Kills a door and all that it started, a moment after something is there."""
    until = time.monotonic() + 200
    while not there():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def copy_of(home: Path, name: str) -> Path:
    """Returns the local folder that stands for an address on a machine."""
    (found,) = home.glob(f".cache/gpt_jax/stores/*/copy/{name}")
    return found


def bucket():
    """Returns the file system of S3."""
    opened, _ = stores._store("s3://bucket")
    opened.invalidate_cache()
    return opened


def names_in(prefix: str) -> list[str]:
    """Returns what the bucket holds below a name."""
    return [name.removeprefix("bucket/") for name in bucket().find(f"bucket/{prefix}")]


def state_of(folder: Path) -> str:
    tree, _, _ = checkpoint.Checkpoints(folder / "checkpoints", keep=None).restore(None)
    return checkpoint.digest(tree)


def of_text(folder: Path) -> tuple[str, ...]:
    source, data = f"{folder}/text.txt", f"{folder}/data"
    return f"--config.data.source={source}", f"--config.data.folder={data}"


def test_a_run_killed_on_one_machine_goes_on_on_another(start, tmp_path):
    """And ends with the bits of one that nobody disturbed."""
    flags = (*TINY, *of_text(tmp_path), "--config.steps=1000")
    ended(start("alone", "train", *flags, f"--workdir={tmp_path}/alone"))
    there = "--workdir=s3://bucket/runs/killed"
    first = start("one", "train", *flags, there)
    killed_when(
        first,
        lambda: any("manifest" in key for key in names_in("runs/killed")),
    )
    key = "bucket/runs/killed/claim.json"
    note = json.loads(bucket().cat_file(key))
    by = {**note["by"], "host": "elsewhere"}
    other = json.dumps({"by": by, "time": time.time()}).encode()
    bucket().pipe_file(key, other)
    said = ended(start("two", "train", *flags, there), 2)
    assert "s3://bucket/runs/killed is in use by process" in said
    assert "counts as gone after" in said
    assert bucket().cat_file(key) == other
    bucket().pipe_file(key, json.dumps(note).encode())
    said = ended(start("one", "train", *flags, there))  # whose pid is gone
    assert "resuming after step" in said
    assert "done: steps reached after step 1000" in said
    assert "--run=s3://bucket/runs/killed" in said
    assert "runs/killed/claim.json" not in names_in("runs/killed")
    ended(start("two", "train", *flags, there))  # nothing to do
    two = copy_of(tmp_path / "two", "killed")
    assert state_of(two) == state_of(tmp_path / "alone")
    last = [metrics.read(folder)[-1] for folder in (two, tmp_path / "alone")]
    assert last[0]["val_loss"] == last[1]["val_loss"]


def test_a_run_of_a_lost_machine_goes_on_elsewhere(start, tmp_path):
    flags = (*TINY, *of_text(tmp_path), "--config.steps=1000")
    there = "--workdir=s3://bucket/runs/lost"
    killed_when(
        start("one", "train", *flags, there),
        lambda: any("manifest" in key for key in names_in("runs/lost")),
    )
    key = "bucket/runs/lost/claim.json"
    note = json.loads(bucket().cat_file(key))
    by = {**note["by"], "host": "lost"}
    old = json.dumps({"by": by, "time": note["time"] - 1000}).encode()
    bucket().pipe_file(key, old)
    said = ended(start("two", "train", *flags, there))
    assert "took over s3://bucket/runs/lost" in said
    assert "resuming after step" in said
    ended(start("alone", "train", *flags, f"--workdir={tmp_path}/alone"))
    two = copy_of(tmp_path / "two", "lost")
    assert state_of(two) == state_of(tmp_path / "alone")


def test_a_sample_is_drawn_from_a_run_that_is_only_there(start, tmp_path):
    there = "s3://bucket/runs/sampled"
    ended(start("one", "train", *TINY, *of_text(tmp_path), f"--workdir={there}"))
    own = copy_of(tmp_path / "one", "sampled")
    how = ("--prompt=the ", "--temperature=0", "--max_new_tokens=20")
    far = ended(start("two", "sample", f"--run={there}", *how))
    assert "fetching" not in far
    near = ended(start("one", "sample", f"--run={own}", *how))
    assert far.splitlines()[-1] == near.splitlines()[-1] != ""


def test_a_sweep_killed_there_goes_on_there(start, tmp_path):
    fixed = {"steps": 300, "eval_every": 100, "checkpoint_every": 100}
    fixed |= {"sample_every": 0, "data.source": f"{tmp_path}/text.txt"}
    fixed |= {"data.folder": f"{tmp_path}/data"}
    sweep = tmp_path / "rates.py"
    sweep.write_text(
        "from gpt_jax.sweep.space import grid\n"
        "config = 'configs/quickstart.py:size=tiny'\n"
        f"fixed = {fixed!r}\n"
        "def points():\n"
        "    return grid({'hyper.lr': [1e-3, 1e-2]})\n"
    )
    flags = (f"--sweep={sweep}", "--workers=1")
    ended(start("alone", "sweep", *flags, f"--out={tmp_path}/alone_sweep"))
    there = "--out=s3://bucket/sweeps/rates"
    killed_when(
        start("one", "sweep", *flags, there),
        lambda: any("manifest" in key for key in names_in("sweeps/rates")),
    )
    ended(start("one", "sweep", *flags, there))
    ended(start("two", "report", "--run=s3://bucket/sweeps/rates/lr=0.001"))
    names = names_in("sweeps/rates")
    assert {"sweeps/rates/results.csv", "sweeps/rates/report.html"} <= {*names}
    assert any(name.endswith("lr=0.001/report.html") for name in names)
    losses = [
        [row.split(",") for row in (out / "trials.csv").read_text().splitlines()]
        for out in (copy_of(tmp_path / "one", "rates"), tmp_path / "alone_sweep")
    ]
    at = losses[0][0].index("value")
    assert [row[at] for row in losses[0]] == [row[at] for row in losses[1]]


def test_texts_and_shards_are_read_where_they_are(start, tmp_path):
    for name in ("a.txt", "b.txt"):
        bucket().pipe_file(f"bucket/books/{name}", TEXT.encode())
        (tmp_path / "books").mkdir(exist_ok=True)
        (tmp_path / "books" / name).write_text(TEXT)
    for machine, source, data in (
        ("one", "s3://bucket/books/*.txt", "s3://bucket/data"),
        ("alone", f"{tmp_path}/books/*.txt", f"{tmp_path}/data"),
    ):
        given = (f"--config.data.source={source}", f"--config.data.folder={data}")
        ended(
            start(
                machine, "train", *TINY, *given, f"--workdir={tmp_path}/{machine}_run"
            )
        )
    assert state_of(tmp_path / "one_run") == state_of(tmp_path / "alone_run")
    assert any(key.endswith("shard-00000.bin") for key in names_in("data"))
    assert not list((tmp_path / "one").rglob("shard-*"))


@pytest.mark.parametrize(
    "address, sentence",
    [
        ("s3://nobucket/runs/a", "The specified bucket does not exist"),
        ("nowhere://bucket/a", "nothing is known of nowhere://"),
    ],
)
def test_a_place_that_is_not_there_is_refused_in_a_sentence(
    start, tmp_path, address, sentence
):
    said = ended(
        start("one", "train", *TINY, *of_text(tmp_path), f"--workdir={address}"), 2
    )
    assert sentence in said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
