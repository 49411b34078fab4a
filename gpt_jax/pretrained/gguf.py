"""One file for llama.cpp: GPT-2 and the Llama family as GGUF.

llama.cpp computes these architectures with one activation each, turns neighbouring
features of a head instead of its halves (so queries and keys of Llama are reordered),
and knows pre-tokenizers by name. What it would compute differently is refused.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax import commands
from gpt_jax.attention import rope_frequencies
from gpt_jax.files import draft
from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import config_json, files, weights
from gpt_jax.tokenizers import Tokenizer

ACTIVATION = {"gpt2": "gelu_tanh", "llama": "silu"}
# llama.cpp's name of a way to split texts, and a sign by which tokenizer.json shows it.
SPLITS = (
    ("llama-bpe", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"),
    ("smollm", '"individual_digits": true'),
)


def save(path: Path, params: Mapping, cfg: GPTConfig, tokenizer: Tokenizer) -> None:
    """Writes a GGUF file, one tensor in memory at a time.

    Args:
      path: the file; does not exist yet.
      params: the weights, layers unrolled; matrices are written as they are, vectors
        in float32.
      cfg: their model.
      tokenizer: a byte-level BPE, or one built like Llama 2's.

    Raises:
      ValueError: llama.cpp does not compute this model or know this tokenizer; or the
        package gguf is absent.
      FileExistsError: `path` exists.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"GGUF needs the package gguf: {commands.install('gguf')}"
        ) from error
    if path.exists():
        raise FileExistsError(f"{path} exists already; name a new file, or remove it")
    config = config_json.config_of(cfg)
    _check(cfg, config)
    about = {**_model(cfg, config), **_vocabulary(tokenizer, cfg)}
    tensors = _tensors(params, cfg, config)

    with draft(path) as part:
        writer = gguf.GGUFWriter(part, config["model_type"])
        for name, value in about.items():
            getattr(writer, f"add_{name}")(value)
        for name, (kind, shape, _) in tensors.items():
            size = int(np.prod(shape)) * files.BYTES[kind]
            raw = getattr(gguf.GGMLQuantizationType, kind)
            dtype = np.dtype(np.float32)  # `raw` decides
            writer.add_tensor_info(name, shape, dtype, size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for kind, _, value in tensors.values():
            writer.write_tensor_data(np.ascontiguousarray(value(), files.DTYPES[kind]))
        writer.close()


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns queries or keys with feature i + K/2 of every head behind feature i.

    Args:
      rows: [heads * K, ...], a Linear's weight or bias.
      heads: how many heads the rows are of.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _check(cfg: GPTConfig, config: Mapping) -> None:
    kind = config["model_type"]
    if kind not in ACTIVATION:
        raise ValueError(
            f"this model is a {kind}; GGUF is written for: {', '.join(ACTIVATION)}"
        )
    if cfg.activation != ACTIVATION[kind]:
        raise ValueError(
            f"llama.cpp computes {kind} with {ACTIVATION[kind]}, not {cfg.activation}"
        )


def _model(cfg: GPTConfig, config: Mapping) -> dict[str, Any]:
    """Returns what llama.cpp must know of the model, by GGUFWriter's add_ methods."""
    about: dict[str, Any] = {
        "context_length": cfg.context_length,
        "embedding_length": cfg.d_model,
        "block_count": cfg.n_layers,
        "feed_forward_length": cfg.d_ff,
        "head_count": cfg.n_heads,
        "vocab_size": cfg.vocab_size,
        "file_type": 0 if cfg.param_dtype == "float32" else 32,  # 32: mostly bfloat16
    }
    if config["model_type"] == "gpt2":
        return about | {"layer_norm_eps": cfg.norm_eps}
    about |= {
        "head_count_kv": cfg.n_kv_heads,
        "layer_norm_rms_eps": cfg.norm_eps,
        "key_length": cfg.head_dim,
        "value_length": cfg.head_dim,
        "rope_dimension_count": cfg.head_dim,
        "rope_freq_base": cfg.kind(0).rope_base,
    }
    return about | _linear_scaling(cfg)


def _linear_scaling(cfg: GPTConfig) -> dict[str, Any]:
    import gguf

    scaling = cfg.kind(0).rope_scaling
    if scaling is None or scaling.kind != "linear":
        return {}
    kind = gguf.RopeScalingType.LINEAR
    return {"rope_scaling_type": kind, "rope_scaling_factor": scaling.factor}


Tensors = dict[str, tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]


def _tensors(params: Mapping, cfg: GPTConfig, config: Mapping) -> Tensors:
    """Returns (dtype, shape, function giving the array) by llama.cpp's names."""
    import gguf

    kind = config["model_type"]
    arch = {"gpt2": gguf.MODEL_ARCH.GPT2, "llama": gguf.MODEL_ARCH.LLAMA}[kind]
    names = gguf.get_tensor_name_map(arch, cfg.n_layers)
    found, value = weights.tensors_of(params, cfg, config)
    tensors: Tensors = {}
    for theirs, (dtype, shape) in found.items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, theirs
        turned = kind == "gpt2" and re.search(r"\.c_(attn|proj|fc)\.weight$", theirs)
        tensors[name] = (
            "F32" if len(shape) == 1 else dtype,
            shape[::-1] if turned else shape,
            _turned(value, theirs, cfg, turned=bool(turned)),
        )
    scaling = cfg.kind(0).rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        base = {"base": cfg.kind(0).rope_base}
        plain = rope_frequencies(cfg.head_dim, **base, scaling=None)
        slow = rope_frequencies(cfg.head_dim, **base, scaling=scaling)
        factors = np.asarray(plain / slow, np.float32)
        tensors["rope_freqs.weight"] = ("F32", factors.shape, lambda: factors)
    return tensors


def _turned(value, theirs: str, cfg: GPTConfig, *, turned: bool) -> Callable:
    """Returns the function that gives a tensor as llama.cpp stores it."""
    heads = {"q_proj": cfg.n_heads, "k_proj": cfg.n_kv_heads}.get(theirs.split(".")[-2])

    def get() -> np.ndarray:
        array = value(theirs).T if turned else value(theirs)
        return interleaved(array, heads) if heads else array

    return get


# ---------------------------------------------------------------- tokenizers


def _vocabulary(tokenizer: Tokenizer, cfg: GPTConfig) -> dict[str, Any]:
    """Returns what llama.cpp must know of the tokenizer."""
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
    else:
        raise ValueError(
            f"llama.cpp has no {tokenizer.kind} tokenizer; a run with byte or bpe "
            "tokens can be exported"
        )
    special = {"bos_token_id": tokenizer.opening[:1], "eos_token_id": []}
    if tokenizer.eos_id is not None:
        special["eos_token_id"] = [tokenizer.eos_id]
    return about | {name: ids[0] for name, ids in special.items() if ids}


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _type(tokenizer: Tokenizer, known: bool, i: int, token: str) -> int:
    """Returns GGUF's number of a kind of token."""
    if not known:
        return 5  # unused
    if i == tokenizer.unk_id:
        return 2
    if token in tokenizer.specials:
        return 3  # control
    return 6 if re.fullmatch("<0x[0-9A-F]{2}>", token) else 1  # byte, normal


def _split(document: Mapping, tokenizer: Tokenizer) -> str:
    """Returns llama.cpp's name for how a byte-level tokenizer splits texts first."""
    rule = document.get("pre_tokenizer") or {}
    merged = bool(document["model"].get("merges"))
    if not merged or (rule.get("type") == "ByteLevel" and rule.get("use_regex", True)):
        return "gpt-2"  # without merges no split matters
    for name, sign in SPLITS:
        if sign in json.dumps(rule, ensure_ascii=False).replace("\\\\", "\\"):
            return name
    known = ", ".join(["gpt-2", *(name for name, _ in SPLITS)])
    raise ValueError(
        f"this {tokenizer.kind} tokenizer splits texts in a way that GGUF export does "
        f"not know; it knows: {known}"
    )
