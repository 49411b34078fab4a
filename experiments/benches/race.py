"""Sides that are whole processes: each `go` launches one and watches it."""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.benches.worker import Failed, Side, Worker, require
from gpt_jax.files import cores

Go = Callable[[], dict[str, Any]]
LOOK_SECONDS = 0.02  # between two looks at a record
LIMIT_SECONDS = 3600.0  # of one process
SAID = 1000  # characters of what a failed process said last


def command(
    *, words: Sequence[str], copies: int = 1, at_once: int = 1
) -> tuple[Go, dict]:
    """Seconds of a Python command, or of copies of it, from launch to the last end.

    Args:
      words: the command after `python`; {folder}, new each time, and {index}, the
        number of the copy, are filled in.
      copies: how many.
      at_once: how many of them at the same time; 0 = one per core.
    """

    def run(index: int, folder: str) -> None:
        fill = {"{folder}": folder, "{index}": str(index)}
        filled = _python([_replaced(word, fill) for word in words])
        done = subprocess.run(filled, capture_output=True, text=True)
        if done.returncode:
            said = (done.stdout + done.stderr)[-SAID:]
            raise Failed(f"{' '.join(words)} ended with {done.returncode}: {said}")

    def go() -> dict:
        with (
            tempfile.TemporaryDirectory() as folder,
            ThreadPoolExecutor(at_once or cores()) as pool,
        ):
            started = time.perf_counter()
            list(pool.map(lambda index: run(index, folder), range(copies)))
            return {"value": time.perf_counter() - started}

    return go, {}


def fresh(
    *,
    make: str,
    options: Mapping[str, Any],
    value: str,
    turns: int = 0,
    new_folder: str = "",
    before: bool = False,
) -> tuple[Go, dict]:
    """A number of a process that is made anew each time.

    Args:
      make: the function of a side, "module:function".
      options: its arguments.
      value: "seconds" from launch until it is ready, or the name of one of its facts
        (or, with turns, of its last sample).
      turns: how often it measures before that number is taken.
      new_folder: the argument that is an empty folder each time; "" = none.
      before: launch it once untimed, so that caches are warm.
    """

    def go() -> dict:
        with tempfile.TemporaryDirectory() as folder:
            given = {**options, new_folder: folder} if new_folder else dict(options)
            started = time.perf_counter()
            with Worker(Side(make, make, given), limit_s=LIMIT_SECONDS) as worker:
                seconds = time.perf_counter() - started
                found = {"seconds": seconds, **worker.facts}
                for _ in range(turns):
                    found |= worker.go()
                found["value"] = found[value]
                return found

    if before:
        go()
    return go, {}


def to_loss(
    *,
    words: Sequence[str],
    stop_at: float,
    seeds: Sequence[int],
    end_counts: bool = False,
    needs: Sequence[str] = (),
) -> tuple[Go, dict]:
    """Seconds from a process's launch to an evaluation at or below `stop_at`.

    The clock starts before the process does and stops when metrics.jsonl in its folder
    shows that evaluation; so imports, reading the text, compilation and every
    evaluation count. Each turn takes the next seed, in folders of its own.

    Args:
      words: the command after `python`; {folder} and {seed} are filled in. It writes
        {folder}/metrics.jsonl.
      stop_at: the validation loss to reach.
      seeds: one for each turn.
      end_counts: a run that ends without that loss counts as if it had reached it at
        its end, and says "reached": False; otherwise it is an error.
      needs: packages without which the side is absent.
    """
    require(*needs)
    left = list(seeds)

    def go() -> dict:
        seed = left.pop(0)
        folder = Path(tempfile.mkdtemp(prefix="time-to-loss-"))
        try:
            fill = {"{folder}": str(folder / "run"), "{seed}": str(seed)}
            filled = [_replaced(word, fill) for word in words]
            return {"seed": seed, **_race(filled, folder / "run", stop_at, end_counts)}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return go, {}


def _race(
    words: Sequence[str], folder: Path, stop_at: float, end_counts: bool
) -> dict[str, Any]:
    """Runs a command until its record shows the loss; returns time and curve."""
    folder.mkdir()
    curve: list[tuple[float, int, float]] = []
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder.parent / "log").open("w+", encoding="utf-8"))
        started = time.perf_counter()
        process = subprocess.Popen(_python(words), stdout=log, stderr=log)
        stack.callback(_end, process)
        ended = reached = False
        while not (ended or reached):
            time.sleep(LOOK_SECONDS)
            ended = process.poll() is not None  # before the look: nothing comes after
            rows = _evaluations(folder / "metrics.jsonl")
            now = time.perf_counter() - started
            curve += [(now, step, loss) for step, loss in rows[len(curve) :]]
            reached = bool(curve) and curve[-1][2] <= stop_at
        if not reached and (process.returncode or not curve or not end_counts):
            log.seek(0)
            best = min((loss for _, _, loss in curve), default=None)
            raise Failed(
                f"its loss came to {best} and not to {stop_at}; it ended with code "
                f"{process.returncode}: {log.read()[-SAID:]}"
            )
    seconds, step, loss = curve[-1]
    found = {"value": seconds, "step": step, "loss": loss, "reached": reached}
    return {**found, "stop_at": stop_at, "curve": curve}


def _replaced(word: str, fill: Mapping[str, str]) -> str:
    for name, text in fill.items():
        word = word.replace(name, text)
    return word


def _evaluations(path: Path) -> list[tuple[int, float]]:
    """Returns step and loss of the evaluations up to now, in whole lines."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss")]


def _end(process: subprocess.Popen) -> None:
    """Stops a process that has been measured; it need not save."""
    if process.poll() is None:
        process.kill()
    process.wait()


def _python(words: Sequence[str]) -> list[str]:
    return [sys.executable, *words]
