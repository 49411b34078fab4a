"""Qwen 2 to 3: Llama with windows in the later layers; biases, or norms of QK."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families import llama
from gpt_jax.pretrained.families.family import (
    ATTENTION,
    ENDS,
    GATED_MLP,
    NORMS,
    QK_NORM,
    ROTARY,
    SIZES,
)
from gpt_jax.pretrained.families.llama import LLAMA
from gpt_jax.pretrained.options import FULL, SLIDING, WINDOWS

# ---------------------------------------------------------------- Qwen 3


def _read_qwen3(config: Mapping) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) or 0
    window = window if config.get("use_sliding_window") else 0
    full_below = config.get("max_window_layers", 28)
    rope = options.rope(config)
    types = options.layer_types(
        config,
        lambda i: SLIDING if window and i >= full_below else FULL,
    )
    return {
        **options.heads(config, head_dim=128, kv=32),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        "attn_bias": bool(config.get("attention_bias")),
        **options.pattern(options.kinds(types, window, full=rope, sliding=rope)),
    }


def _write_qwen3(cfg: GPTConfig) -> dict[str, Any]:
    keys = {**llama.write(cfg), **llama.write_windows(cfg)}
    return {
        **keys,
        "use_sliding_window": bool(keys["sliding_window"]),
        "max_window_layers": cfg.n_layers,
    }


QWEN3 = LLAMA._replace(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys={
        **SIZES,
        "context_length": ("max_position_embeddings", 32_768),
        "tie_embeddings": ("tie_word_embeddings", False),
        "qkv_bias": ("attention_bias", False),
    },
    fixed={**ROTARY, "qk_norm": True, "mlp_bias": False},
    known=(*LLAMA.known, *WINDOWS, "use_sliding_window", "max_window_layers"),
    read=_read_qwen3,
    write=_write_qwen3,
    rows=(*ENDS, *NORMS, *ATTENTION, *QK_NORM, *GATED_MLP),
)


# ---------------------------------------------------------------- Qwen 2 and 2.5


def _read_qwen2(config: Mapping) -> dict[str, Any]:
    own = {"num_key_value_heads": 32, **config}
    size = (
        config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    )
    return {**_read_qwen3({**own, "head_dim": size}), "attn_bias": False}


QWEN2 = QWEN3._replace(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys={
        **SIZES,
        "context_length": ("max_position_embeddings", 32_768),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
    fixed={**ROTARY, "qkv_bias": True, "attn_bias": False, "mlp_bias": False},
    read=_read_qwen2,
    rows=LLAMA.rows,
)
