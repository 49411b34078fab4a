"""What a population runs on its devices, and how many members they can hold.

S slots: the members of a wave, filled up to a multiple of the devices; each device
holds S / devices of them and trains them without a word to the others.
K steps of one call  U different seeds  A micro-batches  B examples in one
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax import memory, sharding
from gpt_jax import mesh as meshes
from gpt_jax.train import Parts

STEPS = 16  # K, the most: a call costs as much as a step of a tiny model
MEMORY_SHARE = 0.8  # of the free memory that a population may fill

MEMBERS, ALL = P("data"), P()  # a first axis laid over the devices; a copy on each


def strategy(mesh: Mesh) -> sharding.Strategy:
    """Returns the strategy of a population: nothing is reduced over devices."""
    return sharding.Strategy(
        mesh=mesh,
        declared={},  # nothing is split
        compile=lambda step: jax.jit(partial(step, reduce=lambda tree: tree)),
        layout=partial(sharding.alone, mesh=mesh),
        place=lambda tree: jax.device_put(tree, NamedSharding(mesh, MEMBERS)),
        put=lambda batch: jax.device_put(batch, NamedSharding(mesh, ALL)),
        rows=lambda count: [*range(count)],  # of a batch every device needs all
        view=lambda tree: tree,
        spread=lambda matrices_NRC: matrices_NRC,
    )


def compile_steps(parts: Parts, hyper: Any, batch: Any, slots: int) -> Any:
    """Returns what `steps` returns, compiled."""
    run, arguments = steps(parts, hyper, batch, slots)
    return run.lower(*arguments).compile()


def steps(parts: Parts, hyper: Any, batch: Any, slots: int) -> tuple[Any, tuple]:
    """Returns (run, arguments): n <= K steps of all members, and the shapes they take.

    `run` is jitted: `(state, which, key, hyper, batches, n)`. The state is donated.
    Batches are [K, U, A, B, ...] and the member of slot s reads those of seed which[s].
    Comes back: the state after, and the sums and infos [S, K], zero from n on.

    Args:
      hyper: the numbers of one run, for their dtypes.
      batch: a `batches`, or its shapes.
      slots: S.
    """
    mesh = parts.strategy.mesh

    def train_one(member, batches, n):
        state, which, key, hyper = member
        frozen, moving = state.frozen, state._replace(frozen={})

        def body(i, carry):
            moving, seen = carry
            batch = jax.tree.map(lambda x: x[i, which], batches)
            state = moving._replace(frozen=frozen)
            state, *new = parts.step_fn(state, batch, key, hyper)
            write = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
            return state._replace(frozen={}), jax.tree.map(write, seen, new)

        first = jax.tree.map(lambda x: x[0, 0], batches)
        _, *shapes = jax.eval_shape(parts.step_fn, state, first, key, hyper)
        blank = jax.tree.map(lambda x: jnp.zeros((STEPS, *x.shape), x.dtype), shapes)
        moving, (sums, info) = jax.lax.fori_loop(0, n, body, (moving, blank))
        return moving, sums, info

    def train_all(state, which, key, hyper, batches, n):
        one = partial(train_one, batches=batches, n=n)
        moved, sums, info = over_members(one)((state, which, key, hyper))
        return moved._replace(frozen=state.frozen), sums, info

    mapped = jax.shard_map(
        train_all,
        mesh=mesh,
        in_specs=(MEMBERS,) * 4 + (ALL,) * 2,
        out_specs=MEMBERS,
        check_vma=False,  # the first values of a loop belong to no device
    )

    def laid(spec, x, *axes):
        return jax.ShapeDtypeStruct(
            (*axes, *x.shape), x.dtype, sharding=NamedSharding(mesh, spec)
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    member = (jax.eval_shape(parts.first, key), jnp.int32(0), key, hyper)
    shared = (batch, jnp.int32(0))
    arguments = (
        *jax.tree.map(lambda x: laid(MEMBERS, x, slots), member),
        *jax.tree.map(lambda x: laid(ALL, x), shared),
    )
    return jax.jit(mapped, donate_argnums=0), arguments


def over_members(one: Callable) -> Callable:
    """Returns the function that does `one` for all members of a device.

    A vmap fills the device. On a CPU they take turns instead: at width 192 that is a
    fifth faster, at width 32 as fast, and a member's bits depend on nobody.
    """
    if meshes.platform() == "cpu":
        return partial(jax.lax.map, one)
    return jax.vmap(one)


def compile_evaluation(parts: Parts) -> Callable:
    """Returns the jitted `(params, frozen, batch [1, B, ...], hyper) -> Sums [S]`.

    Members take turns on their device: a batch for evaluation fills it alone.
    """

    def sums(params, frozen, batch, hyper):
        batch = jax.tree.map(lambda x: x[0], batch)

        def one(member):
            params, frozen, hyper = member
            weights = parts.join(params, frozen)
            return parts.task.loss(weights, frozen, batch, None, hyper)

        return jax.lax.map(one, (params, frozen, hyper))

    mapped = jax.shard_map(
        sums,
        mesh=parts.strategy.mesh,
        in_specs=(MEMBERS, MEMBERS, ALL, MEMBERS),
        out_specs=MEMBERS,
        check_vma=False,
    )
    return jax.jit(mapped)


def gather(tree: Any, slots: np.ndarray, mesh: Mesh) -> Any:
    """Returns the given slots of every array, laid over the devices anew."""
    take = jax.jit(
        lambda tree, slots: jax.tree.map(lambda x: x[slots], tree),
        out_shardings=NamedSharding(mesh, MEMBERS),
    )
    return jax.block_until_ready(take(tree, slots))


def fit(slots: int, mesh: Mesh, compiled: Callable[[int], Any], most: float) -> int:
    """Returns the most slots, up to those asked for, that fit into memory.

    That is what is free and, on a CPU, at most `most` bytes.

    The compiler's own count decides, so what is compiled here is what will train; a
    smaller program is compiled only when the whole population does not fit.
    """
    devices = mesh.size
    free = MEMORY_SHARE * free_bytes(mesh.devices.flat[0], most)
    while slots > devices and (need := needed_bytes(compiled(slots), devices)) > free:
        smaller = int(slots * free / need) // devices * devices
        slots = max(devices, min(smaller, slots - devices))
    return slots


def needed_bytes(compiled: Any, devices: int) -> int:
    """Returns the memory of one device that a compiled program takes while it runs.

    The CPU devices of a machine share its memory, where a checkpoint's copies of the
    state lie too.
    """
    found = compiled.memory_analysis()
    if found is None:  # a backend that does not say
        return 0
    need = found.argument_size_in_bytes + found.temp_size_in_bytes
    need += found.output_size_in_bytes - found.alias_size_in_bytes
    if jax.default_backend() == "cpu":
        return devices * (need + 2 * found.argument_size_in_bytes)
    return need


def free_bytes(device: Any, most: float) -> float:
    """Returns the free memory of a device; of a CPU, what a process may still take."""
    free = memory.of_device(device)
    return min(most, free) if device.platform == "cpu" else free
