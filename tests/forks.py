"""Doors as real processes that start at once: forked from one that imported it all.

`python -m tests.forks` imports what a door needs, but touches no device and starts no
thread, so that it can fork. For each line of JSON on its stdin it forks a child, which
goes on as `python -m experiments.<door> ...` would, prints the child's pid, and when it
has ended its exit code (negative for a signal). `Forks` is the other end.

A child may first run some Python of the test (`before`), which puts the fault into it:
`DIE` there is SIGKILL, sent to itself at exactly that place.
"""

import contextlib
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gpt_jax import checkpoint, metrics

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"

# What `before` may use besides what it imports.
HEAD = """
import os, signal, threading
from gpt_jax import checkpoint, data, metrics, sharding, train
def die(): os.kill(os.getpid(), signal.SIGKILL)
def term(): os.kill(os.getpid(), signal.SIGTERM)
def interrupt(): os.kill(os.getpid(), signal.SIGINT)
def at(count, act, function):
    "Calls act just before the call of `function` number `count`."
    calls = []
    def watched(*args, **named):
        calls.append(0)
        if len(calls) == count: act()
        return function(*args, **named)
    return watched
"""


def flags(folder: Path, **config: Any) -> list[str]:
    """Returns the flags of a run that trains in seconds; its text is in `folder`."""
    chosen: dict[str, Any] = {
        "data.folder": folder / "data",
        "model.n_layers": 1,
        "model.d_model": 16,
        "optimizer.name": "adamw",
        "hyper.decay_steps": 100.0,
        "mesh.data": 1,
        "tensorboard": False,
        "compile_cache": "",
        "sample_every": 0,
        "eval_windows": 4,
        "log_every": 1,
        "keep": 3,
        **{key.replace("__", "."): value for key, value in config.items()},
    }
    words = [f"--config.{key}={value}" for key, value in chosen.items()]
    return ["--config=configs/quickstart.py:size=tiny", *words]


class Forks:
    """The process that children are forked from; one child at a time."""

    def __init__(self):
        environment = {**os.environ, "XLA_FLAGS": FLAGS, "OPENBLAS_NUM_THREADS": "1"}
        environment.pop("NPROC", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        # A pipe with a name: limits on files and full disks are no limits to it.
        self.folder = tempfile.TemporaryDirectory(prefix="forks-")
        self.pipe = Path(self.folder.name) / "said"
        os.mkfifo(self.pipe)
        self.said, self.reader = "", threading.Thread()

    def start(self, door: str, *argv: object, before: str = "") -> int:
        """Starts a door; returns its pid."""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        words = [str(word) for word in argv]
        job = {"door": door, "argv": words, "before": before, "pipe": str(self.pipe)}
        self._in.write(json.dumps(job) + "\n")
        self._in.flush()
        return int(self._out.readline())

    def wait(self) -> int:
        """Returns the exit code of the child, negative for a signal."""
        code = int(self._out.readline())
        self.reader.join(timeout=60)
        return code

    def run(self, door: str, *argv: object, before: str = "") -> tuple[int, str]:
        """Runs a door; returns its exit code and all that it printed."""
        self.start(door, *argv, before=before)
        return self.wait(), self.said

    def close(self) -> None:
        self.process.communicate()
        self.folder.cleanup()

    def _read(self) -> None:
        self.said = self.pipe.read_text(errors="replace")

    @property
    def _in(self) -> IO[str]:
        assert self.process.stdin
        return self.process.stdin

    @property
    def _out(self) -> IO[str]:
        assert self.process.stdout
        return self.process.stdout


@contextlib.contextmanager
def forks() -> Iterator[Forks]:
    """Yields a `Forks` and ends it."""
    made = Forks()
    try:
        yield made
    finally:
        made.close()


def sound(run: Path) -> list[int]:
    """Returns the steps that a run lists, after reading and checking each of them."""
    store = checkpoint.Checkpoints(run / "checkpoints", keep=None)
    for step in store.steps():
        store.restore(None, step=step)
    return store.steps()


def digest(run: Path) -> str:
    """Returns the digest of the newest weights and optimizer memory of a run."""
    store = checkpoint.Checkpoints(run / "checkpoints", keep=None)
    tree, meta, step = store.restore(None, step=store.latest())
    assert meta["totals"]["tokens"] and int(tree["step"]) == step
    return checkpoint.digest(tree)


def losses(run: Path) -> list[tuple[int, float]]:
    """Returns (step, training loss) of every line that has one, in their order."""
    rows = metrics.read(run)
    return [(row["step"], row["train_loss"]) for row in rows if "train_loss" in row]


def reached(run: Path) -> int:
    """Returns the last step that the record of a run knows."""
    if not (run / metrics.FILE).exists():
        return 0
    return max((row["step"] for row in metrics.read(run)), default=0)


def serve() -> None:
    """Forks for every line of stdin until it ends; a child returns at once."""
    for name in ("gpt_jax.train", "orbax.checkpoint", "matplotlib.pyplot"):
        importlib.import_module(name)
    for name in ("grain.experimental", "experiments.door"):
        importlib.import_module(name)
    _ = importlib.import_module("orbax.checkpoint").v1  # imported when it is looked at
    if os.path.isdir("/proc/self/task"):
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"{len(threads)} threads: a fork would lose them"
    for line in sys.stdin:
        job = json.loads(line)
        said = os.open(job["pipe"], os.O_WRONLY)
        pid = os.fork()
        if not pid:
            child(job, said)
            return
        os.close(said)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def child(job: dict, said: int) -> None:
    """Goes on as the door that the job names, which prints into `said`."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(source, target)
    os.close(said)
    if job["before"]:
        exec(HEAD + job["before"], {})
    sys.argv = [f"experiments/{job['door']}.py", *job["argv"]]
    runpy.run_module(f"experiments.{job['door']}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore", message=".*os.fork.*")
    serve()
