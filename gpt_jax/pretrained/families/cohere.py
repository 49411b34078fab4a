"""Command R: attention and MLP side by side, LayerNorm without biases."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families import llama
from gpt_jax.pretrained.families.family import (
    ATTENTION,
    ENDS,
    GATED_MLP,
    LAYERNORM,
    SIZES,
    block,
)
from gpt_jax.pretrained.families.llama import LLAMA
from gpt_jax.pretrained.layouts import VECTOR, Row, interleaved
from gpt_jax.pretrained.options import FULL, SLIDING, WINDOWS


def _turned(row: Row) -> Row:
    """Returns the row of a query or key, whose neighbouring features are turned."""
    turned = "/query/" in row.ours or "/key/" in row.ours
    return row._replace(layout=interleaved(row.layout)) if turned else row


# ---------------------------------------------------------------- Command R


def _read_cohere(config: Mapping) -> dict[str, Any]:
    rope = options.rope(config, ("rope_theta", 500_000.0))
    return {**_read(config), **options.pattern([LayerKind(0, *rope)])}


def _read(config: Mapping) -> dict[str, Any]:
    return {
        **options.heads(config),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        "attn_bias": bool(config.get("attention_bias")),
        "logit_divisor": 1 / (config.get("logit_scale") or 0.0625),
    }


def _write_cohere(cfg: GPTConfig) -> dict[str, Any]:
    return {**llama.write(cfg), "logit_scale": 1 / cfg.logit_divisor}


COHERE = LLAMA._replace(
    model_type="cohere",
    architecture="CohereForCausalLM",
    keys={
        **SIZES,
        "context_length": ("max_position_embeddings", 8192),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "qkv_bias": ("attention_bias", False),
    },
    fixed={
        **{**LAYERNORM, "norm_bias": False, "gated": True, "mlp_bias": False},
        "parallel": "shared",
    },
    always={"use_qk_norm": False},
    known=(*LLAMA.known, "logit_scale"),
    read=_read_cohere,
    write=_write_cohere,
    rows=(
        *(*ENDS, *map(_turned, ATTENTION), *GATED_MLP),
        *block(("norm1/scale", "input_layernorm.weight", VECTOR)),
    ),
)


# ---------------------------------------------------------------- Command R 7B and A


def _read_cohere2(config: Mapping) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) or 0
    types = options.layer_types(
        config, lambda i: SLIDING if (i + 1) % options.every(config, 4) else FULL
    )
    # Layers that see all know no positions.
    how = {"full": (0.0, None), "sliding": options.rope(config)}
    return {**_read(config), **options.pattern(options.kinds(types, window, **how))}


def _write_cohere2(cfg: GPTConfig) -> dict[str, Any]:
    return {**llama.write_turned(cfg), "logit_scale": 1 / cfg.logit_divisor}


COHERE2 = COHERE._replace(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    always={},
    known=(*COHERE.known, *WINDOWS, "sliding_window_pattern"),
    read=_read_cohere2,
    write=_write_cohere2,
)
