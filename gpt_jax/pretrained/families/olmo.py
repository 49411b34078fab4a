"""Norms without weights, or behind each sublayer instead of before it: OLMo, EXAONE."""

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
    block,
)
from gpt_jax.pretrained.families.llama import LLAMA
from gpt_jax.pretrained.layouts import VECTOR
from gpt_jax.pretrained.options import FULL, SLIDING, WINDOWS

# ---------------------------------------------------------------- OLMo 1 and 2


def _read_olmo(config: Mapping) -> dict[str, Any]:
    return {**llama.read(config), "qkv_clip": float(config.get("clip_qkv") or 0.0)}


OLMO = LLAMA._replace(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    keys={k: v for k, v in LLAMA.keys.items() if k not in ("norm_eps", "mlp_bias")},
    fixed={
        **{**ROTARY, "norm": "layernorm", "norm_scale": False, "norm_eps": 1e-5},
        "mlp_bias": False,
    },
    known=(*LLAMA.known, "clip_qkv"),
    read=_read_olmo,
    write=lambda cfg: {**llama.write(cfg), "clip_qkv": cfg.qkv_clip or None},
    rows=tuple(row for row in LLAMA.rows if "norm" not in row.ours),
)
OLMO2 = LLAMA._replace(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    keys={
        **{k: v for k, v in LLAMA.keys.items() if k != "mlp_bias"},
        "norm_eps": ("rms_norm_eps", 1e-5),
    },
    fixed={
        **{**ROTARY, "mlp_bias": False, "norm_placement": "post"},
        **{"qk_norm": True, "qk_norm_over": "heads"},
    },
    rows=(
        *(*ENDS, *ATTENTION, *QK_NORM, *GATED_MLP),
        *block(
            ("post1/scale", "post_attention_layernorm.weight", VECTOR),
            ("post2/scale", "post_feedforward_layernorm.weight", VECTOR),
        ),
    ),
)


# ---------------------------------------------------------------- OLMo 3

_BASE = ("rope_theta", 500_000.0)


def _read_olmo3(config: Mapping) -> dict[str, Any]:
    types = options.layer_types(config, lambda i: SLIDING if (i + 1) % 4 else FULL)
    window = config.get("sliding_window", 4096) or 0
    # No old key says the base of sliding layers: transformers gives them the default.
    full, sliding = options.ropes(config, _BASE, ("", _BASE[1]))
    return {
        **options.heads(config),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        "attn_bias": bool(config.get("attention_bias")),
        **options.pattern(options.kinds(types, window, full=full, sliding=sliding)),
    }


def _write_olmo3(cfg: GPTConfig) -> dict[str, Any]:
    full, sliding = llama.full_and_sliding(cfg)
    return {
        **llama.write(cfg),
        **llama.write_windows(cfg),
        **options.write_ropes(full, sliding),
    }


OLMO3 = OLMO2._replace(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    known=(*OLMO2.known, *WINDOWS),
    read=_read_olmo3,
    write=_write_olmo3,
)


# ---------------------------------------------------------------- EXAONE 4


def _read_exaone4(config: Mapping) -> dict[str, Any]:
    window, rope = config.get("sliding_window", 4096) or 0, options.rope(config)
    types = options.layer_types(
        config,
        lambda i: SLIDING if window and (i + 1) % options.every(config, 4) else FULL,
    )
    # Where some layers have windows, the others know no positions.
    full = (0.0, None) if window else rope
    return {
        **options.heads(config, kv=32),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        **options.pattern(options.kinds(types, window, full=full, sliding=rope)),
    }


def _write_exaone4(cfg: GPTConfig) -> dict[str, Any]:
    keys = llama.write_turned(cfg)
    still = any(not cfg.kind(i).rope_base for i in range(cfg.n_layers))
    if still and not keys["sliding_window"]:
        keys["sliding_window"] = cfg.context_length  # says that full layers are so
    return keys


EXAONE4 = OLMO2._replace(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    keys={k: v for k, v in OLMO2.keys.items() if k != "qkv_bias"},
    fixed={
        **{**OLMO2.fixed, "qk_norm_over": "head"},
        **{"qkv_bias": False, "attn_bias": False},
    },
    known=(*OLMO2.known, *WINDOWS, "sliding_window_pattern"),
    read=_read_exaone4,
    write=_write_exaone4,
)
