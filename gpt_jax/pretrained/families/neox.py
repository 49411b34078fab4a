"""GPT-NeoX: attention and MLP side by side, queries, keys and values in one tensor."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families import llama
from gpt_jax.pretrained.families.family import (
    LAYERNORM,
    NORM_BIASES,
    NORMS,
    QKV,
    block,
    fused,
    two_layers,
)
from gpt_jax.pretrained.families.phi import PHI
from gpt_jax.pretrained.layouts import EMBEDDING, LINEAR, VECTOR, Row
from gpt_jax.pretrained.options import FULL, SLIDING

# ---------------------------------------------------------------- GPT-NeoX, Pythia


def _read_gpt_neox(config: Mapping) -> dict[str, Any]:
    if {FULL, SLIDING} & (config.get("rope_parameters") or {}).keys():
        raise ValueError("rope_parameters for each type of layer are not supported")
    if config.get("partial_rotary_factor") is not None:
        raise ValueError("partial_rotary_factor is called rotary_pct for gpt_neox")
    rope = options.rope(config, ("rotary_emb_base", 10_000.0))
    share = config.get("rotary_pct")
    return {
        **options.heads(config),
        **options.rotary(config, 0.25 if share is None else share),
        "activation": options.activation(config.get("hidden_act") or "gelu"),
        "parallel": "own" if config.get("use_parallel_residual", True) else "no",
        **options.pattern([LayerKind(0, *rope)]),
    }


def _write_gpt_neox(cfg: GPTConfig) -> dict[str, Any]:
    keys = llama.write_partial(cfg)
    return {
        "hidden_act": keys["hidden_act"],
        "use_parallel_residual": cfg.parallel == "own",
        "rotary_emb_base": keys["rope_theta"],
        "rotary_pct": keys["partial_rotary_factor"],
        "rope_scaling": keys["rope_scaling"],
        "rope_parameters": keys["rope_parameters"],
    }


GPT_NEOX = PHI._replace(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    keys={
        **PHI.keys,
        "qkv_bias": ("attention_bias", True),
        "attn_bias": ("attention_bias", True),
    },
    fixed={**LAYERNORM, "mlp_bias": True},
    always={},
    known=(
        *("rotary_emb_base", "rotary_pct", "rope_scaling", "rope_parameters"),
        *("hidden_act", "use_parallel_residual", "partial_rotary_factor"),
    ),
    read=_read_gpt_neox,
    write=_write_gpt_neox,
    rows=(
        Row("embed/embedding", "embed_in.weight", EMBEDDING),
        Row("final_norm/scale", "final_layer_norm.weight", VECTOR),
        *(row for row in NORM_BIASES if row.ours != "final_norm/bias"),
        Row("final_norm/bias", "final_layer_norm.bias", VECTOR),
        Row("head/kernel", "embed_out.weight", LINEAR),
        *(
            row._replace(by_head=True)
            for leaf in ("weight", "bias")
            for row in fused(
                f"attn/{{}}/{'kernel' if leaf == 'weight' else leaf}",
                f"attention.query_key_value.{leaf}",
                *QKV,
            )
        ),
        *NORMS,
        *block(
            ("attn/out/kernel", "attention.dense.weight", LINEAR),
            ("attn/out/bias", "attention.dense.bias", VECTOR),
        ),
        *two_layers("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
)
