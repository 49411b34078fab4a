"""The families of published models, as tables.

A family is data: which key of config.json is which field of GPTConfig, what its
architecture fixes, and for each of our weights the name and the layout of theirs.
Import and export read the same tables, so each is the inverse of the other.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.layouts import (
    CONV,
    EMBEDDING,
    LINEAR,
    SWAPPED,
    SWAPPED_VECTOR,
    VECTOR,
    Row,
)
from gpt_jax.pretrained.options import (
    ACTIVATIONS,
    BASE,
    FULL,
    HEADS,
    ROPE,
    SLIDING,
    WINDOWS,
)


class Family(NamedTuple):
    """One architecture of Hugging Face's transformers.

    Attributes:
      model_type: its name in config.json.
      architecture: its class there.
      prefix: stands before every tensor's name but the head's.
      keys: field of GPTConfig -> (key of config.json, value where the key is absent,
        REQUIRED if it may not be).
      fixed: fields of GPTConfig that the architecture decides.
      always: keys whose value changes the numbers -> the only value supported.
      known: the other keys that `read` looks at.
      read: config.json -> the other fields.
      write: GPTConfig -> the other keys.
      rows: where every weight is.
      zeros: fields that may be False here; those biases are written as zeros.
    """

    model_type: str
    architecture: str
    prefix: str
    keys: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]
    always: Mapping[str, Any]
    known: tuple[str, ...]
    read: Callable[[Mapping], dict[str, Any]]
    write: Callable[[GPTConfig], dict[str, Any]]
    rows: tuple[Row, ...]
    zeros: tuple[str, ...] = ()

    def full(self, name: str) -> str:
        """Returns the whole name of a tensor; the head's has no prefix."""
        head = name.startswith(("lm_head.", "embed_out."))
        return name if head else self.prefix + name


REQUIRED = object()

