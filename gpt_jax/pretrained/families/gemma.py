"""Gemma: scaled embeddings, norms that add one to their scale, windows, soft-caps."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families import llama
from gpt_jax.pretrained.families.family import (
    ATTENTION,
    ENDS,
    GATED_MLP,
    QK_NORM,
    ROTARY,
    SIZES,
    block,
)
from gpt_jax.pretrained.families.llama import LLAMA
from gpt_jax.pretrained.layouts import VECTOR
from gpt_jax.pretrained.options import (
    ACTIVATIONS,
    FULL,
    HEADS,
    ROPE,
    SLIDING,
    WINDOWS,
)

# ---------------------------------------------------------------- Gemma 1


def _read_gemma(config: Mapping) -> dict[str, Any]:
    # "gelu" of the first release was meant to be, and is computed as, the other one.
    name = config.get("hidden_act") or "gelu_pytorch_tanh"
    name = "gelu_pytorch_tanh" if name == "gelu" else name
    if (config.get("hidden_activation") or name) != name:
        raise ValueError(
            f"hidden_act and hidden_activation differ: {name!r} and "
            f"{config['hidden_activation']!r}"
        )
    return {
        **llama.read({**config, "hidden_act": name}),
        **options.heads(config, head_dim=256, kv=16),
        "embed_scale": config["hidden_size"] ** 0.5,
    }


def _write_gemma(cfg: GPTConfig) -> dict[str, Any]:
    name = activation(cfg)
    return {**llama.write(cfg), "hidden_act": name, "hidden_activation": name}


def activation(cfg: GPTConfig) -> str:
    """Returns the name of an activation; of GELU the one that Google gives it."""
    tanh = cfg.activation == "gelu_tanh"
    return "gelu_pytorch_tanh" if tanh else ACTIVATIONS[cfg.activation][0]


GEMMA = LLAMA._replace(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    keys={
        **SIZES,
        "context_length": ("max_position_embeddings", 8192),
        "tie_embeddings": ("tie_word_embeddings", True),
        "qkv_bias": ("attention_bias", False),
    },
    fixed={**ROTARY, "mlp_bias": False, "norm_offset": 1.0},
    known=(*LLAMA.known, "hidden_activation"),
    read=_read_gemma,
    write=_write_gemma,
)


# ---------------------------------------------------------------- Gemma 3


def _read_gemma3(config: Mapping) -> dict[str, Any]:
    types = options.layer_types(
        config, lambda i: SLIDING if (i + 1) % options.every(config, 6) else FULL
    )
    window = config.get("sliding_window", 4096) or 0
    full, sliding = options.ropes(
        config, ("rope_theta", 1_000_000.0), ("rope_local_base_freq", 10_000.0)
    )
    scalar = config.get("query_pre_attn_scalar") or 256
    return {
        **options.heads(config, head_dim=256, kv=4),
        "query_scale": scalar**-0.5,
        "embed_scale": config["hidden_size"] ** 0.5,
        "activation": options.activation(
            config.get("hidden_activation", "gelu_pytorch_tanh")
        ),
        "logit_softcap": config.get("final_logit_softcapping") or 0.0,
        "attn_bias": bool(config.get("attention_bias")),
        **options.pattern(options.kinds(types, window, full=full, sliding=sliding)),
    }


def _write_gemma3(cfg: GPTConfig) -> dict[str, Any]:
    full, local = llama.full_and_sliding(cfg)
    return {
        **options.write_heads(cfg),
        **llama.write_windows(cfg),
        "hidden_activation": activation(cfg),
        "query_pre_attn_scalar": round(cfg.query_scale**-2),
        "final_logit_softcapping": cfg.logit_softcap or None,
        **options.write_ropes(full, local),
        "rope_local_base_freq": local.rope_base,
    }


GEMMA3 = LLAMA._replace(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys={
        **SIZES,
        "context_length": ("max_position_embeddings", 131_072),
        "tie_embeddings": ("tie_word_embeddings", True),
        "qkv_bias": ("attention_bias", False),
    },
    fixed={
        **{**ROTARY, "qk_norm": True, "mlp_bias": False},
        **{"norm_offset": 1.0, "norm_placement": "both"},
    },
    known=(
        *(
            *HEADS,
            *ROPE,
            *WINDOWS,
            "rope_local_base_freq",
            "sliding_window_pattern",
        ),
        *("hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping"),
    ),
    read=_read_gemma3,
    write=_write_gemma3,
    rows=(
        *(*ENDS, *ATTENTION, *QK_NORM, *GATED_MLP),
        *block(
            ("norm1/scale", "input_layernorm.weight", VECTOR),
            ("post1/scale", "post_attention_layernorm.weight", VECTOR),
            ("norm2/scale", "pre_feedforward_layernorm.weight", VECTOR),
            ("post2/scale", "post_feedforward_layernorm.weight", VECTOR),
        ),
    ),
)


# ---------------------------------------------------------------- Gemma 2


def _read_gemma2(config: Mapping) -> dict[str, Any]:
    types = options.layer_types(config, lambda i: SLIDING if (i + 1) % 2 else FULL)
    window = config.get("sliding_window", 4096) or 0
    rope = options.rope(config)
    scalar = config.get("query_pre_attn_scalar") or 256
    return {
        **options.heads(config, head_dim=256, kv=4),
        "query_scale": scalar**-0.5,
        "embed_scale": config["hidden_size"] ** 0.5,
        "activation": options.activation(
            config.get("hidden_activation") or "gelu_pytorch_tanh"
        ),
        "attn_softcap": float(config.get("attn_logit_softcapping", 50.0) or 0.0),
        "logit_softcap": float(config.get("final_logit_softcapping", 30.0) or 0.0),
        "attn_bias": bool(config.get("attention_bias")),
        **options.pattern(options.kinds(types, window, full=rope, sliding=rope)),
    }


def _write_gemma2(cfg: GPTConfig) -> dict[str, Any]:
    return {
        **options.write_heads(cfg),
        **llama.write_windows(cfg),
        **options.write_rope(cfg.kind(0)),
        "hidden_activation": activation(cfg),
        "query_pre_attn_scalar": round(cfg.query_scale**-2),
        "attn_logit_softcapping": cfg.attn_softcap or None,
        "final_logit_softcapping": cfg.logit_softcap or None,
    }


GEMMA2 = GEMMA3._replace(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys={**GEMMA3.keys, "context_length": ("max_position_embeddings", 8192)},
    fixed={
        **{**ROTARY, "mlp_bias": False},
        **{"norm_offset": 1.0, "norm_placement": "both"},
    },
    known=(
        *(*HEADS, *ROPE, *WINDOWS, "hidden_activation", "query_pre_attn_scalar"),
        *("attn_logit_softcapping", "final_logit_softcapping", "hidden_act"),
    ),
    read=_read_gemma2,
    write=_write_gemma2,
    rows=tuple(row for row in GEMMA3.rows if row not in QK_NORM),
)
