"""How each weight and each memory of it is split over a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax import weights
from gpt_jax.weights import Declared

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
