"""Phi: partial rotary positions, and at first attention and MLP side by side."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families import llama
from gpt_jax.pretrained.families.family import (
    ATTENTION,
    ENDS,
    LAYERNORM,
    NORMS,
    QKV,
    ROTARY,
    SIZES,
    block,
    fused,
    two_layers,
)
from gpt_jax.pretrained.families.llama import LLAMA
from gpt_jax.pretrained.layouts import LINEAR, VECTOR, Row

# ---------------------------------------------------------------- Phi 1, 1.5 and 2


def _read_phi(config: Mapping) -> dict[str, Any]:
    return {
        **llama.read({"hidden_act": "gelu_new", **config}),
        **options.rotary(config, 0.5),
        "attn_bias": True,
    }


PHI = LLAMA._replace(
    model_type="phi",
    architecture="PhiForCausalLM",
    keys={
        **SIZES,
        "norm_eps": ("layer_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
    fixed={
        **{**LAYERNORM, "parallel": "shared", "head_bias": True},
        **{"qkv_bias": True, "mlp_bias": True},
    },
    always={"qk_layernorm": False},
    known=(*LLAMA.known, "partial_rotary_factor"),
    read=_read_phi,
    write=llama.write_partial,
    rows=(
        *(row for row in ENDS if row.ours != "final_norm/scale"),
        *(
            row._replace(theirs=row.theirs.replace("o_proj", "dense"))
            for row in ATTENTION
        ),
        Row("final_norm/scale", "final_layernorm.weight", VECTOR),
        Row("final_norm/bias", "final_layernorm.bias", VECTOR),
        Row("head/bias", "lm_head.bias", VECTOR),
        *block(
            ("norm1/scale", "input_layernorm.weight", VECTOR),
            ("norm1/bias", "input_layernorm.bias", VECTOR),
        ),
        *two_layers("mlp.fc1", "mlp.fc2"),
    ),
)


# ---------------------------------------------------------------- Phi 3 and 4


def _read_phi3(config: Mapping) -> dict[str, Any]:
    rope = options.rope({"original_max_position_embeddings": 4096, **config})
    if rope[1] is not None and rope[1].kind != "longrope":
        raise ValueError(f"the rope scaling {rope[1].kind} is not supported for phi3")
    window = config.get("sliding_window") or 0
    return {
        **options.heads(config),
        **options.rotary(config, 1.0),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        **options.pattern([LayerKind(window, *rope)]),
    }


def _write_phi3(cfg: GPTConfig) -> dict[str, Any]:
    keys, scaling = llama.write_partial(cfg), cfg.kind(0).rope_scaling
    if scaling is not None:  # it is read here, whatever rope_parameters say
        keys["original_max_position_embeddings"] = scaling.original_context
    return {**keys, "sliding_window": cfg.kind(0).window or None}


PHI3 = LLAMA._replace(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    keys={
        **SIZES,
        "context_length": ("max_position_embeddings", 4096),
        "norm_eps": ("rms_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
    fixed={**ROTARY, "qkv_bias": False, "attn_bias": False, "mlp_bias": False},
    known=(
        *(*LLAMA.known, "sliding_window", "partial_rotary_factor"),
        "original_max_position_embeddings",  # which longrope alone reads
    ),
    read=_read_phi3,
    write=_write_phi3,
    rows=(
        *(*ENDS, *NORMS),
        *fused("attn/{}/kernel", "self_attn.qkv_proj.weight", *QKV),
        *fused("mlp/{}/kernel", "mlp.gate_up_proj.weight", "gate", "up"),
        *block(
            ("attn/out/kernel", "self_attn.o_proj.weight", LINEAR),
            ("mlp/down/kernel", "mlp.down_proj.weight", LINEAR),
        ),
    ),
)
