"""LoRA adapters as the library PEFT keeps them, in and out.

A folder holds adapter_config.json and adapter_model.safetensors, with two matrices for
each linear layer that it changes: lora_A [rank, inputs] and lora_B [outputs, rank]. The
layer computes x W.T + (x A.T) B.T * scale, where scale is lora_alpha / r (Hu et al.
2021), or lora_alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).

Where a published model keeps several of our kernels in one tensor, as GPT-2 does, the
adapters of the parts become one of the whole: its A holds theirs, its B is in blocks.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import config_json, files, weights
from gpt_jax.pretrained.layouts import Row
from gpt_jax.weights import Weight

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, LEAVES = "base_model.model.", ("lora_A", "lora_B")
# Keys of adapter_config.json that change nothing once the matrices are there.
HARMLESS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "peft_version"),
    *("auto_mapping", "inference_mode", "lora_dropout", "fan_in_fan_out", "r"),
    *("lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core"),
    *("qalora_group_size", "bias", "init_lora_weights", "runtime_config"),
}
# Ways to begin that change the weights of the base, to which the adapter then belongs.
STARTS = (True, False, "gaussian", "orthogonal", None)


class Adapter(NamedTuple):
    """What a folder holds, as an adapter of ours.

    Attributes:
      params: lora_a and lora_b beside the kernels that they change, layers unrolled.
      rank: of all of them.
      alpha: their products are multiplied by alpha / rank.
      targets: regexes of those kernels.
    """

    params: dict
    rank: int
    alpha: float
    targets: tuple[str, ...]


def base_of(folder: Path) -> str:
    """Returns the model that an adapter's config names as its base; "" = none.

    Raises:
      ValueError: the folder holds no adapter.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no adapter of PEFT: it has no {CONFIG}")
    return files.read_json(folder / CONFIG).get("base_model_name_or_path") or ""


# ---------------------------------------------------------------- out


def save(folder: Path, params: Mapping, cfg: GPTConfig, *, base: str) -> None:
    """Writes an adapter that PEFT loads.

    Args:
      folder: exists.
      params: the weights with the adapter beside them, not merged; layers unrolled.
      cfg: their model.
      base: what adapter_config.json names as the base; "" = nothing.

    Raises:
      ValueError: there is no adapter, or it is beside a weight that transformers has
        not; or no architecture of transformers computes this model.
    """
    ours, config = dict(weights.flat(params)), config_json.config_of(cfg)
    layers = {p.removesuffix("/lora_a") for p in ours if p.endswith("/lora_a")}
    if not layers:
        raise ValueError(
            "this run has no LoRA adapter to write: tune with adapter=lora, or write "
            "the whole model with --to_hf"
        )
    family = config_json.of_config(config)
    declared = weights.unrolled(config_json.with_biases(cfg))
    tensors, scales = {}, {}
    modules = set()
    for name, group in weights.groups(family, declared).items():
        if not declared[group[0][0]].linear:
            continue
        module = name.removesuffix(".weight")
        modules.add(module)
        own = [(path.removesuffix("/kernel"), row) for path, row in group]
        if not layers & {layer for layer, _ in own}:
            continue
        layers -= {layer for layer, _ in own}
        a_RD, b_FR = _joined(own, ours, declared)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a_RD}
        tensors |= {f"{PREFIX}{module}.lora_B.weight": b_FR}
        (scale,) = {
            float(ours[f"{layer}/lora_scale"])
            for layer, _ in own
            if f"{layer}/lora_scale" in ours
        }
        scales[module] = len(a_RD), scale
    if layers:
        raise ValueError(f"transformers has no layer for the adapter of {min(layers)}")
    rank = Counter(rank for rank, _ in scales.values()).most_common(1)[0][0]
    scale = next(scale for _, scale in scales.values())
    other = {module: r for module, (r, _) in scales.items() if r != rank}
    about = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True},
        **{"base_model_name_or_path": base or None, "bias": "none", "r": rank},
        **{"lora_alpha": _plain(scale * rank), "lora_dropout": 0.0},
        "fan_in_fan_out": family.model_type == "gpt2",  # Conv1D
        "target_modules": _targets({*scales}, modules),
        "rank_pattern": other,
        "alpha_pattern": {module: _plain(scale * r) for module, r in other.items()},
        **{"modules_to_save": None, "use_rslora": False, "use_dora": False},
        "init_lora_weights": True,
    }
    (folder / CONFIG).write_text(json.dumps(about, indent=1), encoding="utf-8")
    names = {name: ("F32", value.shape) for name, value in tensors.items()}
    files.write(folder / TENSORS, names, tensors.__getitem__)


