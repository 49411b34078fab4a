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
    """Three functions that belong together.

    Attributes:
      shape: our weight -> the shape of theirs.
      read: (theirs, our weight) -> ours; a view where it can be.
      write: (ours, our weight) -> theirs; read's inverse, bit for bit.
    """

    shape: Callable[[Weight], Shape]
    read: Callable[[np.ndarray, Weight], np.ndarray]
    write: Callable[[np.ndarray, Weight], np.ndarray]


class Row(NamedTuple):
    """Where one of our weights is.

    Attributes:
      ours: its path; {i} is the layer.
      theirs: the tensor's name, without the family's prefix.
      layout: how it lies there.
      part: which of `parts` equal shares of the tensor's outputs (its last axis, by
        GPT-2's layout) it is.
      parts: how many of our weights the tensor holds.
    """

    ours: str
    theirs: str
    layout: Layout
    part: int = 0
    parts: int = 1


def _matrix(turned: bool) -> Layout:
    def shape(weight):
        return weight.sides[::-1] if turned else weight.sides

    def read(theirs, weight):
        return (theirs.T if turned else theirs).reshape(weight.shape)

    def write(ours, weight):
        flat = ours.reshape(weight.sides)
        return flat.T if turned else flat

    return Layout(shape, read, write)


def _swapped(layout: Layout) -> Layout:
    """The same with the two halves of every head exchanged."""

    def swap(x):
        return np.roll(x, x.shape[-1] // 2, axis=-1)

    return Layout(
        layout.shape,
        lambda theirs, weight: swap(layout.read(theirs, weight)),
        lambda ours, weight: layout.write(swap(ours), weight),
    )


EMBEDDING = Layout(
    lambda weight: weight.shape,
    lambda theirs, weight: theirs,
    lambda ours, weight: ours,
)
VECTOR = Layout(
    lambda weight: (math.prod(weight.shape),),
    lambda theirs, weight: theirs.reshape(weight.shape),
    lambda ours, weight: ours.reshape(-1),
)
LINEAR = _matrix(turned=True)
CONV = _matrix(turned=False)
SWAPPED = _swapped(LINEAR)
SWAPPED_VECTOR = _swapped(VECTOR)
