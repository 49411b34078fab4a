"""What a weight is: its axes by name, how many of them it reads, how it is first drawn.

A layer declares each of its weights once, where it makes it, with `param`. All that
splits, draws, optimises, adapts, rounds, stacks, exports or counts weights reads the
declaration: `declared` collects them by path, `at` finds the one of a path.

Paths are full words and a public format: block_0/attn/query/kernel [D, H, K] and,
where layers are scanned, blocks/kind_0/attn/query/kernel [n, D, H, K].

Axes: embed    the residual stream         vocab    tokens
      heads    query heads                 kv_heads key and value heads
      head     features of a head          mlp      features inside the MLP
      position places in the context       classes  of a classifier
      layers   scanned layers              experts  of a mixture
      rank     of an adapter               inputs, outputs  of a kernel, as one axis
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict

AXES = (
    *("embed", "vocab", "heads", "kv_heads", "head", "mlp", "position", "classes"),
    *("layers", "experts", "rank", "inputs", "outputs"),
)
COUNTS = ("layers", "experts")  # axes that count weights instead of being a side of one

# How a weight is first drawn, which `model.initializers` knows for each preset.
DRAWS = (
    *("kernel", "residual", "head", "embedding"),
    *("bias", "residual_bias", "scale", "shift"),
)


@struct.dataclass
class Weight(nn.meta.AxisMetadata):
    """A declaration round the array, or the shape, that it is about.

    Flax takes the array out of it wherever a module reads the weight.

    Attributes:
      value: an array or a shape with a dtype.
      axes: the name of each axis, of AXES.
      draw: how it is first drawn, of DRAWS.
      inputs: how many axes a kernel reads, after those that count; 0 = no matrix.
      fan_in: how many numbers make one output of the layer.
      linear: whether the layer is a Dense, which reads what an adapter puts beside it.
    """

    value: Any
    axes: tuple[str, ...] = struct.field(pytree_node=False)
    draw: str = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False, default=0)
    fan_in: int = struct.field(pytree_node=False, default=0)
    linear: bool = struct.field(pytree_node=False, default=False)

    def unbox(self) -> Any:
        """Returns the array."""
        return self.value

    def replace_boxed(self, val: Any) -> "Weight":
        """Returns the declaration round another array."""
        return replace(self, value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Weight":
        """Flax's scan would stack layers: they are declared unrolled, see `stacked`."""
        raise AssertionError("layers are declared one by one")

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Weight":
        """As `add_axis`."""
        raise AssertionError("layers are declared one by one")

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis."""
        return self.value.shape

    @property
    def counts(self) -> tuple[int, ...]:
        """The lengths of the leading axes that count weights."""
        leading = itertools.takewhile(lambda axis: axis in COUNTS, self.axes)
        return self.shape[: len([*leading])]

    @property
    def is_vector(self) -> bool:
        """Whether it is small: a bias or a scale, neither a kernel nor a table."""
        return not self.inputs and self.draw != "embedding"

    @property
    def sides(self) -> tuple[int, int]:
        """What one matrix reads and what it gives: (D, F) of a kernel [*D, *F]."""
        own = self.shape[len(self.counts) :]
        return math.prod(own[: self.inputs]), math.prod(own[self.inputs :])

    def stacked(self, count: int) -> "Weight":
        """Returns the declaration of `count` such weights of scanned layers."""
        shape = (count, *self.shape)
        value = jax.ShapeDtypeStruct(shape, self.value.dtype)
        return replace(self, value=value, axes=("layers", *self.axes))


Declared = Mapping[str, Weight]


def param(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    draw: str,
    dtype: Any,
    inputs: int = 0,
    fan_in: int = 0,
    linear: bool = False,
) -> Any:
    """Declares a weight of a module and returns it; see `Weight` for the arguments."""
    assert len(axes) == len(shape) and {*axes} <= {*AXES}, (name, axes, shape)
    assert draw in DRAWS, (name, draw)

    def declare(key) -> Weight:
        del key  # `model.init` draws first values, of this declaration
        zeros = jnp.zeros(shape, dtype)
        return Weight(zeros, axes, draw, inputs, fan_in, linear)

    return module.param(name, declare)


def declared(init: Callable[..., Any], *args: Any) -> dict[str, Weight]:
    """Returns every weight of a Linen module by its path, as shapes.

    Args:
      init: the module's `init`, which is traced.
      *args: what it takes: a key and the module's arguments.

    Raises:
      ValueError: a weight was made without a declaration.
    """
    tree = jax.eval_shape(init, *args)["params"]
    flat: dict[str, Any] = flatten_dict(tree, sep="/")  # type: ignore[assignment]
    for path, weight in flat.items():
        if not isinstance(weight, Weight):
            raise ValueError(
                f"the weight {path} {weight.shape} says nothing of its axes: make it "
                "with weights.param"
            )
    return flat


def at(table: Declared, path: str) -> Weight:
    """Returns the declaration of the weight whose path `path` is, or ends with.

    So what an optimizer keeps of a weight, under longer paths, is found as well.

    Raises:
      ValueError: there is none.
    """
    rest = path
    while rest not in table:
        _, slash, rest = rest.partition("/")
        if not slash:
            raise ValueError(
                f"{path} is no weight that a layer declares (weights.param), such as "
                f"{min(table, default='none')}"
            )
    return table[rest]