SIZES = {
    "vocab_size": ("vocab_size", REQUIRED),
    "context_length": ("max_position_embeddings", 2048),
    "n_layers": ("num_hidden_layers", REQUIRED),
    "d_model": ("hidden_size", REQUIRED),
    "n_heads": ("num_attention_heads", REQUIRED),
    "d_ff": ("intermediate_size", REQUIRED),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
PLAIN = {
    "norm_scale": True,
    "norm_bias": False,
    "norm_offset": 0.0,
    "norm_placement": "pre",
    "embed_norm": False,
    "head_bias": False,
    "qk_norm": False,
    "attn_softcap": 0.0,
    "logit_softcap": 0.0,
    "embed_scale": 1.0,
}
ROTARY = {**PLAIN, "position": "rope", "norm": "rmsnorm", "gated": True}
LAYERNORM = {  # with biases, and an MLP without a gate
    **{**PLAIN, "position": "rope", "norm": "layernorm", "norm_bias": True},
    "gated": False,
}


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


# ---------------------------------------------------------------- Llama


def _block(*rows: tuple[str, str, Any]) -> tuple[Row, ...]:
    return tuple(
        Row(f"block_{{i}}/{ours}", f"layers.{{i}}.{theirs}", layout)
        for ours, theirs, layout in rows
    )


QKV = ("query", "key", "value")


def _fused(ours: str, theirs: str, *parts: str) -> tuple[Row, ...]:
    """Returns the rows of weights that lie in one tensor, in this order."""
    layout = LINEAR if theirs.endswith(".weight") else VECTOR
    where = f"layers.{{i}}.{theirs}"
    return tuple(
        Row(f"block_{{i}}/{ours.format(part)}", where, layout, number, len(parts))
        for number, part in enumerate(parts)
    )


ENDS = (
    Row("embed/embedding", "embed_tokens.weight", EMBEDDING),
    Row("final_norm/scale", "norm.weight", VECTOR),
    Row("head/kernel", "lm_head.weight", LINEAR),
)
ATTENTION = _block(
    ("attn/query/kernel", "self_attn.q_proj.weight", LINEAR),
    ("attn/key/kernel", "self_attn.k_proj.weight", LINEAR),
    ("attn/value/kernel", "self_attn.v_proj.weight", LINEAR),
    ("attn/out/kernel", "self_attn.o_proj.weight", LINEAR),
    ("attn/query/bias", "self_attn.q_proj.bias", VECTOR),
    ("attn/key/bias", "self_attn.k_proj.bias", VECTOR),
    ("attn/value/bias", "self_attn.v_proj.bias", VECTOR),
    ("attn/out/bias", "self_attn.o_proj.bias", VECTOR),
)
QK_NORM = _block(
    ("attn/query_norm/scale", "self_attn.q_norm.weight", VECTOR),
    ("attn/key_norm/scale", "self_attn.k_norm.weight", VECTOR),
)
NORMS = _block(
    ("norm1/scale", "input_layernorm.weight", VECTOR),
    ("norm2/scale", "post_attention_layernorm.weight", VECTOR),
)
NORM_BIASES = (
    Row("final_norm/bias", "norm.bias", VECTOR),
    *_block(
        ("norm1/bias", "input_layernorm.bias", VECTOR),
        ("norm2/bias", "post_attention_layernorm.bias", VECTOR),
    ),
)


def _two_layers(up: str, down: str) -> tuple[Row, ...]:
    """Returns the rows of an MLP without a gate, by the names of its layers."""
    return _block(
        ("mlp/up/kernel", f"{up}.weight", LINEAR),
        ("mlp/up/bias", f"{up}.bias", VECTOR),
        ("mlp/down/kernel", f"{down}.weight", LINEAR),
        ("mlp/down/bias", f"{down}.bias", VECTOR),
    )


GATED_MLP = _block(
    ("mlp/gate/kernel", "mlp.gate_proj.weight", LINEAR),
    ("mlp/up/kernel", "mlp.up_proj.weight", LINEAR),
    ("mlp/down/kernel", "mlp.down_proj.weight", LINEAR),
    ("mlp/gate/bias", "mlp.gate_proj.bias", VECTOR),
    ("mlp/up/bias", "mlp.up_proj.bias", VECTOR),
    ("mlp/down/bias", "mlp.down_proj.bias", VECTOR),
)


def _read_llama(config: Mapping) -> dict[str, Any]:
    return {
        **options.heads(config),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        "attn_bias": bool(config.get("attention_bias")),
        **options.pattern([LayerKind(0, *options.rope(config, FULL, BASE))]),
    }


def _write_llama(cfg: GPTConfig) -> dict[str, Any]:
    return {
        **options.write_heads(cfg),
        "hidden_act": ACTIVATIONS[cfg.activation][0],
        **options.write_rope(cfg.kind(0)),  # where layers differ, reading back shows it
    }


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    keys={
        **SIZES,
        "tie_embeddings": ("tie_word_embeddings", False),
        "qkv_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
    },
    fixed=ROTARY,
    always={},
    known=(*HEADS, *ROPE, "hidden_act"),
    read=_read_llama,
    write=_write_llama,
    rows=(*ENDS, *NORMS, *ATTENTION, *GATED_MLP),
)


# ---------------------------------------------------------------- Mistral


def _read_mistral(config: Mapping) -> dict[str, Any]:
    # Null means none, an absent key the window that the first Mistral had.
    window = config.get("sliding_window", 4096) or 0
    only = SLIDING if window else FULL
    if other := {*options.layer_types(config, lambda i: only)} - {only}:
        raise ValueError(f"the layer type {other.pop()!r} is not supported for mistral")
    return {
        **options.heads(config, kv=8),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        **options.pattern([LayerKind(window, *options.rope(config, FULL, BASE))]),
    }


def _write_mistral(cfg: GPTConfig) -> dict[str, Any]:
    return {**_write_llama(cfg), "sliding_window": cfg.kind(0).window or None}


MISTRAL = LLAMA._replace(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys={
        **SIZES,
        "context_length": ("max_position_embeddings", 131_072),
        "tie_embeddings": ("tie_word_embeddings", False),
    },
    fixed={**ROTARY, "qkv_bias": False, "attn_bias": False, "mlp_bias": False},
    known=(*LLAMA.known, *WINDOWS),
    read=_read_mistral,
    write=_write_mistral,
)


# ---------------------------------------------------------------- Qwen 3


