"""A GGUF file, llama.cpp's form of a model, read as a published folder is.

One file holds what a config.json does under names of its own, the weights in any of
some thirty forms, the tokenizer and the chat template. What it says becomes a
config.json, tensors and a tokenizer.json; from there on nothing knows where they came
from. What is not known is refused by name. Nothing in a file is ever executed.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax import commands
from gpt_jax.pretrained.families import TABLE
from gpt_jax.rope import RopeScaling, rope_frequencies

SUFFIX = ".gguf"


class Arch(NamedTuple):
    """One architecture of llama.cpp.

    Attributes:
      family: the model_type of the same in config.json.
      keys: key of config.json -> key of the file, without the architecture's name.
      turned: whether it rotates neighbouring features of a head and not its halves, so
        that the rows of queries and keys lie in another order.
      offset: what is added to the scale of a norm in the file.
      fixed: (keys of config.json so far) -> those that the architecture decides.
      switches: key of config.json -> the tensor whose presence says that it is true.
    """

    family: str
    keys: Mapping[str, str]
    turned: bool = False
    offset: float = 0.0
    fixed: Callable[[Mapping], dict[str, Any]] = lambda config: {}
    switches: Mapping[str, str] = {}


SIZES = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
}
RMS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
HEAD = {"head_dim": "attention.key_length"}
BIASES = {"attention_bias": "blk.0.attn_q.bias"}
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
}


def _gemma_scale(deepest: int) -> Callable[[Mapping], dict[str, Any]]:
    """llama.cpp has no key for the scale of queries: the largest one's is another."""

    def fixed(config: Mapping) -> dict[str, Any]:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        largest = config["num_hidden_layers"] == deepest
        return {
            "query_pre_attn_scalar": width // heads if largest else config["head_dim"]
        }

    return fixed


ARCHS = {
    "gpt2": Arch(
        "gpt2",
        {
            **{"n_positions": "context_length", "n_layer": "block_count"},
            **{"n_embd": "embedding_length", "n_inner": "feed_forward_length"},
            "n_head": "attention.head_count",
            "layer_norm_epsilon": "attention.layer_norm_epsilon",
        },
    ),
    "llama": Arch(
        "llama",
        {**SIZES, **RMS, **HEAD},
        turned=True,
        switches={**BIASES, "mlp_bias": "blk.0.ffn_up.bias"},
    ),
    "qwen2": Arch("qwen2", {**SIZES, **RMS}),
    "qwen3": Arch("qwen3", {**SIZES, **RMS, **HEAD}, switches=BIASES),
    "gemma": Arch("gemma", {**SIZES, **RMS, **HEAD}, offset=1.0),
    "gemma2": Arch(
        "gemma2", {**SIZES, **RMS, **HEAD, **CAPS}, offset=1.0, fixed=_gemma_scale(46)
    ),
    "starcoder2": Arch(
        "starcoder2", {**SIZES, "norm_epsilon": "attention.layer_norm_epsilon"}
    ),
}
ARCHS = {name: arch for name, arch in ARCHS.items() if arch.family in TABLE}
OF_FAMILY = {arch.family: name for name, arch in ARCHS.items()}
# Keys that repeat what others say, or say what changes nothing.
REPEATED = ("vocab_size", "attention.value_length", "rope.dimension_count")
SCALING = ("rope.scaling.type", "rope.scaling.factor")
IDLE = ("rope.scaling.original_context_length", "rope.scaling.finetuned")
FACTORS = "rope_freqs.weight"
# Below and above which turns within the first context Llama 3's rule is slow and fast.
LLAMA3 = (1.0, 4.0)
LENGTHS = tuple(2**n for n in range(3, 21))  # of first contexts


class Tensor(NamedTuple):
    """A tensor of the file; as files.Tensor, but unpacked when it is read.

    Attributes:
      path: the file.
      kind: the dtype that `read` gives, as safetensors spells it.
      shape: its shape, as torch's.
      read: returns it.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class GGUF(NamedTuple):
    """What a file says.

    Attributes:
      path: the file.
      config: the config.json that means the same.
      tensors: its weights by the names of transformers.
      metadata: its keys.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


