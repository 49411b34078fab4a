"""What lives on which device: the mesh, and the two ways to run one train step.

`mesh` (the default) compiles the step once for all devices with `jax.jit`; SPLIT says
how each axis of a weight is split, arrays carry their placement and XLA inserts the
communication. `pmap` is plain data parallelism over one process's devices: the state is
copied to each, gradients are summed by an explicit `psum`. Both take the same
`train_step` and give the same losses.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax import files, names, weights
from gpt_jax.mesh import AXES, EXAMPLES
from gpt_jax.weights import Declared

ROWS = P(None, EXAMPLES)  # how batches [A, B, ...] lie

# Which axis of the mesh splits an axis of a weight (weights.AXES). Optimizer memory
# follows its weight. What `fsdp` splits is gathered before it is used (ZeRO:
# Rajbhandari et al. 2020); `tensor` splits heads, MLP columns and the vocabulary
# (Megatron-LM: Shoeybi et al. 2019, section 3).
SPLIT = {
    **{"embed": "fsdp", "inputs": "fsdp", "outputs": "fsdp"},
    **{"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"},
}
# Numbers of a state that are no weight's: every device has them.
COUNTERS = ("step", "count", "in_a_row", "total", "losses")
MAX_CPU_DEVICES = 8  # more host devices than this only add overhead


class Strategy(NamedTuple):
    """How one process places a state and runs a step over its devices.

    Attributes:
      mesh: the devices, with axes data, fsdp and tensor.
      declared: what the weights are (weights.py).
      compile: plain `train_step` (with its keyword `reduce` open) -> `Step`.
      layout: a tree of arrays or shapes -> where each is made or restored.
      place: a state laid out so, or on the host -> the same state on all devices.
      put: a host batch [A, B, ...] -> the batch on the devices, split over B; of
        several processes each gives its own `rows`.
      rows: how many examples a micro-batch has -> which of them this process gives.
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
    put: Callable[[Any], Any]
    rows: Callable[[int], list[int]]
    view: Callable[[Any], Any]
    spread: Callable[[jax.Array], jax.Array]


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


