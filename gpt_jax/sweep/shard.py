"""A part of a sweep's points, trained by a process of its own beside others.

An array of jobs needs no scheduler then: each takes every n-th point, all write into
one folder and one record. Their locks lie in shards/; that of the whole folder is held
by a shard only while it opens the record.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from gpt_jax import files, runs

FOLDER = "shards"
PATIENCE_S = 600.0  # others open the record before this one; large ones take a while


class Shard(NamedTuple):
    """Which of a sweep's points are trained here: every `of`-th, from `part` on."""

    part: int = 1
    of: int = 1

    @property
    def whole(self) -> bool:
        """Whether it is all of them."""
        return self.of == 1

    @property
    def name(self) -> str:
        """What its lock is called."""
        return f"{self.part}-of-{self.of}.lock"

    def owns(self, index: int) -> bool:
        """Whether the point at a place of the file's list is trained here."""
        return index % self.of == self.part - 1


def parse(text: str) -> Shard:
    """Returns the shard that a text like 3/16 names; "" is the whole.

    Raises:
      ValueError: it names none.
    """
    if not text:
        return Shard()
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    shard = Shard(*map(int, found.groups())) if found else Shard(0, 0)
    if not 1 <= shard.part <= shard.of:
        raise ValueError(
            f"--shard={text}: give the part and how many there are, from --shard=1/16 "
            "to --shard=16/16"
        )
    return shard


@contextlib.contextmanager
def hold(out: Path, shard: Shard) -> Iterator[tuple[bool, Callable[[], None]]]:
    """Holds the right to train these points in a sweep's folder.

    Yields:
      Whether nobody else writes to the record; and what is to be called when it is
      open: other shards can open it then.

    Raises:
      ValueError: somebody else trains them; the sentence has the pid.
    """
    with contextlib.ExitStack() as stack:
        gate = stack.enter_context(contextlib.ExitStack())
        patience_s = 0.0 if shard.whole else PATIENCE_S
        gate.enter_context(runs.lock(out, "--out", patience_s=patience_s))
        others = _running(out / FOLDER)
        for name, held in others.items():
            same = shard.whole or not name.endswith(f"-of-{shard.of}.lock")
            if same or name == shard.name:
                part, _, of = name.removesuffix(".lock").partition("-of-")
                raise ValueError(
                    f"--shard={part}/{of} of {out} is in use by process {held.pid} on "
                    f"{held.host}: wait for it, or stop it"
                )
        if shard.whole:
            yield True, lambda: None
            return
        # Beside the record, which does not take a folder that holds anything else.
        opened = stack.enter_context(contextlib.ExitStack())

        def enter() -> None:
            opened.enter_context(files.lock(out / FOLDER / shard.name))
            gate.close()

        yield not others, enter


def _running(folder: Path) -> dict[str, files.Held]:
    """Returns the names of the locks that somebody holds, and who."""
    found = {}
    for path in sorted(folder.glob("*.lock")):
        try:
            with files.lock(path):
                pass
        except files.Held as held:
            found[path.name] = held
    return found
