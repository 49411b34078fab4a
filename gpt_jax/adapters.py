"""Which weights move: an adapter splits the start weights and joins them again.

What does not move is `frozen["base"]`: held once, never donated to a step, stored once
in a run. A loss that compares with the start also finds `frozen["reference"]`, unless
the base says it all; `reference` returns the start weights from either.

Shapes: D inputs of a kernel  F outputs  R rank
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax import names, settings
from gpt_jax.weights import Declared, Weight, at

# Leaves beside a kernel, which model.Dense reads.
LEAVES, SCALE = ("lora_a", "lora_b", "lora_scale"), "kernel_scale"
HEAVY = r"(kernel|embedding)$"  # what frozen weights keep in another dtype
BASE_DTYPES = ("", "float32", "bfloat16", "int8")


class Adapter(NamedTuple):
    """A pair of pure functions over parameter trees, and what is in them.

    Attributes:
      split: (start weights, key) -> (params that train, frozen trees by name). Leaves
        are passed on, not copied.
      join: (params, frozen) -> the weights that the model is applied with.
      declared: what the weights are (weights.py), those of the adapter as well.
    """

    split: Callable[[Any, jax.Array], tuple[Any, dict[str, Any]]]
    join: Callable[[Any, dict[str, Any]], Any]
    declared: Declared


def full(declared: Declared) -> Adapter:
    """Every weight trains; nothing is frozen."""
    return Adapter(
        split=lambda weights, _: (weights, {}),
        join=lambda params, _: params,
        declared=declared,
    )


def only(declared: Declared, *, train: Sequence[str]) -> Adapter:
    """The weights whose path matches one of the regexes train; the rest is frozen.

    Raises:
      ValueError: (from split) none or all of the weights match.
    """

    def split(weights, key):
        del key
        flat = _flat(weights)
        moves = [path for path in flat if _matches(train, path)]
        if not moves or len(moves) == len(flat):
            many = "all" if moves else "none"
            raise ValueError(
                f"adapter.train {_shown(train)} matches {many} of the {len(flat)} "
                f"weights, such as {min(flat)}; correct it, or take adapter full"
            )
        frozen = {path: flat[path] for path in flat.keys() - {*moves}}
        return _nest({path: flat[path] for path in moves}), {"base": _nest(frozen)}

    def join(params, frozen):
        return _merged(frozen["base"], params)

    return Adapter(split, join, declared)


def lora(
    declared: Declared,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    base_dtype: str,
) -> Adapter:
    """Low-rank adaptation (Hu et al. 2021, section 4.1): W stays, A and B train.

    A layer with kernel W [D, F] computes x W + (x A) B * alpha / rank, with A [D, R]
    drawn from U(-1 / sqrt(D), 1 / sqrt(D)) and B [R, F] zero, so the first step begins
    with exactly the base. Kernels of heads lie flat here; scanned layers have a leading
    axis. What A reads is dropped by `hyper.dropout_adapter`, which is traced.

    Args:
      declared: what the weights are (weights.py).
      rank: R.
      alpha: the product's weight, times rank.
      targets: regexes of kernels of linear layers (not of an untied LM head).
      base_dtype: how frozen kernels and embeddings are kept; "" = as they come. int8
        is for the kernels of linear layers, see `quantise` (as in QLoRA, Dettmers et
        al. 2023, with eight bits for their four); embeddings stay as they come.

    Raises:
      ValueError: a number or dtype that cannot be; from split, targets that match no
        kernel or what is no kernel of a linear layer.
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(
            f"adapter.rank is {rank} and adapter.alpha {alpha}: both must be above 0"
        )
    names.choose("adapter.base_dtype", base_dtype, BASE_DTYPES)

    def split(weights, key):
        flat = _flat(weights)
        params = {}
        for path in _kernels(flat, declared, targets):
            counts, (D, F) = at(declared, path).counts, at(declared, path).sides
            layer, number = path.removesuffix("kernel"), zlib.crc32(path.encode())
            own = jax.random.fold_in(key, np.uint32(number))
            edge = 1 / math.sqrt(D)
            params[f"{layer}lora_a"] = jax.random.uniform(
                own, (*counts, D, rank), minval=-edge, maxval=edge
            )
            params[f"{layer}lora_b"] = jnp.zeros((*counts, rank, F))
        if base_dtype == "int8":
            base = quantise(weights, declared)
        elif base_dtype:
            base = _nest(
                {
                    path: x.astype(base_dtype) if re.search(HEAVY, path) else x
                    for path, x in flat.items()
                }
            )
        else:
            base = _nest(flat)
        return _nest(params), {"base": base}

    def join(params, frozen):
        scales = {
            path.removesuffix("lora_a") + "lora_scale": jnp.full(
                x.shape[:-2], alpha / rank, jnp.float32
            )
            for path, x in _flat(params).items()
            if path.endswith("/lora_a")
        }
        return _merged(frozen["base"], params, _nest(scales))

    return Adapter(split, join, beside(declared, rank))


def quantise(weights: Any, declared: Declared) -> Any:
    """Returns weights with int8 kernels and a `kernel_scale` for each of their outputs.

    A kernel's largest number of each output becomes 127; model.Dense multiplies what
    the int8 kernel gives by the scale. A quarter of the memory of float32.
    """
    flat, rounded = _flat(weights), {}
    for path, x in flat.items():
        weight = at(declared, path)
        if not _is_kernel(weight):
            rounded[path] = x
            continue
        x_DF = x.reshape(*weight.counts, *weight.sides).astype(jnp.float32)
        scale_F = jnp.maximum(jnp.abs(x_DF).max(-2), 1e-30) / 127
        small_DF = jnp.round(x_DF / scale_F[..., None, :]).astype(jnp.int8)
        rounded[path] = small_DF.reshape(x.shape)
        rounded[path.removesuffix("kernel") + SCALE] = scale_F
    return _nest(rounded)