def set_cpu_devices(
    micro_batch: int,
    *,
    data: int,
    fsdp: int,
    tensor: int,
    cpu_devices: int,
    processes: int = 1,
) -> None:
    """Asks XLA for one CPU device per core, before JAX starts its backend.

    Element-wise work of XLA:CPU runs on one core per device, so data parallelism over
    the cores of one machine pays. The number is the largest divisor of `micro_batch`
    that is at most the number of usable cores and 8. Without effect when a backend
    runs already or when the platform is not a CPU.

    Args:
      micro_batch: examples in one micro-batch; 0 = none that devices would share.
      data, fsdp, tensor: the axes of the mesh; data -1 = choose.
      cpu_devices: the number to use in this process; 0 = choose.
      processes: how many processes share the mesh.
    """
    limit = min(files.cores(), MAX_CPU_DEVICES)
    chosen = 1
    if fsdp * tensor == 1:
        chosen = processes * _largest_divisor(micro_batch // processes, limit)
    all_of_them = max(data, chosen) * fsdp * tensor
    count = cpu_devices or math.ceil(all_of_them / processes)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend runs: its devices are used as they are
        return


def make_mesh(
    micro_batch: int, *, data: int, fsdp: int, tensor: int, cpu_devices: int
) -> Mesh:
    """Returns the mesh of devices, over all processes of the run.

    Args:
      micro_batch: examples in one micro-batch, which must divide over data x fsdp;
        0 = none that devices would share.
      data: devices along the data axis; -1 = all that are left (on a CPU: as many as
        divide `micro_batch`).
      fsdp: devices over which parameters are split, and examples too.
      tensor: devices over which matrices are split.
      cpu_devices: at most so many devices of a process on a CPU; 0 = all.

    Raises:
      ValueError: the axes ask for more devices than there are, or (with several
        processes) for fewer, or the batch does not divide.
    """
    check("mesh", data=data, fsdp=fsdp, tensor=tensor, cpu_devices=cpu_devices)
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    if on_cpu and cpu_devices:
        devices = [d for d in devices if _number_in_process(d, devices) < cpu_devices]
    axes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    found = lengths(micro_batch, len(devices), on_cpu=on_cpu, **axes)
    if jax.process_count() > 1 and math.prod(found) < len(devices):
        raise ValueError(
            f"mesh.data {found[0]} x fsdp {fsdp} x tensor {tensor} takes "
            f"{math.prod(found)} of {len(devices)} devices, but the processes of a "
            "run use all that they have: make batch_size / accumulate a multiple of "
            f"{len(devices) // tensor}, or begin with fewer devices"
        )
    return arranged(found, devices[: math.prod(found)])


def arranged(axes: tuple[int, int, int], devices: Sequence[Any]) -> Mesh:
    """Returns the mesh of these devices, neighbours on it near each other in fact.

    Of several slices of TPUs, which a slower network joins, the data axis goes from
    slice to slice, or `fsdp` where it does not divide. Devices that make no grid (some
    of a slice's) stand in their order.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    outer = [1, 1, 1]
    if slices > 1:
        crossing = next((i for i in (0, 1) if axes[i] % slices == 0), None)
        if crossing is None:
            raise ValueError(
                f"mesh.data {axes[0]} and mesh.fsdp {axes[1]} are no multiples of the "
                f"{slices} slices: one of them must go from slice to slice"
            )
        outer[crossing] = slices
    inner = [length // times for length, times in zip(axes, outer, strict=True)]
    try:
        if slices > 1:
            grid = mesh_utils.create_hybrid_device_mesh(
                inner, outer, devices, allow_split_physical_axes=True
            )
        else:
            grid = mesh_utils.create_device_mesh(
                axes, devices, allow_split_physical_axes=True
            )
    # Of a part of a slice it says so by any of these.
    except (ValueError, NotImplementedError, AssertionError):
        grid = np.array(devices).reshape(axes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def lengths(
    micro_batch: int, devices: int, *, on_cpu: bool, data: int, fsdp: int, tensor: int
) -> tuple[int, int, int]:
    """Returns how long the axes of a mesh of so many devices are.

    Says what `data` -1 means, and whether all fit; arguments and errors are those of
    `make_mesh`.
    """
    if data == -1:
        left = devices // (fsdp * tensor)
        data = _largest_divisor(micro_batch // fsdp, left) if on_cpu else max(1, left)
    if data * fsdp * tensor > devices:
        raise ValueError(
            f"mesh.data {data} x fsdp {fsdp} x tensor {tensor} asks for "
            f"{data * fsdp * tensor} devices but there are {devices}"
        )
    if micro_batch % (data * fsdp):
        raise ValueError(
            f"a micro-batch of {micro_batch} examples does not divide over "
            f"{data * fsdp} devices (mesh.data {data} x fsdp {fsdp}): make batch_size "
            "/ accumulate a multiple of it, or set mesh.data"
        )
    return data, fsdp, tensor


def spec(declared: Declared, path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns how the array at `path` is split over the mesh, by its axes: see SPLIT.

    Vectors as long as the residual stream are small and stay whole; so do fewer key and
    value heads than the tensor axis has devices, and what an optimizer keeps of a
    weight in another shape (row means, one number of a whole bias).

    Raises:
      ValueError: no layer declares such a weight, or an axis does not divide.
    """
    if path.rpartition("/")[2] in COUNTERS:
        return P()
    weight = weights.at(declared, path)
    if shape != weight.shape:
        return P()
    names = []
    for length, axis in zip(shape, weight.axes, strict=True):
        name = SPLIT.get(axis)
        whole = name == "fsdp" and weight.is_vector
        few = axis == "kv_heads" and length < mesh.shape["tensor"]
        names.append(None if whole or few else name)
        if names[-1] and length % mesh.shape[name]:
            cure = "set model.vocab_multiple" if axis == "vocab" else "make it smaller"
            raise ValueError(
                f"{path} {shape} does not divide over mesh.{name}={mesh.shape[name]}: "
                f"{length} is not a multiple of it; {cure}"
            )
    return P(*names) if any(names) else P()


def layout(declared: Declared, tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every array (or shape) of a tree; see `spec`."""

    def leaf(path, x) -> NamedSharding:
        words = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return NamedSharding(mesh, spec(declared, "/".join(words), x.shape, mesh))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def alone(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree of shardings that put everything on the mesh's first device."""
    where = NamedSharding(Mesh(mesh.devices.flat[:1], ("data",)), P())
    return jax.tree.map(lambda _: where, tree)


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
            return _put(np.array(x), where)

        return jax.tree.map(leaf, tree, layout(declared, tree, mesh))

    return Strategy(
        mesh=mesh,
        declared=declared,
        compile=compile,
        layout=partial(layout, declared, mesh=mesh),
        place=place,
        put=partial(join_rows, mesh=mesh),
        rows=partial(rows, mesh),
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
        put=put,
        rows=partial(rows, mesh),
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
    for name, axis in {"fsdp": fsdp, "tensor": tensor}.items():
        if axis < 1:
            raise ValueError(f"mesh.{name} is {axis}: it must be at least 1")
    if data == 0 or data < -1:
        raise ValueError(
            f"mesh.data is {data}: give a number of devices, or -1 for all"
        )
    if cpu_devices < 0:
        raise ValueError(f"mesh.cpu_devices is {cpu_devices}: 0 is all of them")


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
    return jax.tree.map(lambda x: _put(np.array(x), sharding), tree)


def split_rows(batch: Any, *, mesh: Mesh) -> Any:
    """Places a host batch [A, B, ...], the same in all processes, split over B."""
    where = NamedSharding(mesh, P(None, EXAMPLES))
    return jax.tree.map(lambda x: _put(x, where), batch)


def join_rows(batch: Any, *, mesh: Mesh) -> Any:
    """Places a host batch of which each process has its `rows` of B, split over B."""
    where = NamedSharding(mesh, P(None, EXAMPLES))
    if where.is_fully_addressable:
        return jax.device_put(batch, where)
    return jax.make_array_from_process_local_data(where, batch)


def _put(x: np.ndarray, where: NamedSharding) -> jax.Array:
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


def in_sight(tree: Any) -> contextlib.AbstractContextManager:
    """Returns a context in which programs see the mesh that weights lie on, if any."""
    where = jax.tree.leaves(tree)[0].sharding
    if isinstance(where, NamedSharding) and where.mesh.size > 1:
        return jax.sharding.use_abstract_mesh(where.mesh.abstract_mesh)
    return contextlib.nullcontext()


def lay_out(tree: Any, places: Any) -> Any:
    """Returns copies of arrays, each device's part of them on that device alone."""
    return jax.tree.map(lambda x, where: _put(np.array(x), where), tree, places)


def _number_in_process(device: Any, devices: list) -> int:
    """Returns how many devices of its process come before a device."""
    mine = [d for d in devices if d.process_index == device.process_index]
    return mine.index(device)


def _largest_divisor(n: int, limit: int) -> int:
    return max(d for d in range(1, max(1, limit) + 1) if n % d == 0)
