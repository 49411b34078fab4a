"""How weights lie: stacked for scanned layers, one by one, turned for one row."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax import weights
from gpt_jax.model.architecture import GPTConfig
from gpt_jax.weights import Declared


def stack(params: Mapping[str, Any], cfg: GPTConfig) -> dict:
    """Returns block_0, block_1, ... as blocks/kind_j [n_periods, ...].

    Layer p * P + j of a pattern of P kinds becomes entry p of kind_j; layers after
    the last whole period stay as they are. Lossless; a stacked tree is returned as is.
    """
    P, n = len(cfg.pattern), cfg.n_scanned
    if "blocks" in params or not n:
        return dict(params)
    blocks = {}
    for j in range(P):
        layers = [params[f"block_{i}"] for i in range(j, n, P)]
        blocks[f"kind_{j}"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    moved = {f"block_{i}" for i in range(n)}
    return {k: v for k, v in params.items() if k not in moved} | {"blocks": blocks}


def unstack(params: Mapping[str, Any], cfg: GPTConfig) -> dict:
    """Returns blocks/kind_j as block_0, block_1, ...: the inverse of `stack`."""
    if "blocks" not in params:
        return dict(params)
    P = len(cfg.pattern)
    flat = {k: v for k, v in params.items() if k != "blocks"}
    for i in range(cfg.n_scanned):
        p, j = divmod(i, P)
        flat[f"block_{i}"] = jax.tree.map(
            lambda x, p=p: x[p], params["blocks"][f"kind_{j}"]
        )
    return flat


def rounded(params: Mapping[str, Any], declared: Declared, dtype: Any) -> Any:
    """Returns weights with kernels and tables as products read them, of `dtype`.

    Decoding would round them anew for every token, and so read four times as much. The
    numbers are the same: what is added to activations in float32 stays as it is. A tree
    without anything to round is returned as is.
    """
    leaves: dict[str, Any] = flatten_dict(params, sep="/")  # type: ignore[assignment]
    wide = [
        path
        for path, leaf in leaves.items()
        if path in declared and not declared[path].is_vector and leaf.dtype == "float32"
    ]
    narrow = {path: leaves[path].astype(dtype) for path in wide}
    return unflatten_dict({**leaves, **narrow}, sep="/") if wide else params


def for_one_row(params: Mapping[str, Any], declared: Declared) -> dict:
    """Returns unstacked weights with kernels as `transposed` [outputs, inputs].

    On a CPU one row times a matrix is a series of dot products along the rows of
    memory: 1.5 times as fast as adding up the rows of `kernel`. With eight rows it is
    the other way round. Kernels of several matrices stay. A tree that is already so is
    returned as is.
    """
    leaves: dict[str, Any] = flatten_dict(params, sep="/")  # type: ignore[assignment]
    turned = {}
    for path, leaf in leaves.items():
        layer, _, name = path.rpartition("/")
        weight = weights.at(declared, path) if name == "kernel" else None
        if weight and not weight.counts:
            turned[f"{layer}/transposed"] = leaf.reshape(weight.sides).T
        else:
            turned[path] = leaf
    return unflatten_dict(turned, sep="/")
