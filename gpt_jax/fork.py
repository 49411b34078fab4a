"""A new run that begins at a step of another: config.fork.

`init_from` takes weights alone, for another text or task, and counts steps from 0. A
fork takes all that a step changes (weights, optimizer memory, the guard, averages, the
count of steps and with it the place in the data) and goes on under other traced
numbers. With the same numbers it is, bit for bit, what the other run becomes.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import commands, runs, stores, tokenizers
from gpt_jax.checkpoint import Checkpoints

# What may be another in a fork than in its trunk: traced numbers, the schedule that
# reads them, and what may change when a run is resumed.
FREE = (*runs.RESUMABLE, r"hyper\..*|optimizer\.schedule|fork")


class Fork(NamedTuple):
    """Where a run begins: a run folder, its trunk, and the step of a checkpoint."""

    trunk: Path
    step: int


def parse(text: str) -> Fork | None:
    """Returns what config.fork says, "runs/a:step=600"; None where it is empty.

    Looks at no file, but an address is fetched.

    Raises:
      ValueError: it says no step, or names what is no run folder.
    """
    if not text:
        return None
    folder, option = commands.split(text)
    if folder in ("hf", "gguf"):
        raise ValueError(
            f"fork is {text!r}: published weights have no optimizer memory to go on "
            f"with; a new run from weights alone is init_from={text}"
        )
    key, _, step = option.partition("=")
    if not folder or key != "step" or not step.isdecimal():
        raise ValueError(
            f"fork is {text!r}: it names a run folder and the step of one of its "
            f"checkpoints, as in fork={folder or 'runs/a'}:step=600"
        )
    return Fork(stores.fetched(folder), int(step))


def check_there(fork: Fork, workdir: Path) -> None:
    """Refuses a fork of what is no run, of itself, or of a step without a checkpoint.

    Raises:
      ValueError: names the steps that the trunk has.
    """
    runs.read_config(fork.trunk)
    if fork.trunk.resolve() == workdir.resolve():
        raise ValueError(
            f"fork names {fork.trunk}, which is this run's own folder: a fork is a new "
            "run, give it another --workdir"
        )
    there = Checkpoints(fork.trunk / "checkpoints", keep=None).steps()
    if fork.step not in there:
        shown = ", ".join(map(str, there)) or "none"
        raise ValueError(
            f"{fork.trunk} has no checkpoint of step {fork.step} to fork: it has "
            f"{shown} (checkpoint_every and keep decide which a run keeps)"
        )


def check_same(fork: Fork, config: Any, tokenizer: Any, fingerprint: str) -> None:
    """Refuses a fork that would be another model, task, optimizer or data order.

    Args:
      fork: which; it is there.
      config: of the new run.
      tokenizer: of the new run, as `fingerprint` of its training data.

    Raises:
      ValueError: names what differs.
    """
    lines = [
        line
        for line in runs.difference(runs.read_config(fork.trunk), config)
        if not any(re.fullmatch(keys, line.split(":")[0]) for keys in FREE)
    ]
    if lines:
        raise ValueError(
            f"a fork of {fork.trunk} may change hyper.*, the schedule, and how long "
            "and where it trains; here differ:\n  "
            + "\n  ".join(lines)
            + f"\nset these keys back, or start anew from its weights with "
            f"init_from={fork.trunk}"
        )
    theirs = tokenizers.load(fork.trunk / "tokenizer.json").sha256
    stated = runs.fingerprint_of(fork.trunk)
    if theirs != tokenizer.sha256 or stated not in (None, fingerprint):
        raise ValueError(
            f"{fork.trunk} was trained on other data than there is now: a fork goes on "
            "at the same place in the same data; put it back, or start anew from its "
            f"weights with init_from={fork.trunk}"
        )
