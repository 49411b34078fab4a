"""The arrays of a checkpoint, through Orbax: in which folder, finite, laid out."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import processes
from gpt_jax.checkpoint import sealing
from gpt_jax.checkpoint.sealing import Damaged
from gpt_jax.checkpoint.tables import leaves, named, refuse_other

ALONE = ("params", "ema")  # top-level keys with a folder of their own
REST = "state"  # the folder of all other keys
# Orbax numbers its operations without a lock: two saves at once in one process may
# wait for each other's folders for five minutes, and then fail (seen with 0.12.8).
ONE_AT_A_TIME = threading.Lock()
FINITE = ("params", "ema", "opt_state")  # top-level keys that never hold NaN or Inf


def grouped(tree: Mapping) -> dict[str, Any]:
    """Returns what goes into which folder of a checkpoint."""
    items = {key: tree[key] for key in ALONE if key in tree}
    rest = {key: value for key, value in tree.items() if key not in ALONE}
    items |= {REST: rest} if rest else {}
    # Orbax refuses an item without arrays.
    return {key: value for key, value in items.items() if jax.tree.leaves(value)}


def snapshot(tree: Any) -> Any:
    """Returns a copy that later donation cannot touch.

    One process gathers everything to numpy. Several cannot, there Orbax copies what
    each process holds before it returns; on CPU it would alias, so copy first.
    """
    leaves = jax.tree.leaves(tree)
    if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves):
        raise ValueError("a typed random key cannot be saved; save its key_data")
    if jax.process_count() > 1:
        cpu = jax.default_backend() == "cpu"
        return jax.tree.map(lambda x: x.copy() if cpu else x, tree)
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    # On CPU numpy would look into JAX's own memory; elsewhere asarray is the copy.
    copy = np.array if jax.default_backend() == "cpu" else np.asarray
    # A numpy array cannot be donated; one as large as a model is not held twice.
    return jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else copy(x), tree)


def writer(target: Path, items: dict) -> Callable[[], None]:
    """Returns the function that finishes writing `items`, for a background thread."""
    if jax.process_count() > 1:  # Orbax's barriers belong on the calling thread
        _refuse_non_finite(items)
        ocp, context = _saving()
        with context:
            return ocp.save_checkpointables_async(str(target), items).result

    def write() -> None:
        _refuse_non_finite(items)
        ocp, context = _saving()
        with ONE_AT_A_TIME, context:
            ocp.save_checkpointables(str(target), items)

    return write


def _saving() -> tuple:
    from orbax.checkpoint import v1 as ocp  # takes a second or two to import

    # Weights hardly compress (8%), and compression competes with training for cores.
    context = ocp.Context()
    context.array.saving.use_compression = False
    # Made in its own threads, a folder that cannot be made keeps them (and the end of
    # the process) waiting for 20 minutes; this is a background thread already.
    context.asynchronous.create_directories_asynchronously = False
    context.memory.deepcopy_host_arrays = False  # `snapshot` has copied what may change
    return ocp, context


def _refuse_non_finite(items: Mapping) -> None:
    rows = {**items, **items.get(REST, {})}
    check_finite(named({key: rows[key] for key in FINITE if key in rows}))


def check_finite(named: list[tuple[str, Any]]) -> None:
    """Raises FloatingPointError where an array of (name, array) holds NaN or Inf."""
    found = [(name, x) for name, x in named if jnp.issubdtype(x.dtype, np.floating)]
    for name, finite in zip([name for name, _ in found], _finite(found), strict=True):
        if not finite:
            raise FloatingPointError(
                f"{name} holds NaN or Inf: this checkpoint was not saved"
            )


def _finite(found: list[tuple[str, Any]]) -> Any:
    """Returns which of the named arrays are finite; several processes ask together."""
    arrays = [x for _, x in found]
    if jax.process_count() == 1 or not arrays:
        return [np.isfinite(x).all() for x in arrays]
    return np.asarray(_each_finite(arrays))


@jax.jit
def _each_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays])


def load(
    found: Path,
    manifest: dict,
    abstract: Any,
    only: Sequence[str] | None = None,
) -> Any:
    """Returns the tree of a sealed folder, or of it what is under the keys `only`.

    Args:
      found: the folder.
      manifest: what its seal says of it.
      abstract: what is wanted, as ShapeDtypeStructs; None for what there is.
      only: top-level keys; None for all.

    Raises:
      Damaged: the files are not those that were sealed.
      ValueError: they hold another tree than the one wanted.
    """
    from orbax.checkpoint import v1 as ocp

    shape, abstract = abstract, None if abstract is None else mapping(abstract)
    if abstract is not None:
        refuse_other(f"{found} is", leaves(abstract), manifest["leaves"])
    items = {name.split("/")[0] for name in manifest["files"] if "/" in name}
    if only is not None:
        items &= {key if key in ALONE else REST for key in only}
    processes.first(lambda: sealing.verify(found, manifest, items), Damaged)
    context = ocp.Context()
    if abstract is None:
        # The sharding on the disk names the devices of the process that saved it.
        saved = ocp.checkpointables_metadata(str(found)).metadata
        wanted = {item: _place(saved[item], moved=True) for item in items}
        if only is not None and REST in wanted:
            context.pytree.loading.partial_load = True
            wanted[REST] = {k: v for k, v in wanted[REST].items() if k in only}
    else:
        wanted = _place(grouped(abstract), moved=False)
    with context:
        tree = ocp.load_checkpointables(str(found), wanted)
    rest = tree.pop(REST, {})
    if abstract is None:
        return {**tree, **rest}
    merged = {**abstract, **tree, **rest}  # what has no arrays is not on the disk
    return merged if isinstance(shape, Mapping) else type(shape)(**merged)


def mapping(tree: Any) -> Mapping:
    """Returns the top level of a tree as a mapping; a NamedTuple is one too."""
    return tree if isinstance(tree, Mapping) else tree._asdict()


def _place(tree: Any, *, moved: bool) -> Any:
    """Returns ShapeDtypeStructs; on this process's first device where not said."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def leaf(x) -> jax.ShapeDtypeStruct:
        sharding = None if moved else getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or here)

    return jax.tree.map(leaf, tree)