def _read_qwen3(config: Mapping) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) or 0
    window = window if config.get("use_sliding_window") else 0
    full_below = config.get("max_window_layers", 28)
    rope = options.rope(config, FULL, BASE)
    types = options.layer_types(
        config,
        lambda i: SLIDING if window and i >= full_below else FULL,
    )
    if SLIDING in types and not window:
        raise ValueError("config.json has sliding layers but no sliding_window")
    kinds = [LayerKind(window if name == SLIDING else 0, *rope) for name in types]
    return {
        **options.heads(config, head_dim=128, kv=32),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        "attn_bias": bool(config.get("attention_bias")),
        **options.pattern(kinds),
    }


def _write_windows(cfg: GPTConfig) -> dict[str, Any]:
    windows = [cfg.kind(i).window for i in range(cfg.n_layers)]
    return {
        "sliding_window": max(windows) or None,
        "layer_types": [SLIDING if window else FULL for window in windows],
    }


def _write_qwen3(cfg: GPTConfig) -> dict[str, Any]:
    keys = {**_write_llama(cfg), **_write_windows(cfg)}
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


# ---------------------------------------------------------------- Gemma 3


def _read_gemma3(config: Mapping) -> dict[str, Any]:
    if not {FULL, SLIDING} & (config.get("rope_parameters") or {FULL: 0}).keys():
        raise ValueError("rope_parameters should have an object for each type of layer")
    every = config.get("sliding_window_pattern") or 6
    types = options.layer_types(config, lambda i: SLIDING if (i + 1) % every else FULL)
    window = config.get("sliding_window", 4096) or 0
    kinds = {
        FULL: LayerKind(0, *options.rope(config, FULL, ("rope_theta", 1_000_000.0))),
        SLIDING: LayerKind(
            window,
            *options.rope(config, SLIDING, ("rope_local_base_freq", 10_000.0)),
        ),
    }
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
        **options.pattern(kinds[name] for name in types),
    }


def _write_gemma3(cfg: GPTConfig) -> dict[str, Any]:
    kinds = [cfg.kind(i) for i in range(cfg.n_layers)]
    full = next((kind for kind in kinds if not kind.window), kinds[0])
    local = next((kind for kind in kinds if kind.window), kinds[0])
    old = options.write_rope(full)
    return {
        **options.write_heads(cfg),
        **_write_windows(cfg),
        "hidden_activation": "gelu_pytorch_tanh"
        if cfg.activation == "gelu_tanh"
        else ACTIVATIONS[cfg.activation][0],
        "query_pre_attn_scalar": round(cfg.query_scale**-2),
        "final_logit_softcapping": cfg.logit_softcap or None,
        "rope_theta": old["rope_theta"],
        "rope_scaling": old["rope_scaling"],
        "rope_local_base_freq": local.rope_base,
        "rope_parameters": {
            FULL: options.rope_keys(full),
            SLIDING: options.rope_keys(local),
        },
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
        *_block(
            ("norm1/scale", "input_layernorm.weight", VECTOR),
            ("post1/scale", "post_attention_layernorm.weight", VECTOR),
            ("norm2/scale", "pre_feedforward_layernorm.weight", VECTOR),
            ("post2/scale", "post_feedforward_layernorm.weight", VECTOR),
        ),
    ),
)


# ---------------------------------------------------------------- nanochat


def _read_nanochat(config: Mapping) -> dict[str, Any]:
    cap = config.get("final_logit_softcapping", 15.0)
    return {
        **_read_llama(config),
        "activation": options.activation(config.get("hidden_act") or "relu2"),
        "logit_softcap": cap or 0.0,
    }


def _write_nanochat(cfg: GPTConfig) -> dict[str, Any]:
    return {
        **_write_llama(cfg),
        "final_logit_softcapping": cfg.logit_softcap or None,
    }


