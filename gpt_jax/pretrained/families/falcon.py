"""Falcon: one key and value for many queries, attention and MLP side by side."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families.family import (
    LAYERNORM,
    QKV,
    REQUIRED,
    Family,
    block,
    fused,
    two_layers,
)
from gpt_jax.pretrained.layouts import EMBEDDING, LINEAR, VECTOR, Row
from gpt_jax.pretrained.options import ACTIVATIONS, ROPE


def _parallel(config: Mapping) -> str:
    """Returns our word for how a layer is arranged: in 7B, in 40B, or one by one."""
    new = bool(config.get("new_decoder_architecture"))
    side = bool(config.get("parallel_attn", True))
    norms = config.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if (new and not side) or norms > 1 + new:
        raise ValueError(
            f"num_ln_in_parallel_attn {norms} or parallel_attn {side} is not supported "
            f"where new_decoder_architecture is {new}"
        )
    return "no" if not side else "own" if norms == 2 else "shared"


def _read_falcon(config: Mapping) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    keys = config.get("num_kv_heads") or heads
    if not config.get("new_decoder_architecture"):
        many = not config.get("multi_query", True)
        if many and keys != heads:
            raise ValueError(
                f"num_kv_heads {keys} needs new_decoder_architecture or multi_query"
            )
        keys = heads if many else 1
    sizes = {"hidden_size": config["hidden_size"], "num_attention_heads": heads}
    return {
        **options.heads({**sizes, "num_key_value_heads": keys}),
        "d_ff": config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        "activation": options.activation(config.get("activation") or "gelu"),
        "parallel": _parallel(config),
        **options.pattern([LayerKind(0, *options.rope(config))]),
    }


def _write_falcon(cfg: GPTConfig) -> dict[str, Any]:
    keys, own = cfg.n_kv_heads, cfg.parallel == "own"
    new = own or 1 < keys < cfg.n_heads
    return {
        "new_decoder_architecture": new,
        "num_kv_heads": keys,
        "multi_query": keys == 1 and not new,
        "parallel_attn": cfg.parallel != "no",
        "num_ln_in_parallel_attn": 1 + own if new else None,
        "ffn_hidden_size": cfg.d_ff,
        "activation": ACTIVATIONS[cfg.activation][0],
        **options.write_rope(cfg.kind(0)),
    }


def _falcon_rows(config: Mapping) -> tuple[Row, ...]:
    """Its norms have other names where attention and MLP have one each."""
    own = _parallel(config) == "own"
    names = ("input_layernorm", "post_attention_layernorm")
    return block(
        *(
            (f"norm{n}/{ours}", f"{name}.{theirs}", VECTOR)
            for n, name in enumerate(("ln_attn", "ln_mlp") if own else names, start=1)
            for ours, theirs in (("scale", "weight"), ("bias", "bias"))
        ),
        under="h",
    )


FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    prefix="transformer.",
    keys={
        "vocab_size": ("vocab_size", REQUIRED),
        "context_length": ("max_position_embeddings", 2048),
        "n_layers": ("num_hidden_layers", REQUIRED),
        "d_model": ("hidden_size", REQUIRED),
        "n_heads": ("num_attention_heads", REQUIRED),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
        **dict.fromkeys(("qkv_bias", "attn_bias", "mlp_bias"), ("bias", False)),
    },
    fixed=LAYERNORM,
    always={"alibi": False},
    known=(
        *("num_kv_heads", "new_decoder_architecture", "multi_query", "parallel_attn"),
        *("num_ln_in_parallel_attn", "ffn_hidden_size", "activation", *ROPE),
    ),
    read=_read_falcon,
    write=_write_falcon,
    own_rows=_falcon_rows,
    rows=(
        Row("embed/embedding", "word_embeddings.weight", EMBEDDING),
        Row("final_norm/scale", "ln_f.weight", VECTOR),
        Row("final_norm/bias", "ln_f.bias", VECTOR),
        Row("head/kernel", "lm_head.weight", LINEAR),
        *(
            row._replace(by_head=True)
            for ours, leaf in (("kernel", "weight"), ("bias", "bias"))
            for row in fused(
                f"attn/{{}}/{ours}",
                f"self_attention.query_key_value.{leaf}",
                *QKV,
                under="h",
            )
        ),
        *block(
            ("attn/out/kernel", "self_attention.dense.weight", LINEAR),
            ("attn/out/bias", "self_attention.dense.bias", VECTOR),
            under="h",
        ),
        *two_layers("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", under="h"),
    ),
)