@lru_cache(maxsize=2)
def read(path: Path) -> GGUF:
    """Returns what a file holds; its tensors are read when they are asked for.

    Raises:
      ValueError: it is no GGUF file or cut short, or of an architecture, a tensor type
        or with a key that is not supported; or the package gguf is absent.
    """
    gguf = package()
    try:
        reader = gguf.GGUFReader(path)
        found = {key: field.contents() for key, field in reader.fields.items()}
        packed = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # whatever a reader of damaged bytes may meet
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is not a GGUF file, or it is cut short: {reason}"
        ) from error
    try:
        shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in packed.items()
        }
        unpack = {name: _unpacked(tensor) for name, tensor in packed.items()}
        config = config_of(found, shapes, unpack)
        tensors = _named(path, found["general.architecture"], config, shapes, unpack)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return GGUF(path, config, tensors, found)


def package():
    """Returns the package gguf.

    Raises:
      ValueError: it is absent; says how to get it.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"GGUF needs the package gguf: {commands.install('gguf')}"
        ) from error
    return gguf


# ---------------------------------------------------------------- the model


def config_of(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    unpack: Mapping[str, Callable[[], np.ndarray]],
) -> dict[str, Any]:
    """Returns the config.json that a file's keys and tensors mean.

    Args:
      metadata: the keys of the file.
      shapes: the shape of each tensor.
      unpack: functions that give the tensors.

    Raises:
      ValueError: names the architecture or key that is not supported.
    """
    name = metadata.get("general.architecture")
    if name not in ARCHS:
        raise ValueError(
            f"the architecture {name!r} is not supported; supported: {', '.join(ARCHS)}"
        )
    arch, prefix = ARCHS[name], f"{name}."
    own = {
        key.removeprefix(prefix): _short(value)
        for key, value in metadata.items()
        if key.startswith(prefix)
    }
    config: dict[str, Any] = {"model_type": arch.family}
    for theirs, key in arch.keys.items():
        if key in own:
            config[theirs] = own.pop(key)
    if "token_embd.weight" not in shapes:
        raise ValueError("it has no tensor token_embd.weight")
    config["vocab_size"] = shapes["token_embd.weight"][0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    for key, tensor in arch.switches.items():
        config[key] = tensor in shapes
    _check_head(config, arch, own)
    config |= arch.fixed(config)
    if scaling := _scaling(own):
        config["rope_scaling"] = scaling
    if FACTORS in shapes:
        config["rope_scaling"] = _llama3(config, unpack[FACTORS]())
    strange = sorted(own.keys() - {*REPEATED, *SCALING, *IDLE})
    if strange:
        raise ValueError(
            f"the key {prefix}{strange[0]} = {own[strange[0]]!r:.80} is not supported"
        )
    return config


def _check_head(config: dict[str, Any], arch: Arch, own: Mapping) -> None:
    """Sees to it that the keys on the size of a head agree, and says it."""
    if "head_dim" not in arch.keys and "num_attention_heads" not in config:
        return
    sizes = {own.get("attention.value_length"), own.get("rope.dimension_count")}
    size = config.get("head_dim")
    if "head_dim" in arch.keys and size is None:
        size = own.get("rope.dimension_count")
    if size is None and config.get("num_attention_heads"):
        size = config["hidden_size"] // config["num_attention_heads"]
    if len({size, *sizes} - {None}) > 1:
        raise ValueError(
            f"keys, values and rotations of {sizes - {None}} features in heads of "
            f"{size} are not supported"
        )
    if "head_dim" in arch.keys:
        config["head_dim"] = size


def _scaling(own: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ValueError(f"the rope scaling {kind!r} is not supported; linear is")
    return {"rope_type": "linear", "factor": own.get("rope.scaling.factor")}


def _llama3(config: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Returns the Llama 3 scaling of these factors: a file holds them alone.

    The largest is the factor itself. One in between tells how often its frequency turns
    within the first context, and so how long that is; without one, several lengths mean
    the same.
    """
    base, size = config.get("rope_theta", 10_000.0), config["head_dim"]
    (low, high), most = LLAMA3, float(factors.max())
    plain = np.asarray(rope_frequencies(size, base=base, scaling=None))
    between = (factors > 1.001) & (factors < 0.999 * most)
    if factors.shape != plain.shape or most <= 1:
        between = np.zeros(0, bool)
    share = (1 / factors[between] - 1 / most) / (1 - 1 / most)
    turns = low + share * (high - low)
    lengths = np.round(2 * np.pi * turns / plain[: len(between)][between]).astype(int)
    for length in (*map(int, lengths), *LENGTHS):
        scaling = RopeScaling("llama3", round(most, 4), low, high, max(1, length))
        made = rope_factors(size, base, scaling)
        if made.shape == factors.shape and np.allclose(made, factors, rtol=1e-5):
            return {
                **{"rope_type": "llama3", "factor": scaling.factor},
                **{"low_freq_factor": low, "high_freq_factor": high},
                "original_max_position_embeddings": length,
            }
    raise ValueError(
        f"the tensor {FACTORS} stretches RoPE in a way that is no Llama 3's"
    )


