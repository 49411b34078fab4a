"""OPT: a GPT-2 with ReLU, or without biases, and two rows before its positions."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families.family import (
    PLAIN,
    REQUIRED,
    Family,
    block,
    two_layers,
)
from gpt_jax.pretrained.layouts import EMBEDDING, LINEAR, VECTOR, Row, behind
from gpt_jax.pretrained.options import ACTIVATIONS, BASE


def _read_opt(config: Mapping) -> dict[str, Any]:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if (config.get("word_embed_proj_dim") or width) != width:
        raise ValueError(
            f"word_embed_proj_dim {config['word_embed_proj_dim']} beside a hidden_size "
            f"of {width} is not supported"
        )
    name = config.get("activation_function") or "relu"
    activation = options.activation(name)
    # Any other is a GPT-2, as which it would be exported.
    if activation != "relu" and config.get("enable_bias") is not False:
        raise ValueError(f"the activation {name!r} beside biases is not supported")
    return {
        **options.heads({"hidden_size": width, "num_attention_heads": heads}),
        "activation": activation,
        **options.pattern([LayerKind(0, BASE[1], None)]),
    }


def _write_opt(cfg: GPTConfig) -> dict[str, Any]:
    return {
        "activation_function": ACTIVATIONS[cfg.activation][0],
        "word_embed_proj_dim": cfg.d_model,
    }


OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    prefix="model.decoder.",
    keys={
        "vocab_size": ("vocab_size", REQUIRED),
        "context_length": ("max_position_embeddings", 2048),
        "n_layers": ("num_hidden_layers", REQUIRED),
        "d_model": ("hidden_size", REQUIRED),
        "n_heads": ("num_attention_heads", REQUIRED),
        "d_ff": ("ffn_dim", REQUIRED),
        "tie_embeddings": ("tie_word_embeddings", True),
        **dict.fromkeys(("qkv_bias", "attn_bias", "mlp_bias"), ("enable_bias", True)),
        **dict.fromkeys(
            ("norm_scale", "norm_bias"), ("layer_norm_elementwise_affine", True)
        ),
    },
    fixed={
        **{**PLAIN, "position": "learned", "norm": "layernorm", "norm_eps": 1e-5},
        "gated": False,
    },
    always={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    known=("activation_function", "word_embed_proj_dim"),
    read=_read_opt,
    write=_write_opt,
    rows=(
        Row("embed/embedding", "embed_tokens.weight", EMBEDDING),
        # The first two are for what is no text.
        Row("positions/embedding", "embed_positions.weight", behind(2, EMBEDDING)),
        Row("final_norm/scale", "final_layer_norm.weight", VECTOR),
        Row("final_norm/bias", "final_layer_norm.bias", VECTOR),
        Row("head/kernel", "lm_head.weight", LINEAR),
        *block(
            ("norm1/scale", "self_attn_layer_norm.weight", VECTOR),
            ("norm1/bias", "self_attn_layer_norm.bias", VECTOR),
            ("norm2/scale", "final_layer_norm.weight", VECTOR),
            ("norm2/bias", "final_layer_norm.bias", VECTOR),
            ("attn/query/kernel", "self_attn.q_proj.weight", LINEAR),
            ("attn/key/kernel", "self_attn.k_proj.weight", LINEAR),
            ("attn/value/kernel", "self_attn.v_proj.weight", LINEAR),
            ("attn/out/kernel", "self_attn.out_proj.weight", LINEAR),
            ("attn/query/bias", "self_attn.q_proj.bias", VECTOR),
            ("attn/key/bias", "self_attn.k_proj.bias", VECTOR),
            ("attn/value/bias", "self_attn.v_proj.bias", VECTOR),
            ("attn/out/bias", "self_attn.out_proj.bias", VECTOR),
        ),
        *two_layers("fc1", "fc2"),
    ),
)
