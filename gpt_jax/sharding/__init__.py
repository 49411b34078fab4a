"""What lives on which device: the two ways to run one train step.

`mesh` (the default) compiles the step once for all devices with `jax.jit`; SPLIT, in
rules.py, says how each axis of a weight is split, arrays carry their placement and XLA
inserts the communication. `pmap` is plain data parallelism over one process's devices:
the state is copied to each, gradients are summed by an explicit `psum`. Both take the
same `train_step` and give the same losses. mesh.py makes meshes, arrays.py moves them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax import names
from gpt_jax.mesh import AXES, EXAMPLES
from gpt_jax.sharding.arrays import (
    ROWS,
    in_sight,
    join_rows,
    lay_out,
    local,
    on_devices,
    replicate,
    rows,
    split_rows,
    wait_on_cpu,
)
from gpt_jax.sharding.mesh import (
    arranged,
    check_axes,
    lengths,
    make_mesh,
    set_cpu_devices,
)
from gpt_jax.sharding.rules import SPLIT, alone, layout, spec
from gpt_jax.weights import Declared

__all__ = [
    "AXES",
    "ROWS",
    "SPLIT",
    "TABLE",
    "P",
    "Step",
    "Strategy",
    "alone",
    "arranged",
    "check",
    "for_decoding",
    "in_sight",
    "join_rows",
    "lay_out",
    "layout",
    "lengths",
    "local",
    "make",
    "make_mesh",
    "mesh_strategy",
    "pmap_strategy",
    "replicate",
    "rows",
    "set_cpu_devices",
    "spec",
    "split_rows",
    "wait_on_cpu",
    "within",
]


class Strategy(NamedTuple):
    """How one process places a state and runs a step over its devices.

    Attributes:
      mesh: the devices, with axes data, fsdp and tensor.
      declared: what the weights are (weights.py).
      compile: plain `train_step` (with its keyword `reduce` open) -> `Step`.
      layout: a tree of arrays or shapes -> where each is made or restored.
      place: a state laid out so, or on the host -> the same state on all devices.
      rows: how many examples a micro-batch has -> which of them this process gives.
      put: a host batch [A, B, ...] of those examples -> the batch on the devices, split
        over B.
      view: a placed tree -> the same arrays on the mesh, each once: what checkpoints
        and evaluation read.
      spread: an array inside the step -> the same array, split over its first axis
        where that divides: divides work that all devices would repeat.
    """

    mesh: Mesh
    declared: Declared
    compile: Callable[[Callable], Any]
    layout: Callable[[Any], Any]
    place: Callable[[Any], Any]
    rows: Callable[[int], list[int]]
    put: Callable[[Any], Any]
    view: Callable[[Any], Any]
    spread: Callable[[jax.Array], jax.Array]

    def held(self, tree: Any, itemsize: int = 0) -> int:
        """Returns the bytes of a tree of shapes on one device, exactly.

        Args:
          tree: shapes of weights, or of what an optimizer keeps of them.
          itemsize: bytes of one number, whatever its dtype; 0 = as the dtype says.
        """
        parts = jax.tree.map(
            lambda x, place: (
                math.prod(place.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
            ),
            tree,
            self.layout(tree),
        )
        return sum(jax.tree.leaves(parts))


class Step(NamedTuple):
    """A jitted step that donates its state, all but the frozen trees of it.

    It is called as the plain step is. `lower` and `compile` are those of jax.jit.

    Attributes:
      run: jitted (or lowered, or compiled): (state without frozen, frozen, batch, key,
        hyper) -> (state without frozen, sums, info).
    """

    run: Any

    def __call__(self, state: Any, *rest: Any) -> tuple:
        moved, sums, info = self.run(state._replace(frozen={}), state.frozen, *rest)
        return moved._replace(frozen=state.frozen), sums, info

    def lower(self, state: Any, *rest: Any) -> "Step":
        return Step(self.run.lower(state._replace(frozen={}), state.frozen, *rest))

    def compile(self) -> "Step":
        return Step(self.run.compile())


def _apart(step: Callable) -> Callable:
    """Returns `step` with the frozen trees as an argument, as `Step.run` has them."""

    def run(state, frozen, *rest, **options):
        state, sums, info = step(state._replace(frozen=frozen), *rest, **options)
        return state._replace(frozen={}), sums, info

    return run


def within(mesh: Mesh, function: Callable) -> Callable:
    """Returns `function` traced with the mesh in sight: `model` looks for it."""

    def traced(*args, **options):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **options)

    return traced


def mesh_strategy(mesh: Mesh, declared: Declared) -> Strategy:
    """One jitted program over the mesh; the batch and the state are split."""

    def compile(step: Callable) -> Step:
        def run(*args):
            moved, sums, info = _apart(step)(*args, reduce=lambda tree: tree)
            placed = jax.lax.with_sharding_constraint(
                moved, layout(declared, moved, mesh)
            )
            return placed, sums, info

        # The state comes as `place` laid it out; a batch may be told by shapes alone.
        shardings = (None, None, NamedSharding(mesh, ROWS), None, None)
        jitted = jax.jit(within(mesh, run), in_shardings=shardings, donate_argnums=0)
        return Step(jitted)

    def spread(x: jax.Array) -> jax.Array:
        if x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(EXAMPLES)))

    def place(tree: Any) -> Any:
        def leaf(x, where):
            if isinstance(x, jax.Array) and x.sharding == where:
                return x
            # A real copy, also where the source lies on one of the devices:
            # `device_put` may hand back its buffer, and a step that donates it would
            # delete it.
            return on_devices(np.array(x), where)

        return jax.tree.map(leaf, tree, layout(declared, tree, mesh))

    return Strategy(
        mesh=mesh,
        declared=declared,
        compile=compile,
        layout=partial(layout, declared, mesh=mesh),
        place=place,
        rows=partial(rows, mesh),
        put=partial(join_rows, mesh=mesh),
        view=lambda placed: placed,
        spread=spread,
    )


def pmap_strategy(mesh: Mesh, declared: Declared) -> Strategy:
    """`jax.pmap` over the mesh's devices: each holds a copy of the state."""
    devices = list(mesh.devices.flat)
    n = len(devices)
    if jax.process_count() > 1:
        raise ValueError("mesh.strategy pmap is for one process; use mesh")
    if mesh.shape["data"] != n:
        raise ValueError(
            "mesh.strategy pmap splits examples alone: set mesh.fsdp and mesh.tensor "
            "to 1, or use mesh"
        )

    def compile(step: Callable) -> Step:
        def one(state, frozen, batch, key, hyper):
            # Each device draws dropout masks of its own.
            key = jax.random.fold_in(key, jax.lax.axis_index("data"))
            add = partial(jax.lax.psum, axis_name="data")
            return _apart(step)(state, frozen, batch, key, hyper, reduce=add)

        mapped = jax.pmap(
            one,
            axis_name="data",
            in_axes=(0, 0, 0, None, None),
            out_axes=(0, None, None),
            devices=devices,
            donate_argnums=0,
        )
        return Step(mapped)

    def put(batch: Any) -> Any:
        def split(x):  # [A, B, ...] -> [n, A, B / n, ...]
            a, b, *rest = x.shape
            return np.moveaxis(np.reshape(x, (a, n, b // n, *rest)), 1, 0)

        return jax.tree.map(split, batch)

    def place(tree: Any) -> Any:
        stacked = NamedSharding(Mesh(np.array(devices), ("data",)), P("data"))

        def copy(x):
            shards = [jax.device_put(np.asarray(x)[None], d) for d in devices]
            return jax.make_array_from_single_device_arrays(
                (n, *np.shape(x)), stacked, shards
            )

        return jax.tree.map(copy, tree)

    def view(placed: Any) -> Any:
        replicated = NamedSharding(mesh, P())

        def one(x):
            parts = [shard.data.reshape(x.shape[1:]) for shard in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(
                x.shape[1:], replicated, parts
            )

        return jax.tree.map(one, placed)

    return Strategy(
        mesh=mesh,
        declared=declared,
        compile=compile,
        layout=partial(alone, mesh=mesh),
        place=place,
        rows=partial(rows, mesh),
        put=put,
        view=view,
        spread=lambda x: x,  # pmap's devices each run the whole optimizer
    )


TABLE = {"mesh": mesh_strategy, "pmap": pmap_strategy}


def make(
    micro_batch: int, declared: Declared, *, strategy: str, **axes: int
) -> Strategy:
    """Returns the strategy called `strategy` over the mesh that `axes` describe.

    Raises:
      ValueError: unknown strategy, or axes that do not fit (see `make_mesh`).
    """
    check(strategy, **axes)
    return TABLE[strategy](make_mesh(micro_batch, **axes), declared)


def check(
    strategy: str, *, data: int, fsdp: int, tensor: int, cpu_devices: int
) -> None:
    """Raises ValueError for a mesh that no machine has; looks at no device."""
    names.choose("mesh.strategy", strategy, TABLE)
    check_axes(data=data, fsdp=fsdp, tensor=tensor, cpu_devices=cpu_devices)


def for_decoding(tree: Any, strategy: Strategy) -> Any:
    """Returns weights as text is written with them.

    That is on one device; or, where the mesh has a `tensor` axis, split over it alone,
    on as many devices: nothing is gathered for each token. Several processes write
    the same text, each on a device of its own.
    """
    few = strategy.mesh.devices[:1, :1]
    if few.size == 1 or jax.process_count() > 1:
        return local(tree)
    smaller = Mesh(few, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.device_put(tree, layout(strategy.declared, tree, smaller))