def _plain(number: float) -> float | int:
    """Returns a whole number as one: PEFT's alpha is."""
    return int(number) if number == int(number) else number


Layers = list[tuple[str, Row]]


def _joined(
    own: Layers, ours: Mapping, declared: Mapping[str, Weight]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [R, D] and B [F, R] of the tensor that these layers share."""
    a, b = {}, {}
    for layer, row in own:
        if f"{layer}/lora_a" not in ours:
            continue
        a[layer] = np.asarray(ours[f"{layer}/lora_a"], np.float32).T
        b[layer] = _their_b(ours[f"{layer}/lora_b"], row, declared[f"{layer}/kernel"])
    same = [found.tobytes() for found in a.values()]
    one = len(own) == len(same) and len({*same}) == 1  # as an import has it
    rank = len(next(iter(a.values()))) if one else sum(map(len, a.values()))
    parts, first = [], 0
    for layer, _ in own:
        width = declared[f"{layer}/kernel"].sides[1]
        part_FR = np.zeros((width, rank), np.float32)
        if layer in b:
            own_rank = b[layer].shape[1]
            part_FR[:, first : first + own_rank] = b[layer]
            first += 0 if one else own_rank
        parts.append(part_FR)
    a_RD = next(iter(a.values())) if one else np.concatenate([*a.values()])
    layer, row = own[0]
    return a_RD, row.join(parts, declared[f"{layer}/kernel"], axis=0)


def _like(weight: Weight, rank: int) -> Weight:
    """Returns the declaration of a kernel of `rank` inputs with the same outputs."""
    shape = (rank, *weight.shape[weight.inputs :])
    axes = ("rank", *weight.axes[weight.inputs :])
    value = np.empty(shape, np.float32)
    return replace(weight, value=value, axes=axes, inputs=1, fan_in=rank)


def _their_b(b_RF: Any, row: Row, weight: Weight) -> np.ndarray:
    """Returns B [F, R], its outputs in the order of the tensor's."""
    array = np.asarray(b_RF, np.float32)
    like = _like(weight, len(array))
    found = row.layout.write(array.reshape(like.shape), like)
    return found if row.layout.outputs == 0 else found.T


def _our_b(b_FR: np.ndarray, row: Row, weight: Weight) -> np.ndarray:
    """Returns B [R, F], undoing `_their_b`."""
    like = _like(weight, b_FR.shape[1])
    found = row.layout.read(b_FR if row.layout.outputs == 0 else b_FR.T, like)
    return np.ascontiguousarray(found.reshape(like.sides))


def _targets(chosen: set[str], modules: set[str]) -> list[str]:
    """Returns the shortest endings that name these modules and no others."""
    found = set()
    for module in chosen:
        words = module.split(".")
        for n in range(1, len(words) + 1):
            end = ".".join(words[-n:])
            ends = {m for m in modules if m == end or m.endswith(f".{end}")}
            if ends <= chosen:
                found.add(end)
                break
    return sorted(found)


# ---------------------------------------------------------------- in


def load(folder: Path, cfg: GPTConfig) -> Adapter:
    """Returns the adapter in a folder, for a model.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      cfg: the model of its base.

    Raises:
      ValueError: a file is damaged, the adapter is not LoRA or does what we do not
        (DoRA, biases, whole modules, ...), or it is of another model.
    """
    base_of(folder)  # refuses what is none
    about = files.read_json(folder / CONFIG)
    _check(about, folder)
    path = folder / TENSORS
    if not path.is_file():
        raise ValueError(f"{folder} has no {TENSORS}: pickle files are not read")
    found = files.header(path)
    family = config_json.of_config(config_json.config_of(cfg))
    declared = weights.unrolled(cfg)
    kernels = {
        name.removesuffix(".weight"): group
        for name, group in weights.groups(family, declared).items()
        if declared[group[0][0]].linear and name.endswith(".weight")
    }
    pairs: dict[str, dict[str, Any]] = {}
    for name, tensor in found.items():
        known = re.fullmatch(rf"(.*)\.({'|'.join(LEAVES)})\.weight", name)
        module = known[1].removeprefix(PREFIX) if known else ""
        if known is None or module not in kernels:
            raise ValueError(
                f"{path} has the tensor {name}, which belongs to no linear layer of "
                f"this {family.model_type} of {cfg.n_layers} layers"
            )
        if tensor.kind not in files.DTYPES:
            raise ValueError(
                f"tensor {name} in {path} is of {tensor.kind}; supported: "
                f"{', '.join(files.DTYPES)}"
            )
        pairs.setdefault(module, {})[known[2]] = tensor
    flat: dict[str, np.ndarray] = {}
    scales: dict[str, float] = {}
    for module, pair in pairs.items():
        scale, own = _scale(about, module), kernels[module]
        for path_, kernel in _cut(pair, own, declared, module, folder).items():
            layer = path_.removesuffix("kernel")
            flat[f"{layer}lora_a"], flat[f"{layer}lora_b"] = kernel
            scales[layer] = scale
    if not flat:
        raise ValueError(f"{path} holds no adapter")
    rank = max(a.shape[1] for name, a in flat.items() if name.endswith("lora_a"))
    common = Counter(scales.values()).most_common(1)[0][0]
    for layer, scale in scales.items():  # one alpha / rank is all that a run has
        if scale != common:
            flat[f"{layer}lora_b"] = flat[f"{layer}lora_b"] * np.float32(scale / common)
        flat[f"{layer}lora_a"], flat[f"{layer}lora_b"] = _wider(
            flat[f"{layer}lora_a"], flat[f"{layer}lora_b"], rank
        )
    layers = [f"{layer}kernel" for layer in scales]
    linear = [path for path, weight in declared.items() if weight.linear]
    params = unflatten_dict(flat, sep="/")
    return Adapter(params, rank, common * rank, _regexes(layers, linear))


def _check(about: Mapping[str, Any], folder: Path) -> None:
    kind = about.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} is an adapter of the kind {kind}; LORA is read")
    for key, value in about.items():
        fine = key in HARMLESS or not value
        fine = fine and (key != "bias" or value in (None, "none"))
        if not (fine and (key != "init_lora_weights" or value in STARTS)):
            raise ValueError(
                f"{folder / CONFIG} has {key} = {value!r:.80}, which is not supported"
            )


