"""Arrays moved: to the devices of a mesh, and from them to one."""

import contextlib
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax.mesh import EXAMPLES

ROWS = P(None, EXAMPLES)  # how batches [A, B, ...] lie


def rows(mesh: Mesh, count: int) -> list[int]:
    """Returns which of `count` examples this process's devices hold, in order."""
    parts = NamedSharding(mesh, P(EXAMPLES)).addressable_devices_indices_map((count,))
    mine = [range(count)[part[0]] for part in parts.values() if part]
    return sorted({row for part in mine for row in part})


def replicate(tree: Any, *, mesh: Mesh) -> Any:
    """Copies every array of a tree to all devices of the mesh.

    A real copy, also where the source lives on one of them: `jax.device_put` may hand
    back the same buffer, and a step that donates it would delete the original.
    """
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(lambda x: on_devices(np.array(x), sharding), tree)


def split_rows(batch: Any, *, mesh: Mesh) -> Any:
    """Places a host batch [A, B, ...], the same in all processes, split over B."""
    where = NamedSharding(mesh, P(None, EXAMPLES))
    return jax.tree.map(lambda x: on_devices(x, where), batch)


def join_rows(batch: Any, *, mesh: Mesh) -> Any:
    """Places a host batch of which each process has its `rows` of B, split over B."""
    where = NamedSharding(mesh, P(None, EXAMPLES))
    if where.is_fully_addressable:
        return jax.device_put(batch, where)
    return jax.make_array_from_process_local_data(where, batch)


def on_devices(x: np.ndarray, where: NamedSharding) -> jax.Array:
    """Places an array that every process has; each fills its own devices."""
    if where.is_fully_addressable:
        return jax.device_put(x, where)
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])


def wait_on_cpu(tree: Any) -> None:
    """Waits for arrays when they live on a CPU.

    Un-synced programs with an all-reduce over several CPU devices can deadlock when
    cores are few, and there is no transfer to overlap with: waiting costs nothing.
    """
    if next(iter(jax.tree.leaves(tree)[0].devices())).platform == "cpu":
        jax.block_until_ready(tree)


def local(tree: Any) -> Any:
    """Returns the arrays on one device: its copy, or gathered where they are split."""
    first = jax.local_devices()[0]

    def leaf(x):
        if x.is_fully_replicated:
            return x.addressable_data(0)
        if not x.is_fully_addressable:  # every process gathers it
            return jax.device_put(process_allgather(x, tiled=True), first)
        return jax.device_put(np.asarray(x), first)

    return jax.tree.map(leaf, tree)


def in_sight(tree: Any) -> contextlib.AbstractContextManager:
    """Returns a context in which programs see the mesh that weights lie on, if any."""
    where = jax.tree.leaves(tree)[0].sharding
    if isinstance(where, NamedSharding) and where.mesh.size > 1:
        return jax.sharding.use_abstract_mesh(where.mesh.abstract_mesh)
    return contextlib.nullcontext()


def lay_out(tree: Any, places: Any) -> Any:
    """Returns copies of arrays, each device's part of them on that device alone."""
    return jax.tree.map(lambda x, where: on_devices(np.array(x), where), tree, places)
