"""One file for llama.cpp: GGUF, written for the families that are read from it.

llama.cpp computes each architecture in one way, turns neighbouring features of a head
instead of its halves in some (so their queries and keys are reordered), and knows
pre-tokenizers by name. A file is written only if what it says, read back, is the model
and the tokenizer: what llama.cpp would compute differently is refused.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax import chat, names
from gpt_jax.files import draft
from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import config_json, files, gguf_file, gguf_tokenizer, weights
from gpt_jax.pretrained.gguf_file import ARCHS, OF_FAMILY, interleaved
from gpt_jax.pretrained.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER,
)
from gpt_jax.tokenizers import Tokenizer

# How matrices are kept: "" = as they are; Q8_0 is 8 bits and a scale of 32 numbers, the
# others with a Q fewer bits, and those that end in _1 a smallest number as well.
KINDS = ("", "F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
# llama.cpp's numbers of files that are mostly so.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
FILE_TYPES |= {"BF16": 32}
WIDE = ("position_embd.weight",)  # never rounded, as llama.cpp's own files have it
# Few bits cost these most: they keep 8, as llama.cpp's quantizer gives them more too.
TABLES = ("token_embd.weight", "output.weight")
BLOCK = 32  # numbers with one scale
# The one activation that llama.cpp has for an architecture.
ACTIVATION = {"gpt2": "gelu_tanh", "starcoder2": "gelu_tanh"}
ACTIVATION |= {"gemma": "gelu_tanh", "gemma2": "gelu_tanh"}


def save(
    path: Path,
    params: Mapping,
    cfg: GPTConfig,
    tokenizer: Tokenizer,
    *,
    kind: str = "",
    template: str | None = None,
) -> None:
    """Writes a GGUF file, one tensor in memory at a time.

    Args:
      path: the file; does not exist yet.
      params: the weights, layers unrolled; vectors are written in float32.
      cfg: their model.
      tokenizer: a byte-level BPE, or one built like Llama 2's.
      kind: how matrices are written, one of KINDS.
      template: the chat template: a name of chat.TEMPLATES, or Jinja text.

    Raises:
      ValueError: llama.cpp does not compute this model or know this tokenizer; or the
        package gguf is absent.
      FileExistsError: `path` exists.
    """
    names.choose("the type of a GGUF file", kind, KINDS)
    gguf = gguf_file.package()
    if path.exists():
        raise FileExistsError(f"{path} exists already; name a new file, or remove it")
    config = config_json.config_of(cfg)
    name = _arch(cfg, config)
    tensors = _tensors(params, cfg, config, name, kind)
    about = _model(cfg, config, name)
    _check(cfg, about, tensors)
    texts = _vocabulary(tokenizer, cfg, template)

    with draft(path) as part:
        writer = gguf.GGUFWriter(part, name)
        writer.add_file_type(FILE_TYPES[kind or _kept(cfg)])
        for key, value in about.items():
            _add(writer, key, value)
        for key, value in texts.items():
            getattr(writer, f"add_{key}")(value)
        for key, (form, shape, _) in tensors.items():
            raw = getattr(gguf.GGMLQuantizationType, form)
            block, size = gguf.GGML_QUANT_SIZES[raw]
            count = math.prod(shape) // block * size
            dtype = np.dtype(np.float32)  # `raw` decides
            writer.add_tensor_info(key, shape, dtype, count, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for form, _, value in tensors.values():
            writer.write_tensor_data(_packed(value(), form))
        writer.close()


def _packed(array: np.ndarray, form: str) -> np.ndarray:
    if form in files.DTYPES:
        return np.ascontiguousarray(array, files.DTYPES[form])
    gguf = gguf_file.package()
    wide = np.ascontiguousarray(array, np.float32)
    return gguf.quants.quantize(wide, getattr(gguf.GGMLQuantizationType, form))


def _add(writer, key: str, value: Any) -> None:
    add = {int: "uint32", float: "float32", str: "string"}[type(value)]
    getattr(writer, f"add_{add}")(key, value)


def _kept(cfg: GPTConfig) -> str:
    return "F32" if cfg.param_dtype == "float32" else "BF16"


def _arch(cfg: GPTConfig, config: Mapping) -> str:
    """Returns llama.cpp's name of the architecture; refuses what it has not."""
    family = config["model_type"]
    if family not in OF_FAMILY:
        raise ValueError(
            f"this model is a {family}; GGUF is written for: {', '.join(OF_FAMILY)}"
        )
    wanted = ACTIVATION.get(family, "silu")
    if cfg.activation != wanted:
        raise ValueError(
            f"llama.cpp computes {family} with {wanted}, not {cfg.activation}"
        )
    return OF_FAMILY[family]


