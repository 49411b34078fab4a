"""The mesh as a program sees it: the names of its axes, and how arrays lie on it.

A program is traced with the mesh in sight (`sharding.within`); without one, and under
`pmap` or a population, where each device works for itself, all of this does nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
EXAMPLES = ("data", "fsdp")  # the axes that examples are split over
ROWS, WHOLE = P(EXAMPLES), P()  # an array of examples; one that every device has
NONE = AbstractMesh((), ())  # no mesh: what is traced in its sight is for one device


def in_sight() -> Any:
    """Returns the mesh that the program is traced for, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if AxisType.Auto in mesh.axis_types else None


def platform() -> str:
    """Returns what the program is traced for: cpu, gpu or tpu.

    That is where the devices of the mesh in sight are, which need not be there; without
    one, the devices that JAX computes on.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def length(axis: str) -> int:
    """Returns how many devices an axis of the mesh in sight has; 1 without one."""
    mesh = in_sight()
    return mesh.shape[axis] if mesh else 1


def sharers() -> int:
    """Returns how many devices share the examples."""
    mesh = in_sight()
    return math.prod(mesh.shape[axis] for axis in EXAMPLES) if mesh else 1


def constrained(x, *axes):
    """Returns x split so over the mesh in sight, if one is.

    Left to itself, XLA may split the residual stream over its width, as the weights
    are, and move activations instead of weights. What does not divide is not split: a
    few rows of text that is written, few key and value heads.
    """
    mesh = in_sight()
    if mesh is None:
        return x

    def fitting(length, axis):
        names = (axis,) if isinstance(axis, str) else axis or ()
        return None if length % math.prod(mesh.shape[n] for n in names) else axis

    axes = [fitting(length, axis) for length, axis in zip(x.shape, axes, strict=False)]
    return jax.lax.with_sharding_constraint(x, P(*axes))


def by_examples(function: Callable, takes: tuple[P, ...], gives: Any) -> Callable:
    """Returns `function` run by each device on its own examples, where several share.

    Args:
      function: of arrays; what it returns for weights it has added up with `added`.
      takes: ROWS (an array that begins with the axis of examples) or WHOLE, of each.
      gives: the same of what it returns; `share` says how what is added up lies.
    """
    if sharers() == 1:
        return function
    where = {"in_specs": takes, "out_specs": gives, "axis_names": {*EXAMPLES}}
    return jax.shard_map(function, **where, check_vma=False)


def by_heads(function: Callable, *, heads: int, rows: int) -> Callable:
    """Returns `function` run by each device on its own examples and heads.

    Args:
      function: takes `heads` arrays [B, T, H, K], then `rows` arrays [B, ...], and
        returns one [B, T, H, K].
    """
    if in_sight() is None:
        return function
    split = P(EXAMPLES, None, "tensor")
    takes = (split,) * heads + (ROWS,) * rows
    where = {"in_specs": takes, "out_specs": split, "axis_names": {*AXES}}
    return jax.shard_map(function, **where, check_vma=False)


def added(x: jax.Array, axis: int) -> jax.Array:
    """Returns an array added up over the devices that share the examples.

    Each keeps its share of `axis`, as `share` says. For use within `by_examples`.
    """
    if sharers() == 1:
        return x
    if "fsdp" not in share(x.shape, axis):
        return jax.lax.psum(x, EXAMPLES)
    x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
    return jax.lax.psum(x, "data")


def share(shape: tuple[int, ...], axis: int) -> P:
    """Returns how an array that `added` has made lies."""
    mesh = in_sight()
    fsdp = mesh.shape["fsdp"] if mesh else 1
    names: list[str | None] = [None] * len(shape)
    if fsdp > 1 and shape[axis] % fsdp == 0:
        names[axis] = "fsdp"
    return P(*names)