# It turns queries and keys the other way round, which is our way with the two halves
# of a head exchanged; and it turns before it normalises, which is the same because a
# rotation keeps lengths and these norms have no scale.
NANOCHAT = LLAMA._replace(
    model_type="nanochat",
    architecture="NanoChatForCausalLM",
    keys={
        **SIZES,
        "tie_embeddings": ("tie_word_embeddings", False),
        "qkv_bias": ("attention_bias", False),
    },
    fixed={
        **{**ROTARY, "qk_norm": True, "mlp_bias": False, "gated": False},
        **{"norm_scale": False, "embed_norm": True},
    },
    known=(*LLAMA.known, "final_logit_softcapping"),
    read=_read_nanochat,
    write=_write_nanochat,
    rows=(
        *(row for row in ENDS if "norm" not in row.ours),
        *_block(
            ("attn/query/kernel", "self_attn.q_proj.weight", SWAPPED),
            ("attn/key/kernel", "self_attn.k_proj.weight", SWAPPED),
            ("attn/value/kernel", "self_attn.v_proj.weight", LINEAR),
            ("attn/out/kernel", "self_attn.o_proj.weight", LINEAR),
            ("attn/query/bias", "self_attn.q_proj.bias", SWAPPED_VECTOR),
            ("attn/key/bias", "self_attn.k_proj.bias", SWAPPED_VECTOR),
            ("attn/value/bias", "self_attn.v_proj.bias", VECTOR),
            ("attn/out/bias", "self_attn.o_proj.bias", VECTOR),
            ("mlp/up/kernel", "mlp.fc1.weight", LINEAR),
            ("mlp/down/kernel", "mlp.fc2.weight", LINEAR),
        ),
    ),
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
        **_read_llama({**config, "hidden_act": name}),
        **options.heads(config, head_dim=256, kv=16),
        "embed_scale": config["hidden_size"] ** 0.5,
    }


def _write_gemma(cfg: GPTConfig) -> dict[str, Any]:
    name = _gemma_activation(cfg)
    return {**_write_llama(cfg), "hidden_act": name, "hidden_activation": name}


def _gemma_activation(cfg: GPTConfig) -> str:
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


# ---------------------------------------------------------------- Gemma 2


def _read_gemma2(config: Mapping) -> dict[str, Any]:
    types = options.layer_types(config, lambda i: SLIDING if (i + 1) % 2 else FULL)
    window = config.get("sliding_window", 4096) or 0
    rope = options.rope(config, FULL, BASE)
    kinds = [LayerKind(window if name == SLIDING else 0, *rope) for name in types]
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
        **options.pattern(kinds),
    }


def _write_gemma2(cfg: GPTConfig) -> dict[str, Any]:
    return {
        **options.write_heads(cfg),
        **_write_windows(cfg),
        **options.write_rope(cfg.kind(0)),
        "hidden_activation": _gemma_activation(cfg),
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


# ---------------------------------------------------------------- StarCoder 2


def _read_starcoder2(config: Mapping) -> dict[str, Any]:
    window = config.get("sliding_window") or 0
    return {
        **options.heads(config, kv=2),
        "activation": options.activation(
            config.get("hidden_act") or "gelu_pytorch_tanh"
        ),
        **options.pattern([LayerKind(window, *options.rope(config, FULL, BASE))]),
    }


def _write_starcoder2(cfg: GPTConfig) -> dict[str, Any]:
    return {**_write_mistral(cfg), "hidden_act": _gemma_activation(cfg)}


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
        *_two_layers("mlp.c_fc", "mlp.c_proj"),
    ),
)


# ---------------------------------------------------------------- Arcee

ARCEE = LLAMA._replace(
    model_type="arcee",
    architecture="ArceeForCausalLM",
    keys={
        **LLAMA.keys,
        "context_length": ("max_position_embeddings", 4096),
        "norm_eps": ("rms_norm_eps", 1e-5),
    },
    fixed={**ROTARY, "gated": False},
    read=lambda config: _read_llama({"hidden_act": "relu2", **config}),
    rows=tuple(row for row in LLAMA.rows if "gate" not in row.ours),
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
        *(
            row
            for row in GPT2.rows
            if "attn" not in row.ours and "/kernel" not in row.ours
        ),
        Row("head/kernel", "lm_head.weight", LINEAR),
        Row("block_{i}/mlp/up/kernel", "h.{i}.mlp.c_fc.weight", LINEAR),
        Row("block_{i}/mlp/down/kernel", "h.{i}.mlp.c_proj.weight", LINEAR),
        *(
            Row(f"block_{{i}}/attn/{ours}", f"h.{{i}}.attn.attention.{theirs}", layout)
            for ours, theirs, layout in (
                ("query/kernel", "q_proj.weight", LINEAR),
                ("key/kernel", "k_proj.weight", LINEAR),
                ("value/kernel", "v_proj.weight", LINEAR),
                ("out/kernel", "out_proj.weight", LINEAR),
                ("out/bias", "out_proj.bias", VECTOR),
            )
        ),
    ),
    zeros=(),
)


# ---------------------------------------------------------------- Granite