def _model(cfg: GPTConfig, config: Mapping, name: str) -> dict[str, Any]:
    """Returns the keys of the model as the file has them."""
    arch = ARCHS[name]
    about = {
        f"{name}.{theirs}": config[key]
        for key, theirs in arch.keys.items()
        if config.get(key) is not None
    }
    about[f"{name}.vocab_size"] = cfg.vocab_size
    if cfg.position == "rope":
        about[f"{name}.rope.dimension_count"] = cfg.head_dim
    if "head_dim" in arch.keys:
        about[f"{name}.attention.value_length"] = cfg.head_dim
    scaling = cfg.kind(0).rope_scaling
    if scaling is not None and scaling.kind == "linear":
        about |= {f"{name}.rope.scaling.type": "linear"}
        about |= {f"{name}.rope.scaling.factor": scaling.factor}
    return about


def _check(cfg: GPTConfig, about: Mapping[str, Any], tensors: "Tensors") -> None:
    """Refuses a file that, read back, would be another model."""
    name = next(iter(about)).partition(".")[0]
    shapes = {key: shape for key, (_, shape, _) in tensors.items()}
    unpack = {key: value for key, (_, _, value) in tensors.items()}
    rounded = {k: np.float32(v).item() if type(v) is float else v
               for k, v in about.items()}  # fmt: skip
    found = gguf_file.config_of(
        {"general.architecture": name, **rounded}, shapes, unpack
    )
    absent = dict.fromkeys(config_json.missing_biases(cfg), False)
    if wrong := config_json.difference(cfg, config_json.fields(found) | absent):
        raise ValueError(
            f"llama.cpp's {name} would compute another model: {'; '.join(wrong)}"
        )


Tensors = dict[str, tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]


def _tensors(
    params: Mapping, cfg: GPTConfig, config: Mapping, name: str, kind: str
) -> Tensors:
    """Returns (form, shape, function giving the array) by llama.cpp's names."""
    found, value = weights.tensors_of(params, cfg, config)
    tensors: Tensors = {}
    for theirs, place in gguf_file.places(list(found), name, config).items():
        dtype, shape = found[theirs]
        shape = shape[::-1] if place.swapped else shape
        form = kind or dtype
        if len(shape) == 1 or place.name in WIDE:
            form = "F32"
        if form.startswith("Q") and place.name in TABLES:
            form = "Q8_0"
        if form.startswith("Q") and shape[-1] % BLOCK:
            form = "F16"  # as llama.cpp's own quantizer falls back
        tensors[place.name] = form, shape, _turned(value, theirs, place)
    scaling, kinds = cfg.kind(0).rope_scaling, cfg.kind(0)
    if scaling is not None and scaling.kind == "llama3":
        factors = gguf_file.rope_factors(cfg.head_dim, kinds.rope_base, scaling)
        tensors[gguf_file.FACTORS] = ("F32", factors.shape, lambda: factors)
    return tensors


def _turned(value, theirs: str, place: gguf_file.Place) -> Callable:
    """Returns the function that gives a tensor as llama.cpp stores it."""

    def get() -> np.ndarray:
        array = value(theirs).T if place.swapped else value(theirs)
        array = interleaved(array, place.heads) if place.heads else array
        if place.offset:
            array = np.asarray(array, np.float32) + np.float32(place.offset)
        return array

    return get


# ---------------------------------------------------------------- tokenizers


