"""GPT-2, and what still calls its weights so: GPT-Neo, GPT-J."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families.family import (
    LAYERNORM,
    PLAIN,
    REQUIRED,
    Family,
    block,
    two_layers,
)
from gpt_jax.pretrained.layouts import (
    CONV,
    EMBEDDING,
    LINEAR,
    VECTOR,
    Row,
    interleaved,
)
from gpt_jax.pretrained.options import ACTIVATIONS, BASE

# ---------------------------------------------------------------- GPT-2


def _read_gpt2(config: Mapping) -> dict[str, Any]:
    width, heads = config["n_embd"], config["n_head"]
    sizes = {"hidden_size": width, "num_attention_heads": heads}
    return {
        **options.heads(sizes),
        "d_ff": config.get("n_inner") or 4 * width,
        "activation": options.activation(config.get("activation_function", "gelu_new")),
        **options.pattern([LayerKind(0, BASE[1], None)]),
    }


def _write_gpt2(cfg: GPTConfig) -> dict[str, Any]:
    return {
        "n_inner": cfg.d_ff,
        "activation_function": ACTIVATIONS[cfg.activation][0],
    }


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    keys={
        "vocab_size": ("vocab_size", REQUIRED),
        "context_length": ("n_positions", 1024),
        "n_layers": ("n_layer", REQUIRED),
        "d_model": ("n_embd", REQUIRED),
        "n_heads": ("n_head", REQUIRED),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    fixed={
        **PLAIN,
        "position": "learned",
        "norm": "layernorm",
        "norm_bias": True,
        "gated": False,
        "qkv_bias": True,
        "attn_bias": True,
        "mlp_bias": True,
    },
    always={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    known=("n_inner", "activation_function"),
    read=_read_gpt2,
    write=_write_gpt2,
    rows=(
        Row("embed/embedding", "wte.weight", EMBEDDING),
        Row("positions/embedding", "wpe.weight", EMBEDDING),
        Row("block_{i}/norm1/scale", "h.{i}.ln_1.weight", VECTOR),
        Row("block_{i}/norm1/bias", "h.{i}.ln_1.bias", VECTOR),
        Row("block_{i}/attn/query/kernel", "h.{i}.attn.c_attn.weight", CONV, 0, 3),
        Row("block_{i}/attn/key/kernel", "h.{i}.attn.c_attn.weight", CONV, 1, 3),
        Row("block_{i}/attn/value/kernel", "h.{i}.attn.c_attn.weight", CONV, 2, 3),
        Row("block_{i}/attn/query/bias", "h.{i}.attn.c_attn.bias", VECTOR, 0, 3),
        Row("block_{i}/attn/key/bias", "h.{i}.attn.c_attn.bias", VECTOR, 1, 3),
        Row("block_{i}/attn/value/bias", "h.{i}.attn.c_attn.bias", VECTOR, 2, 3),
        Row("block_{i}/attn/out/kernel", "h.{i}.attn.c_proj.weight", CONV),
        Row("block_{i}/attn/out/bias", "h.{i}.attn.c_proj.bias", VECTOR),
        Row("block_{i}/norm2/scale", "h.{i}.ln_2.weight", VECTOR),
        Row("block_{i}/norm2/bias", "h.{i}.ln_2.bias", VECTOR),
        Row("block_{i}/mlp/up/kernel", "h.{i}.mlp.c_fc.weight", CONV),
        Row("block_{i}/mlp/up/bias", "h.{i}.mlp.c_fc.bias", VECTOR),
        Row("block_{i}/mlp/down/kernel", "h.{i}.mlp.c_proj.weight", CONV),
        Row("block_{i}/mlp/down/bias", "h.{i}.mlp.c_proj.bias", VECTOR),
        Row("final_norm/scale", "ln_f.weight", VECTOR),
        Row("final_norm/bias", "ln_f.bias", VECTOR),
        Row("head/kernel", "lm_head.weight", LINEAR),
    ),
    zeros=("qkv_bias", "attn_bias", "mlp_bias", "norm_bias"),
)


# ---------------------------------------------------------------- GPT-Neo

GLOBAL, LOCAL = "global", "local"


def _read_gpt_neo(config: Mapping) -> dict[str, Any]:
    sizes = {
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_heads"],
    }
    window = config.get("window_size") or 256
    kinds = [
        LayerKind(window if local else 0, BASE[1], None) for local in _local(config)
    ]
    return {
        **options.heads(sizes),
        "query_scale": 1.0,  # its scores are not scaled
        "d_ff": config.get("intermediate_size") or 4 * config["hidden_size"],
        "activation": options.activation(config.get("activation_function", "gelu_new")),
        **options.pattern(kinds),
    }


def _local(config: Mapping) -> list[bool]:
    """Returns which layers see a window alone, as [[["global", "local"], 12]] says."""
    spelt = config.get("attention_types") or [[[GLOBAL, LOCAL], 12]]
    count, names = config["num_layers"], []
    try:
        for kinds, times in spelt:
            names += list(kinds) * min(int(times), count)
    except (TypeError, ValueError) as error:
        raise ValueError(f"attention_types {spelt!r:.80} is not understood") from error
    listed = config.get("attention_layers") or names
    if len(names) != count or listed != names or not {*names} <= {GLOBAL, LOCAL}:
        raise ValueError(
            f"attention_types {spelt!r:.80} does not name {count} layers, {GLOBAL} or "
            f"{LOCAL}, or attention_layers says otherwise"
        )
    return [name == LOCAL for name in names]


def _write_gpt_neo(cfg: GPTConfig) -> dict[str, Any]:
    windows = [cfg.kind(i).window for i in range(cfg.n_layers)]
    names = [LOCAL if window else GLOBAL for window in windows]
    return {
        "intermediate_size": cfg.d_ff,
        "activation_function": ACTIVATIONS[cfg.activation][0],
        "window_size": max(windows) or 256,
        "attention_types": [[[name], 1] for name in names],
        "attention_layers": names,
    }


GPT_NEO = GPT2._replace(
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    keys={
        "vocab_size": ("vocab_size", REQUIRED),
        "context_length": ("max_position_embeddings", 2048),
        "n_layers": ("num_layers", REQUIRED),
        "d_model": ("hidden_size", REQUIRED),
        "n_heads": ("num_heads", REQUIRED),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    fixed={**GPT2.fixed, "qkv_bias": False},
    always={},
    known=(
        *("intermediate_size", "activation_function", "window_size"),
        *("attention_types", "attention_layers"),
    ),
    read=_read_gpt_neo,
    write=_write_gpt_neo,
    rows=(
        *(row for row in GPT2.rows if "attn" not in row.ours and "mlp" not in row.ours),
        *two_layers("mlp.c_fc", "mlp.c_proj", under="h"),
        *block(
            ("attn/query/kernel", "attn.attention.q_proj.weight", LINEAR),
            ("attn/key/kernel", "attn.attention.k_proj.weight", LINEAR),
            ("attn/value/kernel", "attn.attention.v_proj.weight", LINEAR),
            ("attn/out/kernel", "attn.attention.out_proj.weight", LINEAR),
            ("attn/out/bias", "attn.attention.out_proj.bias", VECTOR),
            under="h",
        ),
    ),
    zeros=(),
)


# ---------------------------------------------------------------- GPT-J


def _read_gptj(config: Mapping) -> dict[str, Any]:
    fields = _read_gpt2(config)
    return {**fields, "rotary_dim": config.get("rotary_dim") or 64}


def _gptj_rows(config: Mapping) -> tuple[Row, ...]:
    """Its rotary positions turn neighbouring features, of the first `rotary_dim`."""
    turned = interleaved(LINEAR, config.get("rotary_dim") or 64)
    return block(
        ("attn/query/kernel", "attn.q_proj.weight", turned),
        ("attn/key/kernel", "attn.k_proj.weight", turned),
        under="h",
    )


GPTJ = GPT2._replace(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    keys={
        **GPT2.keys,
        "context_length": ("n_positions", 2048),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
    fixed={
        **{**LAYERNORM, "parallel": "shared", "head_bias": True, "mlp_bias": True},
        **{"qkv_bias": False, "attn_bias": False},
    },
    always={"rotary": True, "scale_attn_weights": True},  # of its first config.json
    known=(*GPT2.known, "rotary_dim"),
    read=_read_gptj,
    write=lambda cfg: {**_write_gpt2(cfg), "rotary_dim": cfg.rotary_dim},
    own_rows=_gptj_rows,
    rows=(
        *(row for row in GPT2.rows if not row.ours.startswith("block")),
        Row("head/bias", "lm_head.bias", VECTOR),
        *block(
            ("norm1/scale", "ln_1.weight", VECTOR),
            ("norm1/bias", "ln_1.bias", VECTOR),
            ("attn/value/kernel", "attn.v_proj.weight", LINEAR),
            ("attn/out/kernel", "attn.out_proj.weight", LINEAR),
            under="h",
        ),
        *two_layers("mlp.fc_in", "mlp.fc_out", under="h"),
    ),
    zeros=(),
)
