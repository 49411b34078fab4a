"""Llama and its nearest kin: RoPE, RMSNorm, a gated MLP, grouped-query attention."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families.family import (
    ATTENTION,
    ENDS,
    GATED_MLP,
    NORMS,
    ROTARY,
    SIZES,
    Family,
)
from gpt_jax.pretrained.options import (
    ACTIVATIONS,
    FULL,
    HEADS,
    ROPE,
    SLIDING,
    WINDOWS,
)

# ---------------------------------------------------------------- Llama


def read(config: Mapping) -> dict[str, Any]:
    """Returns the fields that its keys alone do not give; see `Family.read`."""
    return {
        **options.heads(config),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        "attn_bias": bool(config.get("attention_bias")),
        **options.pattern([LayerKind(0, *options.rope(config))]),
    }


def write(cfg: GPTConfig) -> dict[str, Any]:
    """Returns what `read` reads; see `Family.write`."""
    return {
        **options.write_heads(cfg),
        "hidden_act": ACTIVATIONS[cfg.activation][0],
        **options.write_rope(cfg.kind(0)),  # where layers differ, reading back shows it
    }


def write_partial(cfg: GPTConfig) -> dict[str, Any]:
    """As `write`, where some features of a head may be left unrotated."""
    keys, share = write(cfg), cfg.rotary_dim / cfg.head_dim
    rope = {**keys["rope_parameters"], "partial_rotary_factor": share}
    return {**keys, "rope_parameters": rope, "partial_rotary_factor": share}


def write_windows(cfg: GPTConfig) -> dict[str, Any]:
    """Returns the keys of windows that some layers have and others have not."""
    windows = [cfg.kind(i).window for i in range(cfg.n_layers)]
    return {
        "sliding_window": max(windows) or None,
        "layer_types": [SLIDING if window else FULL for window in windows],
    }


def full_and_sliding(cfg: GPTConfig) -> tuple[LayerKind, LayerKind]:
    """Returns a layer that sees all and one with a window, or twice what there is."""
    kinds = [cfg.kind(i) for i in range(cfg.n_layers)]
    full = next((kind for kind in kinds if not kind.window), kinds[0])
    return full, next((kind for kind in kinds if kind.window), kinds[0])


def write_turned(cfg: GPTConfig) -> dict[str, Any]:
    """As `write`, where some layers have windows and some do not rotate."""
    kinds = [cfg.kind(i) for i in range(cfg.n_layers)]
    turned = next((kind for kind in kinds if kind.rope_base), None)
    return {
        **options.write_heads(cfg),
        **write_windows(cfg),
        "hidden_act": ACTIVATIONS[cfg.activation][0],
        **(options.write_rope(turned) if turned else {}),
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
    read=read,
    write=write,
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
        **options.pattern([LayerKind(window, *options.rope(config))]),
    }


def write_mistral(cfg: GPTConfig) -> dict[str, Any]:
    """As `write`, with one window for all layers."""
    return {**write(cfg), "sliding_window": cfg.kind(0).window or None}


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
    write=write_mistral,
)


# ---------------------------------------------------------------- Ministral


def _read_ministral(config: Mapping) -> dict[str, Any]:
    window, rope = config.get("sliding_window", 4096) or 0, options.rope(config)
    types = options.layer_types(config, lambda i: SLIDING if window else FULL)
    return {
        **options.heads(config, kv=8),
        "activation": options.activation(config.get("hidden_act") or "silu"),
        **options.pattern(options.kinds(types, window, full=rope, sliding=rope)),
    }


MINISTRAL = MISTRAL._replace(
    model_type="ministral",
    architecture="MinistralForCausalLM",
    read=_read_ministral,
    write=lambda cfg: {**write(cfg), **write_windows(cfg)},
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
    read=lambda config: read({"hidden_act": "relu2", **config}),
    rows=tuple(row for row in LLAMA.rows if "gate" not in row.ours),
)


# ---------------------------------------------------------------- Granite


def _read_granite(config: Mapping) -> dict[str, Any]:
    return {
        **read(config),
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
        **write(cfg),
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
    base, scaling = options.rope(config, ("rope_theta", 2_000_000.0))
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
    keys, kinds = write_turned(cfg), [cfg.kind(i) for i in range(cfg.n_layers)]
    return {
        **keys,
        "no_rope_layers": [int(kind.rope_base > 0) for kind in kinds],
        "use_sliding_window": bool(keys["sliding_window"]),
    }


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