def _scale(about: Mapping[str, Any], module: str) -> float:
    """Returns what the product of a module's matrices is multiplied by."""

    def own(key: str, pattern: str) -> Any:
        for name, value in (about.get(pattern) or {}).items():
            try:
                fits = re.fullmatch(rf"(.*\.)?({name})", module)
            except re.error as error:
                raise ValueError(f"{CONFIG} has the {pattern} {name!r}") from error
            if fits:
                return value
        return about.get(key, 8)  # PEFT's default of both

    rank, alpha = own("r", "rank_pattern"), own("lora_alpha", "alpha_pattern")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ValueError(f"{CONFIG} has r = {rank!r} and lora_alpha = {alpha!r}")
    return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)


def _cut(
    pair: Mapping[str, Any],
    own: list[tuple[str, Row]],
    declared: Mapping[str, Weight],
    module: str,
    folder: Path,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns (lora_a, lora_b) of each kernel that a module's tensor holds."""
    inputs = declared[own[0][0]].sides[0]
    outputs = sum(declared[path].sides[1] for path, _ in own)
    shapes = [pair[leaf].shape if leaf in pair else None for leaf in LEAVES]
    rank = shapes[0][0] if shapes[0] else 0
    if shapes != [(rank, inputs), (outputs, rank)] or not rank:
        raise ValueError(
            f"{folder}: the matrices of {module} are {shapes[0]} and {shapes[1]}, but "
            f"they should be (rank, {inputs}) and ({outputs}, rank)"
        )
    a_RD, b_FR = (np.asarray(pair[leaf].read(), np.float32) for leaf in LEAVES)
    if not (np.isfinite(a_RD).all() and np.isfinite(b_FR).all()):
        raise ValueError(f"{folder}: the matrices of {module} hold NaN or Inf")
    found, first = {}, 0
    for path, row in own:
        weight = declared[path]
        part_FR = row.cut(b_FR, weight, first, axis=0)
        first += weight.sides[1]
        found[path] = np.ascontiguousarray(a_RD.T), _our_b(part_FR, row, weight)
    return found


def _wider(a_DR: np.ndarray, b_RF: np.ndarray, rank: int):
    """Returns matrices of a higher rank with the same product."""
    more = rank - len(b_RF)
    if not more:
        return a_DR, b_RF
    return np.pad(a_DR, ((0, 0), (0, more))), np.pad(b_RF, ((0, more), (0, 0)))


def _regexes(paths: list[str], every: list[str]) -> tuple[str, ...]:
    """Returns regexes that match these kernels and no others, few where they can be."""
    kinds: dict[str, set[str]] = {}
    for path in every:
        kinds.setdefault(re.sub(r"^block_\d+/", "", path), set()).add(path)
    found = []
    for kind, all_of_it in kinds.items():
        here = sorted(all_of_it & {*paths})
        if len(here) == len(all_of_it):
            found.append(f"(^|/){re.escape(kind)}$")
        else:
            found += [f"^{re.escape(path)}$" for path in here]
    return tuple(found)
