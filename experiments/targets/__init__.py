"""The claims that experiments/reproduce.py measures again: one row each."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import commands, signals


class Absent(Exception):
    """A row cannot be measured here; the message says what is missing."""


class Failed(Exception):
    """A command that a row needs has failed; the message says how."""


class Found(NamedTuple):
    """What was measured, in words, and whether it meets the claim."""

    measured: str
    met: bool


class Place(NamedTuple):
    """Where rows find what they need.

    Attributes:
      data: a folder of texts, or None.
      out: the folder of the runs; a row whose run is there goes on with it.
      base: a run folder to fine-tune, or None for one trained here.
    """

    data: Path | None
    out: Path
    base: Path | None

    def file(self, name: str) -> Path:
        """Returns a file of the data folder; Absent when it is not there."""
        if self.data is None or not (self.data / name).is_file():
            raise Absent(f"needs {name} in --data")
        return self.data / name


class Row(NamedTuple):
    """A claim.

    Attributes:
      what: is claimed of.
      claimed: the number, in words.
      tolerance: how near counts as met.
      measure: measures it anew; raises Absent, or Failed.
    """

    what: str
    claimed: str
    tolerance: str
    measure: Callable[[Place], Found]


def exactly(what: str, claimed: Any, measure: Callable[[Place], Any]) -> Row:
    """Returns the row of a fact that leaves no room."""

    def found(place: Place) -> Found:
        value = measure(place)
        return Found(shown(value), value == claimed)

    return Row(what, shown(claimed), "exact", found)


def shown(value: Any) -> str:
    """Returns numbers with thousands marked, joined by slashes."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, tuple) and all(isinstance(part, int) for part in value):
        return " / ".join(map(shown, value))
    return str(value)


def train(place: Place, name: str, config: str, *overrides: str) -> list[dict]:
    """Trains a run, or goes on with it, and returns the lines of its metrics.

    Args:
      place: its `out` holds the run folder and, beside it, what training printed.
      name: of the run.
      config: a config file with its options.
      *overrides: keys and values, as in "steps=100".

    Raises:
      Failed: training failed; names the file that says why.
    """
    from gpt_jax import metrics

    folder = place.out / name
    place.out.mkdir(parents=True, exist_ok=True)
    log = place.out / f"{name}.log"
    words = [f"data.folder={place.out / 'data'}", *overrides]
    words += [f"data.cache={place.data}"] if place.data else []
    command = [*commands.argv("train"), f"--config={config}"]
    command += [f"--workdir={folder}", *(f"--config.{word}" for word in words)]
    run(command, log)
    return metrics.read(folder)


def run(command: Sequence[str], log: Path) -> str:
    """Runs a door and returns what it printed, which `log` keeps.

    Raises:
      Failed: it did not end well.
    """
    print(f"  {' '.join(command[1:])}  (see {log})", file=sys.stderr, flush=True)
    with log.open("w", encoding="utf-8") as file:
        both: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT}
        with signals.child(command, **both) as process:
            code = process.wait()
    if code in (130, 143, -2, -15):
        raise KeyboardInterrupt
    text = log.read_text(encoding="utf-8")
    if code:
        last = (text.strip().splitlines() or ["no words"])[-1]
        raise Failed(f"exit code {code}: {last} (see {log})")
    return text