def _read_granite(config: Mapping) -> dict[str, Any]:
    return {
        **_read_llama(config),
        **{
            field: float(config.get(key) or 1.0)
            for field, key in (
                ("embed_scale", "embedding_multiplier"),
                ("query_scale", "attention_multiplier"),
                ("residual_scale", "residual_multiplier"),
                ("logit_divisor", "logits_scaling"),
            )
        },
    }


def _write_granite(cfg: GPTConfig) -> dict[str, Any]:
    return {
        **_write_llama(cfg),
        "embedding_multiplier": cfg.embed_scale,
        "attention_multiplier": cfg.query_scale,
        "residual_multiplier": cfg.residual_scale,
        "logits_scaling": cfg.logit_divisor,
    }


GRANITE = LLAMA._replace(
    model_type="granite",
    architecture="GraniteForCausalLM",
    fixed=ROTARY,
    known=(
        *(*LLAMA.known, "embedding_multiplier", "attention_multiplier"),
        *("residual_multiplier", "logits_scaling"),
    ),
    read=_read_granite,
    write=_write_granite,
)


# ---------------------------------------------------------------- SmolLM 3


def _read_smollm3(config: Mapping) -> dict[str, Any]:
    base, scaling = options.rope(config, FULL, ("rope_theta", 2_000_000.0))
    count, every = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers")
    if turned is None:
        turned = [int((i + 1) % every != 0) for i in range(count)]
    if len(turned) != count or not {*map(repr, turned)} <= {"0", "1"}:
        raise ValueError(
            f"no_rope_layers should be {count} numbers, 1 where a layer has rotary "
            "positions and else 0"
        )
    window = config.get("sliding_window") or 0
    window = window if config.get("use_sliding_window") else 0
    types = options.layer_types(
        config, lambda i: SLIDING if window and not turned[i] else FULL
    )
    if SLIDING in types and not window:
        raise ValueError("config.json has sliding layers but no sliding_window in use")
    return {
        **options.heads(config, kv=4),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        "attn_bias": bool(config.get("attention_bias")),
        **options.pattern(
            LayerKind(window if name == SLIDING else 0, base if turn else 0.0, scaling)
            for name, turn in zip(types, turned, strict=True)
        ),
    }


def _write_smollm3(cfg: GPTConfig) -> dict[str, Any]:
    kinds = [cfg.kind(i) for i in range(cfg.n_layers)]
    turned = next((kind for kind in kinds if kind.rope_base), None)
    keys = {
        **options.write_heads(cfg),
        **_write_windows(cfg),
        "hidden_act": ACTIVATIONS[cfg.activation][0],
        **(options.write_rope(turned) if turned else {}),
        "no_rope_layers": [int(kind.rope_base > 0) for kind in kinds],
    }
    return {**keys, "use_sliding_window": bool(keys["sliding_window"])}


SMOLLM3 = LLAMA._replace(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    keys={
        **LLAMA.keys,
        "context_length": ("max_position_embeddings", 32_768),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    known=(
        *(*LLAMA.known, *WINDOWS, "use_sliding_window"),
        *("no_rope_layers", "no_rope_layer_interval"),
    ),
    read=_read_smollm3,
    write=_write_smollm3,
)


# ---------------------------------------------------------------- OLMo 1 and 2


OLMO = LLAMA._replace(
    model_type="olmo",
    architecture="OlmoForCausalLM",
    keys={k: v for k, v in LLAMA.keys.items() if k not in ("norm_eps", "mlp_bias")},
    fixed={
        **{**ROTARY, "norm": "layernorm", "norm_scale": False, "norm_eps": 1e-5},
        "mlp_bias": False,
    },
    always={"clip_qkv": None},
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
        *_block(
            ("post1/scale", "post_attention_layernorm.weight", VECTOR),
            ("post2/scale", "post_feedforward_layernorm.weight", VECTOR),
        ),
    ),
)


# ---------------------------------------------------------------- Phi 3 and 4


def _read_phi3(config: Mapping) -> dict[str, Any]:
    rope = options.rope(config, FULL, BASE)
    if rope[1] is not None:
        raise ValueError(f"the rope scaling {rope[1].kind} is not supported for phi3")
    window = config.get("sliding_window") or 0
    return {
        **options.heads(config),
        **options.rotary(config, 1.0),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        **options.pattern([LayerKind(window, *rope)]),
    }


