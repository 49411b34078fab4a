"""One side of a comparison: a process that waits until it is told to go.

Thread pools of two libraries in one process fight over the cores, so each side has a
process. It imports, builds and warms up before it says that it is ready, and sleeps
in a read while the other side runs.

The process and its owner exchange JSON lines: the options, answered by
{"ready": facts}; then for each "go" {"sample": numbers}; {"absent": sentence} or
{"failed": text} instead of either.
"""

import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import commands, files

# What a process begins with that imports this folder, wherever it is installed.
ENTER = "from gpt_jax import commands; commands.enter(); "
LAST_LINES = 2  # of what a failed process said, shown to the user
END_SECONDS = 10.0  # the longest wait for a process to end by itself
PACKAGES = ("jax", "flax", "torch", "transformers", "tokenizers", "numpy")


class Absent(ValueError):
    """A package that a side needs is not installed; says how to install it."""


class Failed(RuntimeError):
    """A side broke off; says what it said last."""


class Side(NamedTuple):
    """How one side is made.

    Attributes:
      name: what it is called in tables.
      make: "module:function". Called with `options` it prepares everything and
        returns (go, facts): `go()` measures once and returns a dict with "value".
      options: its arguments, as JSON can hold them.
      env: environment variables of its process, beside those that are there.
    """

    name: str
    make: str
    options: Mapping[str, Any] = {}
    env: Mapping[str, str] = {}


def require(*packages: str) -> None:
    """Raises Absent, with the command to install, for a package that is not there."""
    missing = [name for name in packages if util.find_spec(name) is None]
    if missing:
        raise Absent(
            f"{' and '.join(missing)} not installed: {commands.install(*missing)}"
        )


def serve(make: str) -> None:
    """Is the process of a side: prepares, answers every "go", ends with its input."""
    options = json.loads(sys.stdin.readline())
    # What libraries print must not come between the lines of the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(what: str, content: Any) -> None:
        answers.write(json.dumps({what: content}) + "\n")
        answers.flush()

    try:
        module, _, function = make.partition(":")
        go, facts = getattr(importlib.import_module(module), function)(**options)
        say("ready", {**facts, "versions": versions()})
        for _ in sys.stdin:
            say("sample", go())
    except Absent as error:
        say("absent", str(error))
    except Exception:  # the edge of the process: its owner tells the user
        say("failed", traceback.format_exc())


def versions() -> dict[str, str]:
    """Returns the versions of the packages that this process has imported."""
    return {name: metadata.version(name) for name in PACKAGES if name in sys.modules}


def peak_mb() -> float:
    """Returns the most memory that this process has held, in MB (10^6 bytes)."""
    return files.peak_memory() / 1e6


class Worker:
    """The process of one side.

    Attributes:
      facts: what its `make` said of itself, and the versions of its packages.

    Raises:
      Absent: a package that it needs is not installed.
      Failed: it raised, died, or did not answer within `limit_s`.
    """

    def __init__(self, side: Side, *, limit_s: float):
        self.side, self.limit_s = side, limit_s
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        code = f"{ENTER}import experiments.benches.worker as w; w.serve({side.make!r})"
        settings = [f"{name}={value}" for name, value in side.env.items()]
        prefix = ["env", *settings] if settings else []
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
        )
        try:
            self._say(json.dumps(dict(side.options)))
            self.facts = self._answer("ready")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def go(self) -> dict[str, Any]:
        """Returns one measurement."""
        self._say("go")
        return self._answer("sample")

    def cpu_seconds(self) -> float | None:
        """Returns the CPU time of the process and of the children that it has ended.

        None where nobody knows.
        """
        stat = Path(f"/proc/{self.process.pid}/stat")
        if not stat.exists():
            return None
        ticks = stat.read_text().rpartition(")")[2].split()[11:15]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self.process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # why it ended its answer will tell
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def _answer(self, wanted: str) -> dict[str, Any]:
        stdout = self.process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], self.limit_s)[0]:
            self.process.kill()
            raise Failed(f"{self.side.name} gave no answer within {self.limit_s:g} s")
        line = stdout.readline()
        answer: dict[str, Any] = (
            json.loads(line) if line else {"failed": self._last_words()}
        )
        if "absent" in answer:
            raise Absent(answer["absent"])
        if "failed" in answer:
            lines = [line.strip() for line in answer["failed"].splitlines()]
            telling = [line for line in lines if line.strip("^~")][-LAST_LINES:]
            raise Failed(f"{self.side.name}: {' | '.join(telling)}")
        return answer[wanted]

    def _last_words(self) -> str:
        code = self.process.wait()
        self.said.seek(0)
        return f"{self.said.read()}\nended with code {code}"


def busy_seconds() -> float | None:
    """Returns the CPU time that all processes have used, and what the host took.

    None where nobody knows.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, *rest = stat.read_text().split("\n", 1)[0].split()[1:9]
    ticks = sum(map(int, (user, nice, system, *rest)))
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], Any]) -> float:
    """Returns the seconds that `work()` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
