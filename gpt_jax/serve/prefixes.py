"""What prompts begin with, kept: a turn of a chat computes only what is new in it.

Caches are kept in blocks of BLOCK tokens, and what is left of a conversation behind its
whole blocks in one that is not full. A block's name is a digest of all tokens up to its
end, so one is found only behind the same beginning. The room is bounded; what was not
used for longest goes first, of a beginning its end before its start.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

BLOCK = 64  # tokens


def names(ids: Sequence[int], *, rest: bool = False) -> list[bytes]:
    """Returns the names of the whole blocks that these ids fill; and of their rest."""
    found, last = [], b""
    for start in range(0, len(ids) if rest else len(ids) // BLOCK * BLOCK, BLOCK):
        last = name(last, ids[start : start + BLOCK])
        found.append(last)
    return found


def name(before: bytes, ids: Sequence[int]) -> bytes:
    """Returns the name of the block of these ids behind the one of that name."""
    return hashlib.sha256(before + np.asarray(ids, "<i4").tobytes()).digest()


class Prefixes:
    """Blocks by their names, up to so many bytes together.

    Attributes:
      most: bytes; 0 keeps nothing.
      held: bytes kept now.
    """

    def __init__(self, most: int):
        if most < 0:
            raise ValueError(f"a prefix cache of {most} bytes is below 0")
        self.most, self.held = most, 0
        self._blocks: OrderedDict[bytes, Any] = OrderedDict()

    def __contains__(self, name: bytes) -> bool:
        return name in self._blocks

    def known(self, chain: Sequence[bytes]) -> list[Any]:
        """Returns the blocks with which a chain of names begins, as far as kept."""
        found = []
        for name in chain:
            if name not in self._blocks:
                break
            found.append(self._blocks[name])
        self._touch(chain[: len(found)])
        return found

    def put(self, chain: Sequence[bytes], fresh: dict[bytes, Any]) -> None:
        """Keeps the fresh blocks of a chain; what has waited longest makes room."""
        for name, block in fresh.items():
            self._blocks[name] = block
            self.held += _bytes(block)
        self._touch(chain)
        while self.held > self.most:
            _, block = self._blocks.popitem(last=False)
            self.held -= _bytes(block)

    def _touch(self, chain: Sequence[bytes]) -> None:
        for name in reversed(chain):  # without its start an end is never found
            if name in self._blocks:
                self._blocks.move_to_end(name)


def _bytes(block: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(block))