def _write_phi3(cfg: GPTConfig) -> dict[str, Any]:
    return {**_write_partial(cfg), "sliding_window": cfg.kind(0).window or None}


def _write_partial(cfg: GPTConfig) -> dict[str, Any]:
    """As `_write_llama`, where some features of a head may be left unrotated."""
    keys, share = _write_llama(cfg), cfg.rotary_dim / cfg.head_dim
    rope = {**keys["rope_parameters"], "partial_rotary_factor": share}
    return {**keys, "rope_parameters": rope, "partial_rotary_factor": share}


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
        *_fused("attn/{}/kernel", "self_attn.qkv_proj.weight", *QKV),
        *_fused("mlp/{}/kernel", "mlp.gate_up_proj.weight", "gate", "up"),
        *_block(
            ("attn/out/kernel", "self_attn.o_proj.weight", LINEAR),
            ("mlp/down/kernel", "mlp.down_proj.weight", LINEAR),
        ),
    ),
)


# ---------------------------------------------------------------- Phi 1, 1.5 and 2


def _read_phi(config: Mapping) -> dict[str, Any]:
    return {
        **_read_llama({"hidden_act": "gelu_new", **config}),
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
    write=_write_partial,
    rows=(
        *(row for row in ENDS if row.ours != "final_norm/scale"),
        *(
            row._replace(theirs=row.theirs.replace("o_proj", "dense"))
            for row in ATTENTION
        ),
        Row("final_norm/scale", "final_layernorm.weight", VECTOR),
        Row("final_norm/bias", "final_layernorm.bias", VECTOR),
        Row("head/bias", "lm_head.bias", VECTOR),
        *_block(
            ("norm1/scale", "input_layernorm.weight", VECTOR),
            ("norm1/bias", "input_layernorm.bias", VECTOR),
        ),
        *_two_layers("mlp.fc1", "mlp.fc2"),
    ),
)


# ---------------------------------------------------------------- GPT-NeoX, Pythia


def _read_gpt_neox(config: Mapping) -> dict[str, Any]:
    if {FULL, SLIDING} & (config.get("rope_parameters") or {}).keys():
        raise ValueError("rope_parameters for each type of layer are not supported")
    if config.get("partial_rotary_factor") is not None:
        raise ValueError("partial_rotary_factor is called rotary_pct for gpt_neox")
    rope = options.rope(config, FULL, ("rotary_emb_base", 10_000.0))
    share = config.get("rotary_pct")
    return {
        **options.heads(config),
        **options.rotary(config, 0.25 if share is None else share),
        "activation": options.activation(config.get("hidden_act") or "gelu"),
        "parallel": "own" if config.get("use_parallel_residual", True) else "no",
        **options.pattern([LayerKind(0, *rope)]),
    }


def _write_gpt_neox(cfg: GPTConfig) -> dict[str, Any]:
    keys = _write_partial(cfg)
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
            for row in _fused(
                f"attn/{{}}/{'kernel' if leaf == 'weight' else leaf}",
                f"attention.query_key_value.{leaf}",
                *QKV,
            )
        ),
        *NORMS,
        *_block(
            ("attn/out/kernel", "attention.dense.weight", LINEAR),
            ("attn/out/bias", "attention.dense.bias", VECTOR),
        ),
        *_two_layers("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
)


# ---------------------------------------------------------------- StableLM


def _read_stablelm(config: Mapping) -> dict[str, Any]:
    return {
        **_read_llama({"num_key_value_heads": 32, **config}),
        **options.rotary(config, 0.25),
        "attn_bias": False,
        "parallel": "shared" if config.get("use_parallel_residual") else "no",
    }


def _write_stablelm(cfg: GPTConfig) -> dict[str, Any]:
    keys = {k: v for k, v in _write_partial(cfg).items() if k != "head_dim"}
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

TABLE = {
    family.model_type: family
    for family in (
        *(GPT2, LLAMA, MISTRAL, QWEN3, GEMMA3, NANOCHAT),
        *(QWEN2, GEMMA, GEMMA2, STARCODER2, ARCEE, GPT_NEO),
        *(GRANITE, SMOLLM3, OLMO, OLMO2, PHI3, PHI, GPT_NEOX, STABLELM),
    )
}