def beside(declared: Declared, rank: int) -> dict[str, Weight]:
    """Returns the declarations and those of all that `lora` may put beside a kernel.

    Kernels of heads lie flat in them: `inputs` and `outputs` are all axes as one.
    """
    found = dict(declared)
    for path, weight in declared.items():
        if not _is_kernel(weight):
            continue
        layer = path.removesuffix("kernel")
        counts, (D, F) = weight.counts, weight.sides
        names = weight.axes[: len(counts)]
        for leaf, shape, axes, inputs in (
            ("lora_a", (D, rank), ("inputs", "rank"), 1),
            ("lora_b", (rank, F), ("rank", "outputs"), 1),
            ("lora_scale", (), (), 0),
            (SCALE, (F,), ("outputs",), 0),
        ):
            like = jax.ShapeDtypeStruct((*counts, *shape), jnp.float32)
            found[layer + leaf] = Weight(like, (*names, *axes), "bias", inputs)
    return found


def with_reference(weights: Any, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `frozen` with copies of those start weights that it does not hold yet.

    They are copies because the others train, and a step donates what trains.
    """
    held = _flat(frozen.get("base", {}))
    rest = {p: jnp.copy(x) for p, x in _flat(weights).items() if p not in held}
    return {**frozen, "reference": _nest(rest)} if rest else dict(frozen)


def reference(frozen: Mapping[str, Any]) -> Any:
    """Returns the weights that a run started from, as far as `frozen` holds them.

    With LoRA that is the base, without the adapter beside it.
    """
    return _merged(*(frozen[k] for k in ("base", "reference") if k in frozen))


def merge(weights: Any, dtype: str) -> Any:
    """Returns joined weights as plain ones: every adapter added into its kernel.

    For export and decoding. The sums are made in float32 and all weights come back as
    `dtype`. What was merged cannot be taken out of rounded numbers again; the base is
    kept for that: `reference`, or `unmerge` of weights that are joined but not merged.
    """
    flat, merged = _flat(weights), {}
    for path, x in flat.items():
        layer, _, name = path.rpartition("/")
        if name in (*LEAVES, SCALE):
            continue
        if name == "kernel" and f"{layer}/{SCALE}" in flat:
            scale_F = flat[f"{layer}/{SCALE}"][..., None, :]
            matrix = (*x.shape[: scale_F.ndim - 2], -1, scale_F.shape[-1])
            x = (x.reshape(matrix).astype(jnp.float32) * scale_F).reshape(x.shape)
        if name == "kernel" and f"{layer}/lora_a" in flat:
            a, b, scale = (flat[f"{layer}/{leaf}"] for leaf in LEAVES)
            product = jnp.matmul(a, b, precision="highest") * scale[..., None, None]
            x = x.astype(jnp.float32) + product.reshape(x.shape)
        merged[path] = x.astype(dtype)
    return _nest(merged)


def unmerge(weights: Any) -> Any:
    """Returns joined weights without the adapter: the base, bit for bit."""
    flat = _flat(weights)
    return _nest({p: x for p, x in flat.items() if p.rpartition("/")[2] not in LEAVES})


TABLE: dict[str, Callable[..., Adapter]] = {"full": full, "only": only, "lora": lora}
READS: dict[str, tuple[str, ...]] = {"lora": ("dropout_adapter",)}  # of Hyper


def make(declared: Declared, *, name: str, **options: Any) -> Adapter:
    """Returns the adapter called `name` of weights that are declared so.

    Raises:
      ValueError: there is no adapter of that name, or its options cannot be.
    """
    adapter = names.choose("adapter.name", name, TABLE)
    advice = (
        ": an adapter's keys come with the config's option, as in "
        f"--config=configs/sft.py:adapter={name} (in Python, "
        f"config.adapter = configs.common.adapter_{name}())"
    )
    wanted = settings.declared(adapter, without=("declared",))
    settings.fit("adapter", options, wanted, advice)
    for key in {"targets", "train"} & options.keys():
        _matches(options[key], "")
    return adapter(declared, **options)


def _kernels(
    flat: Mapping[str, Any], declared: Declared, targets: Sequence[str]
) -> list[str]:
    """Returns the paths that the targets match, all of them kernels of model.Dense."""
    found = sorted(path for path in flat if _matches(targets, path))
    if not found:
        raise ValueError(
            f"adapter.targets {_shown(targets)} matches none of the {len(flat)} "
            f"weights, such as {min(flat)}; correct it"
        )
    for path in found:
        if not _is_kernel(at(declared, path)):
            raise ValueError(
                f"adapter.targets matches {path}, which is not the kernel of a linear "
                "layer inside the model; narrow it, for example to "
                "'(query|value)/kernel$'"
            )
    return found


def _is_kernel(weight: Weight) -> bool:
    """Whether a weight is the kernel of a model.Dense; the untied LM head's is not."""
    return weight.linear and weight.inputs > 0


def _matches(patterns: Iterable[str], path: str) -> bool:
    try:
        return any(re.search(pattern, path) for pattern in patterns)
    except re.error as error:
        raise ValueError(
            f"{error.pattern!r} is not a regular expression: {error}"
        ) from error


def _shown(patterns: Iterable[str]) -> str:
    return ", ".join(map(repr, patterns)) or "(empty)"


def _merged(*trees: Any) -> Any:
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= _flat(tree)
    return _nest(flat)


def _flat(tree: Any) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")  # type: ignore[return-value]


def _nest(flat: Mapping[str, Any]) -> dict:
    return unflatten_dict(flat, sep="/")