def rope_factors(head_dim: int, base: float, scaling: RopeScaling) -> np.ndarray:
    """Returns what rotary frequencies are divided by, [K/2] float32."""
    plain = rope_frequencies(head_dim, base=base, scaling=None)
    slow = rope_frequencies(head_dim, base=base, scaling=scaling)
    return np.asarray(plain / slow, np.float32)


def _short(value: Any) -> Any:
    """Returns a float32 as the shortest number that is it, 1e-05 for 9.99999975e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


# ---------------------------------------------------------------- weights


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns queries or keys with feature i + K/2 of every head behind feature i.

    Args:
      rows: [heads * K, ...], a Linear's weight or bias.
      heads: how many heads the rows are of.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns what `interleaved` was given."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


class Place(NamedTuple):
    """How a tensor of transformers lies in a file.

    Attributes:
      name: its name there.
      swapped: whether its two axes are exchanged.
      heads: of how many heads the rows are reordered; 0 = none.
      offset: what is added to it.
    """

    name: str
    swapped: bool
    heads: int
    offset: float


def places(theirs: list[str], name: str, config: Mapping[str, Any]) -> dict[str, Place]:
    """Returns where each tensor of transformers is in a file.

    Args:
      theirs: the names of transformers.
      name: the architecture, as llama.cpp calls it.
      config: the config.json.

    Raises:
      ValueError: llama.cpp has no such tensor.
    """
    gguf, arch = package(), ARCHS[name]
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    table = gguf.get_tensor_name_map(number, layers)
    heads = config.get("num_attention_heads", 0)
    of = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    found = {}
    for tensor in theirs:
        inside = table.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if inside is None:
            raise ValueError(f"llama.cpp's {name} has no place for {tensor}")
        last = tensor.split(".")[-2]
        found[tensor] = Place(
            inside,
            swapped=arch.family == "gpt2" and last.startswith("c_")
            and tensor.endswith(".weight"),
            heads=of.get(last, 0) if arch.turned else 0,
            offset=arch.offset if "norm" in last else 0.0,
        )  # fmt: skip
    return found


def _named(
    path: Path, name: str, config: Mapping, shapes: Mapping, unpack: Mapping
) -> dict[str, Tensor]:
    """Returns the file's tensors by the names of transformers.

    One that transformers does not have keeps its name: whoever reads the rest says so.
    """
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    family = TABLE[config["model_type"]]
    names = [
        row.theirs.format(i=layer)
        for row in family.rows
        for layer in range(layers if "{i}" in row.theirs else 1)
    ]
    full = [family.full(name) for name in names]
    tensors, used = {}, {FACTORS}
    for theirs, place in places(list(dict.fromkeys(full)), name, config).items():
        if place.name not in shapes:
            continue  # such as the biases of a model without
        used.add(place.name)
        shape = shapes[place.name]
        shape = shape[::-1] if place.swapped else shape
        get = _laid_out(unpack[place.name], place)
        tensors[theirs] = Tensor(path, "F32", shape, get)
    for rest in shapes.keys() - used:
        tensors[rest] = Tensor(path, "F32", shapes[rest], unpack[rest])
    return tensors


def _unpacked(tensor) -> Callable[[], np.ndarray]:
    """Returns the function that gives a tensor as float32; refuses a strange type."""
    gguf = package()
    kind = tensor.tensor_type
    plain = ("F32", "F16", "F64", "I8", "I16", "I32", "I64")

    def get() -> np.ndarray:
        try:
            array = gguf.quants.dequantize(tensor.data, kind)
        except NotImplementedError as error:
            raise ValueError(
                f"tensor {tensor.name} is of the type {kind.name}, which the package "
                "gguf does not unpack"
            ) from error
        return np.asarray(array, np.float32)

    if kind.name not in plain and kind not in gguf.quants._type_traits:
        raise ValueError(
            f"tensor {tensor.name} is of the type {kind.name}, which the package gguf "
            "does not unpack"
        )
    return get


def _laid_out(unpack: Callable[[], np.ndarray], place: Place):
    def get() -> np.ndarray:
        array = unpack().T if place.swapped else unpack()
        array = apart(array, place.heads) if place.heads else array
        return array - np.float32(place.offset) if place.offset else array

    return get