def _vocabulary(
    tokenizer: Tokenizer, cfg: GPTConfig, template: str | None
) -> dict[str, Any]:
    """Returns what llama.cpp must know of the tokenizer."""
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{cfg.vocab_size}: they do not belong together"
        )
    document = json.loads(tokenizer.json)
    names = {i: token for token, i in tokenizer.vocab.items()}
    tokens = [names.get(i, f"[unused {i}]") for i in range(cfg.vocab_size)]
    merges = [_pair(merge) for merge in document["model"].get("merges", ())]
    about: dict[str, Any] = {
        "token_list": tokens,
        "token_types": [
            _type(tokenizer, i in names, i, t) for i, t in enumerate(tokens)
        ],
        "add_bos_token": bool(tokenizer.opening),
    }
    if tokenizer.kind in ("byte", "bpe"):
        pre = _split(document, tokenizer)
        about |= {"tokenizer_model": "gpt2", "tokenizer_pre": pre}
        about["token_merges"] = [" ".join(pair) for pair in merges]
    elif document["model"].get("type") == "BPE" and document["model"].get(
        "byte_fallback"
    ):
        # Where SentencePiece merges what scores highest, these merge what comes first.
        rank = {"".join(pair): -float(i) for i, pair in reversed([*enumerate(merges)])}
        about |= {"tokenizer_model": "llama", "tokenizer_pre": "default"}
        about["token_scores"] = [rank.get(token, 0.0) for token in tokens]
        # llama.cpp puts a space before a text unless it is told not to.
        about["add_space_prefix"] = _prefixes(document)
    else:
        raise ValueError(
            f"llama.cpp has no {tokenizer.kind} tokenizer; a run with byte or bpe "
            "tokens can be exported"
        )
    ends = list(tokenizer.ends)
    if template is not None:
        about["chat_template"] = chat.as_jinja(template, tokenizer)
        ends = chat.stop_ids(tokenizer, template)
    bos = tokenizer.bos_id
    pad = tokenizer.special.pad if tokenizer.special else None
    # Two keys end a text: eos, and the end of an answer, where that is another token.
    eos = tokenizer.eos_id if tokenizer.eos_id is not None else next(iter(ends), None)
    others = [i for i in ends if i != eos]
    if len(others) > 2:
        raise ValueError(
            f"texts end at {len(ends)} tokens, and GGUF has keys for three of them"
        )
    found = {"bos": bos, "eos": eos, "pad": pad, **dict(zip(("eot", "eom"), others))}
    return about | {f"{k}_token_id": i for k, i in found.items() if i is not None}


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _type(tokenizer: Tokenizer, known: bool, i: int, token: str) -> int:
    """Returns GGUF's number of a kind of token."""
    if not known:
        return UNUSED
    if i == tokenizer.unk_id:
        return UNKNOWN
    if token in tokenizer.specials:
        return CONTROL
    if i in tokenizer.backend.get_added_tokens_decoder():
        return USER
    return BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else NORMAL


def _prefixes(document: Mapping) -> bool:
    """Whether a tokenizer puts a space before a text."""
    parts = [document.get(name) or {} for name in ("normalizer", "pre_tokenizer")]
    inner = [
        part
        for group in parts
        for key in ("normalizers", "pretokenizers")
        for part in group.get(key, ())
    ]
    return any(
        part.get("type") == "Prepend"
        or (
            part.get("type") == "Metaspace"
            and part.get("prepend_scheme", "always") != "never"
        )
        for part in parts + inner
    )


def _split(document: Mapping, tokenizer: Tokenizer) -> str:
    """Returns llama.cpp's name for how a byte-level tokenizer splits texts first."""
    if not document["model"].get("merges"):
        return "gpt-2"  # without merges no split matters
    if (name := gguf_tokenizer.split_of(document)) is not None:
        return name
    raise ValueError(
        f"this {tokenizer.kind} tokenizer splits texts in a way that GGUF export does "
        f"not know; it knows: {', '.join(gguf_tokenizer.SPLITS)}"
    )
