"""How one of our weights lies in a file of others: pairs of inverse functions.

Shapes: a Dense of ours holds [inputs..., outputs...]; torch's Linear [out, in], and
GPT-2's Conv1D [in, out], both with heads and head dim as one axis.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gpt_jax.weights import Weight

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Three functions that belong together, and an axis.

    Attributes:
      shape: our weight -> the shape of theirs.
      read: (theirs, our weight) -> ours; a view where it can be.
      write: (ours, our weight) -> theirs; read's inverse, bit for bit.
      outputs: the axis of theirs that a layer's outputs are.
    """

    shape: Callable[[Weight], Shape]
    read: Callable[[np.ndarray, Weight], np.ndarray]
    write: Callable[[np.ndarray, Weight], np.ndarray]
    outputs: int


class Row(NamedTuple):
    """Where one of our weights is.

    Attributes:
      ours: its path; {i} is the layer.
      theirs: the tensor's name, without the family's prefix.
      layout: how it lies there.
      part: which of the weights that share the tensor's outputs it is.
      parts: how many of our weights the tensor holds.
      by_head: of queries, keys and values: whether each key lies with its value behind
        the queries that read them, head by head, as GPT-NeoX and Falcon have them, and
        not all keys behind all queries.
    """

    ours: str
    theirs: str
    layout: Layout
    part: int = 0
    parts: int = 1
    by_head: bool = False

    def cut(
        self, theirs: np.ndarray, weight: Weight, first: int, axis: int | None = None
    ) -> np.ndarray:
        """Returns this part of a tensor; `first` of its outputs are before it.

        The outputs are those of `axis`; None = where the layout has them. Of what is by
        head they are the first axis.
        """
        if self.parts == 1:
            return theirs
        if self.by_head:
            (heads, size), rest = weight.shape[-2:], theirs.shape[1:]
            keys = heads if self.part else (len(theirs) // size - heads) // 2
            grouped = theirs.reshape(keys, -1, size, *rest)
            place = (slice(0, -2), slice(-2, -1), slice(-1, None))[self.part]
            return grouped[:, place].reshape(-1, *rest)
        width = self.layout.shape(weight)[self.layout.outputs]
        axis = self.layout.outputs if axis is None else axis
        return theirs[(slice(None),) * axis + (slice(first, first + width),)]

    def join(
        self, parts: list[np.ndarray], weight: Weight, axis: int | None = None
    ) -> np.ndarray:
        """Returns the tensor of all its parts, in their order; `axis` as in `cut`."""
        if len(parts) == 1:
            return parts[0]
        if self.by_head:
            size, rest = weight.shape[-1], parts[0].shape[1:]
            keys = len(parts[1]) // size
            grouped = [part.reshape(keys, -1, size, *rest) for part in parts]
            return np.concatenate(grouped, axis=1).reshape(-1, *rest)
        axis = self.layout.outputs if axis is None else axis
        return np.concatenate(parts, axis=axis)


def _matrix(turned: bool) -> Layout:
    def shape(weight):
        return weight.sides[::-1] if turned else weight.sides

    def read(theirs, weight):
        return (theirs.T if turned else theirs).reshape(weight.shape)

    def write(ours, weight):
        flat = ours.reshape(weight.sides)
        return flat.T if turned else flat

    return Layout(shape, read, write, outputs=0 if turned else 1)


def _swapped(layout: Layout) -> Layout:
    """The same with the two halves of every head exchanged."""

    def swap(x):
        return np.roll(x, x.shape[-1] // 2, axis=-1)

    return Layout(
        layout.shape,
        lambda theirs, weight: swap(layout.read(theirs, weight)),
        lambda ours, weight: layout.write(swap(ours), weight),
        layout.outputs,
    )


def interleaved(layout: Layout, features: int = 0) -> Layout:
    """The same where rotary positions turn neighbouring features, not two halves.

    So GPT-J and Command R do it; products of queries and keys stay what they are, in
    whatever order the features are.

    Args:
      layout: of queries' or keys' weights.
      features: how many, from a head's first on, are turned; 0 = all.
    """

    def read(theirs: np.ndarray, weight: Weight) -> np.ndarray:
        x = layout.read(theirs, weight)
        turned, rest = np.split(x, [features or x.shape[-1]], axis=-1)
        return np.concatenate([turned[..., 0::2], turned[..., 1::2], rest], axis=-1)

    def write(ours: np.ndarray, weight: Weight) -> np.ndarray:
        turned, rest = np.split(ours, [features or ours.shape[-1]], axis=-1)
        pairs = np.stack(np.split(turned, 2, axis=-1), axis=-1).reshape(turned.shape)
        return layout.write(np.concatenate([pairs, rest], axis=-1), weight)

    return Layout(layout.shape, read, write, layout.outputs)


def behind(rows: int, layout: Layout) -> Layout:
    """The same behind so many rows that nothing reads; they are written as zeros."""

    def shape(weight: Weight) -> Shape:
        first, *rest = layout.shape(weight)
        return rows + first, *rest

    def write(ours: np.ndarray, weight: Weight) -> np.ndarray:
        theirs = layout.write(ours, weight)
        return np.concatenate([np.zeros_like(theirs[:1]).repeat(rows, 0), theirs])

    return Layout(
        shape,
        lambda theirs, weight: layout.read(theirs[rows:], weight),
        write,
        layout.outputs,
    )


EMBEDDING = Layout(
    lambda weight: weight.shape,
    lambda theirs, weight: theirs,
    lambda ours, weight: ours,
    outputs=0,
)
VECTOR = Layout(
    lambda weight: (math.prod(weight.shape),),
    lambda theirs, weight: theirs.reshape(weight.shape),
    lambda ours, weight: ours.reshape(-1),
    outputs=0,
)
LINEAR = _matrix(turned=True)
CONV = _matrix(turned=False)
SWAPPED = _swapped(LINEAR)
SWAPPED_VECTOR = _swapped(VECTOR)
