"""Llamas with LayerNorm and its biases: StarCoder 2, StableLM."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families import gemma, llama
from gpt_jax.pretrained.families.family import (
    ATTENTION,
    ENDS,
    LAYERNORM,
    NORM_BIASES,
    NORMS,
    SIZES,
    two_layers,
)
from gpt_jax.pretrained.families.llama import LLAMA
from gpt_jax.pretrained.options import ROPE

# ---------------------------------------------------------------- StarCoder 2


def _read_starcoder2(config: Mapping) -> dict[str, Any]:
    window = config.get("sliding_window") or 0
    return {
        **options.heads(config, kv=2),
        "activation": options.activation(
            config.get("hidden_act") or "gelu_pytorch_tanh"
        ),
        **options.pattern([LayerKind(window, *options.rope(config))]),
    }


def _write_starcoder2(cfg: GPTConfig) -> dict[str, Any]:
    return {**llama.write_mistral(cfg), "hidden_act": gemma.activation(cfg)}


STARCODER2 = LLAMA._replace(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    keys={
        **SIZES,
        "context_length": ("max_position_embeddings", 4096),
        "norm_eps": ("norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        "qkv_bias": ("use_bias", True),
        "attn_bias": ("use_bias", True),
        "mlp_bias": ("use_bias", True),
    },
    fixed=LAYERNORM,
    known=(*LLAMA.known, "sliding_window"),
    read=_read_starcoder2,
    write=_write_starcoder2,
    rows=(
        *(*ENDS, *NORMS, *NORM_BIASES, *ATTENTION),
        *two_layers("mlp.c_fc", "mlp.c_proj"),
    ),
)


# ---------------------------------------------------------------- StableLM


def _read_stablelm(config: Mapping) -> dict[str, Any]:
    return {
        **llama.read({"num_key_value_heads": 32, **config}),
        **options.rotary(config, 0.25),
        "attn_bias": False,
        "parallel": "shared" if config.get("use_parallel_residual") else "no",
    }


def _write_stablelm(cfg: GPTConfig) -> dict[str, Any]:
    keys = {k: v for k, v in llama.write_partial(cfg).items() if k != "head_dim"}
    return {**keys, "use_parallel_residual": cfg.parallel == "shared"}


STABLELM = LLAMA._replace(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    keys={
        **SIZES,
        "context_length": ("max_position_embeddings", 4096),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
        "qkv_bias": ("use_qkv_bias", False),
    },
    fixed={**LAYERNORM, "gated": True, "mlp_bias": False},
    always={"qk_layernorm": False},
    known=(
        *("num_key_value_heads", *ROPE, "hidden_act", "partial_rotary_factor"),
        "use_parallel_residual",
    ),
    read=_read_stablelm,
    write=_write_stablelm,
    rows=(*LLAMA.rows, *NORM_BIASES),
)
