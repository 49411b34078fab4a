"""Weights in and out of Hugging Face folders, one tensor in memory at a time."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax import memory, screen
from gpt_jax.model import GPTConfig, declared
from gpt_jax.pretrained import config_json, files
from gpt_jax.pretrained.families import Family
from gpt_jax.pretrained.layouts import Row, Shape
from gpt_jax.weights import Weight

# Buffers that old versions of transformers saved with the weights.
BUFFERS = re.compile(r".*\.attn\.(attention\.)?(masked_)?bias|.*rotary_emb\.inv_freq")


class Source(NamedTuple):
    """One of our weights and the tensor that it comes from.

    Attributes:
      ours: its path.
      weight: what it is.
      row: where it lies.
      tensor: the tensor.
      first: how many of the tensor's outputs are before it.
    """

    ours: str
    weight: Weight
    row: Row
    tensor: files.Tensor
    first: int

    def read(self, dtype: np.dtype) -> np.ndarray:
        """Returns the weight as an array of its own, in our layout."""
        theirs = self.row.cut(self.tensor.read(), self.weight, self.first)
        ours = _aligned(self.weight.shape, dtype)
        found = self.row.layout.read(theirs, self.weight)
        np.copyto(ours, found, casting="unsafe")
        return ours


def load(
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    cfg: GPTConfig,
    *,
    folder: Path,
    place: Callable[[str, np.ndarray], Any] | None = None,
    shown: Callable[[list[Source]], Any] = iter,
) -> dict:
    """Returns published weights for a model, layers unrolled.

    Every name, shape and dtype is checked before the first number is read. The largest
    tensors come first, while there is room for the copy that reading takes: the peak
    is then little more than the weights.

    Args:
      config: the config.json that they came with.
      tensors: files.Tensor, or what reads like it, by the names of transformers.
      cfg: the model; its architecture is that of the config.json.
      folder: where they are, for what is said of them.
      place: (path, numpy array) -> the array on its devices; by default one copy on
        JAX's first device.
      shown: wraps the list of tensors while they are read, to show a bar.

    Raises:
      ValueError: a file or a tensor is damaged, absent, unknown, of another shape, or
        holds NaN or Inf; or the weights are more than the free memory.
    """
    family = config_json.of_config(config)
    plan = _plan(family, cfg, tensors, folder)
    dtype = jnp.dtype(cfg.param_dtype)
    padding = cfg.vocab_rows - cfg.vocab_size
    need = sum(math.prod(source.weight.shape) for source in plan) * dtype.itemsize
    free = memory.of_process() if place else memory.of_device(jax.devices()[0])
    if need > free:
        raise memory.too_large(
            f"{folder} holds {screen.size(need)} of weights in {dtype}",
            free,
            "bfloat16 takes half of float32; or import it where there is more memory",
        )
    put = place or (lambda path, array: jax.device_put(array))
    weights = {}
    for source in shown(sorted(plan, key=lambda s: -math.prod(s.weight.shape))):
        array = source.read(dtype)
        if not np.isfinite(array).all():
            raise ValueError(
                f"{folder}: the weights of {source.ours} hold NaN or Inf; get the "
                "files again, or take another checkpoint of that model"
            )
        if padding and "vocab" in source.weight.axes:
            widths = [(0, padding * (axis == "vocab")) for axis in source.weight.axes]
            array = np.pad(array, widths)
        weights[source.ours] = put(source.ours, array)
    return unflatten_dict(weights, sep="/")


def save(
    folder: Path,
    params: Mapping,
    cfg: GPTConfig,
    *,
    tokens: Mapping[str, Any],
    shard_bytes: int,
) -> None:
    """Writes config.json and model.safetensors, in shards when above `shard_bytes`.

    Args:
      folder: exists.
      params: the weights, layers unrolled; written in the dtype that they have.
      cfg: their model.
      tokens: keys such as eos_token_id, for config.json.
      shard_bytes: the most bytes of a file (a tensor is never cut).

    Raises:
      ValueError: no architecture of transformers computes this model.
    """
    config = config_json.config_of(cfg) | dict(tokens)
    names, value = tensors_of(params, cfg, config)
    kind = next(iter(names.values()))[0]
    config["dtype"] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind]
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    shards = list(_shards(names, shard_bytes))
    if len(shards) == 1:
        files.write(folder / files.SINGLE, names, value)
        return
    homes = {}
    for number, shard in enumerate(shards, start=1):
        home = f"model-{number:05}-of-{len(shards):05}.safetensors"
        files.write(folder / home, {name: names[name] for name in shard}, value)
        homes |= dict.fromkeys(shard, home)
    total = sum(math.prod(shape) * files.BYTES[kind] for kind, shape in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    (folder / files.INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def tensors_of(
    params: Mapping, cfg: GPTConfig, config: Mapping
) -> tuple[dict[str, tuple[str, Shape]], Callable[[str], np.ndarray]]:
    """Returns the tensors of a model under its family's names.

    Args:
      params: the weights, layers unrolled.
      cfg: their model.
      config: the config.json that it is written with.

    Returns:
      (dtype, shape) by name; and the function that gives the tensor of a name.
    """
    family = config_json.of_config(config)
    wanted, ours = unrolled(config_json.with_biases(cfg)), dict(flat(params))
    kind = files.kind_of(next(iter(ours.values())).dtype)
    if extra := sorted(ours.keys() - wanted.keys()):
        raise ValueError(
            f"the weights hold {extra[0]}, which the model has no place for; an "
            "adapter must be merged into them before they are exported"
        )
    held = groups(family, wanted)

    def value(name: str) -> np.ndarray:
        parts = held[name]
        arrays = [row.layout.write(weight(path), wanted[path]) for path, row in parts]
        path, row = parts[0]
        return row.join(arrays, wanted[path])

    def weight(path: str) -> np.ndarray:
        if path not in ours:  # a bias that the family has and this model does not
            return np.zeros(wanted[path].shape, files.DTYPES[kind])
        array = np.asarray(ours[path])
        cut = tuple(slice(0, n) for n in wanted[path].shape)  # the padded vocabulary
        return array[cut]

    return {
        name: (kind, _their_shape(group, wanted)) for name, group in held.items()
    }, value


Groups = dict[str, list[tuple[str, Row]]]


def groups(family: Family, wanted: Mapping[str, Weight]) -> Groups:
    """Returns the weights that each tensor of theirs holds, in their order there."""
    held: Groups = {}
    for path in wanted:
        row, layer = _row(family, path)
        held.setdefault(_full_name(family, row, layer), []).append((path, row))
    for group in held.values():
        group.sort(key=lambda item: item[1].part)
    return held


def _plan(
    family: Family, cfg: GPTConfig, tensors: Mapping[str, files.Tensor], folder: Path
) -> list[Source]:
    """Returns where every weight comes from, after checking all names and shapes."""
    named = {}
    for wrapper in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(wrapper) for name in tensors):
            raise ValueError(
                f"every tensor of {folder} is called {wrapper}...: the weights were "
                "saved from inside a wrapper of PyTorch's; save model.module (of "
                "DistributedDataParallel) or model._orig_mod (of torch.compile) instead"
            )
    for name, tensor in tensors.items():
        short = name.removeprefix(family.prefix)
        if short in named:
            raise ValueError(f"{folder} has the tensor {short} under two names")
        named[short] = name, tensor
    plan, used, declared_ = [], set(), unrolled(cfg)
    for full, group in groups(family, declared_).items():
        theirs = full.removeprefix(family.prefix)
        if theirs not in named:
            raise ValueError(
                f"{folder} has no tensor {full}, which the model of its config.json "
                "needs"
            )
        name, tensor = named[theirs]
        wanted = _their_shape(group, declared_)
        if tensor.shape != wanted:
            raise ValueError(
                f"tensor {name} in {tensor.path} has shape {tensor.shape}, but the "
                f"model of config.json needs {wanted}"
            )
        if tensor.kind not in files.DTYPES:
            raise ValueError(
                f"tensor {name} in {tensor.path} is of {tensor.kind}; supported: "
                f"{', '.join(files.DTYPES)}"
            )
        used.add(theirs)
        first = 0
        for path, row in group:
            weight = declared_[path]
            plan.append(Source(path, weight, row, tensor, first))
            first += row.layout.shape(weight)[row.layout.outputs]
    _check_rest({n: t for n, t in named.items() if n not in used}, named, cfg, folder)
    return plan


def _check_rest(rest: Mapping, named: Mapping, cfg: GPTConfig, folder: Path) -> None:
    """Refuses tensors that nothing reads, but for buffers and a copy of a tied head."""
    for short, (name, head) in rest.items():
        if BUFFERS.fullmatch(name):
            continue
        if short not in LM_HEADS or not cfg.tie_embeddings:
            raise ValueError(
                f"{folder} has the tensor {name}, which the model of its config.json "
                "has no place for"
            )
        table = next(t for n, (_, t) in named.items() if n in EMBEDDINGS)
        same = head[1:3] == table[1:3] and np.array_equal(head.read(), table.read())
        if not same:
            raise ValueError(
                f"tensor {name} differs from the embedding, but config.json says that "
                "they are tied: set tie_word_embeddings to false there"
            )


EMBEDDINGS = ("wte.weight", "embed_tokens.weight", "embed_in.weight")
EMBEDDINGS += ("word_embeddings.weight",)
LM_HEADS = ("lm_head.weight", "embed_out.weight")


def unrolled(cfg: GPTConfig) -> dict[str, Weight]:
    """Returns what each weight is, layers unrolled, vocabulary not padded."""
    return declared(replace(cfg, scan_layers=False, vocab_multiple=1))


def flat(tree: Mapping) -> Iterator[tuple[str, Any]]:
    """Yields the path and the array of every weight."""
    for path, leaf in flatten_dict(dict(tree), sep="/").items():
        yield str(path), leaf


def _row(family: Family, path: str) -> tuple[Row, str]:
    """Returns the row of one of our weights and its layer."""
    found = re.match(r"block_(\d+)/", path)
    layer = found[1] if found else ""
    general = re.sub(r"^block_\d+/", "block_{i}/", path)
    for row in family.rows:
        if row.ours == general:
            return row, layer
    raise ValueError(f"{family.model_type} has no weight like {path}")


def _their_shape(group: list[tuple[str, Row]], wanted: Mapping[str, Weight]) -> Shape:
    """Returns the shape of the tensor that holds these weights."""
    shapes = [row.layout.shape(wanted[path]) for path, row in group]
    axis = group[0][1].layout.outputs
    whole = sum(shape[axis] for shape in shapes)
    return (*shapes[0][:axis], whole, *shapes[0][axis + 1 :])


def _full_name(family: Family, row: Row, layer: str) -> str:
    return family.full(row.theirs.format(i=layer))


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Returns an empty array that JAX takes as it is on a CPU, without a copy."""
    room = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + room.size - 64].view(dtype).reshape(shape)


def _shards(names: Mapping[str, tuple[str, Shape]], most: int) -> Iterator[list[str]]:
    """Yields the names of each file, in the model's order."""
    shard, size = [], 0
    for name, (kind, shape) in names.items():
        more = math.prod(shape) * files.BYTES[kind]
        if shard and size + more > most:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += more
    yield shard
