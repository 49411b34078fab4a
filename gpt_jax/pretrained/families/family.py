"""What a family of published models is, and what several have in common.

A family is data: which key of config.json is which field of GPTConfig, what its
architecture fixes, and for each of our weights the name and the layout of theirs.
Import and export read the same tables, so each is the inverse of the other.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gpt_jax.model import GPTConfig
from gpt_jax.pretrained.layouts import EMBEDDING, LINEAR, VECTOR, Row


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
      own_rows: config.json -> the rows that depend on it; they go before the others.
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
    own_rows: Callable[[Mapping], tuple[Row, ...]] = lambda config: ()
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


def block(*rows: tuple[str, str, Any], under: str = "layers") -> tuple[Row, ...]:
    """Returns rows of every layer: (our path in it, theirs, how it lies there)."""
    return tuple(
        Row(f"block_{{i}}/{ours}", f"{under}.{{i}}.{theirs}", layout)
        for ours, theirs, layout in rows
    )


QKV = ("query", "key", "value")


def fused(
    ours: str, theirs: str, *parts: str, under: str = "layers"
) -> tuple[Row, ...]:
    """Returns the rows of weights that lie in one tensor, in this order."""
    layout = LINEAR if theirs.endswith(".weight") else VECTOR
    where = f"{under}.{{i}}.{theirs}"
    return tuple(
        Row(f"block_{{i}}/{ours.format(part)}", where, layout, number, len(parts))
        for number, part in enumerate(parts)
    )


ENDS = (
    Row("embed/embedding", "embed_tokens.weight", EMBEDDING),
    Row("final_norm/scale", "norm.weight", VECTOR),
    Row("head/kernel", "lm_head.weight", LINEAR),
)
ATTENTION = block(
    ("attn/query/kernel", "self_attn.q_proj.weight", LINEAR),
    ("attn/key/kernel", "self_attn.k_proj.weight", LINEAR),
    ("attn/value/kernel", "self_attn.v_proj.weight", LINEAR),
    ("attn/out/kernel", "self_attn.o_proj.weight", LINEAR),
    ("attn/query/bias", "self_attn.q_proj.bias", VECTOR),
    ("attn/key/bias", "self_attn.k_proj.bias", VECTOR),
    ("attn/value/bias", "self_attn.v_proj.bias", VECTOR),
    ("attn/out/bias", "self_attn.o_proj.bias", VECTOR),
)
QK_NORM = block(
    ("attn/query_norm/scale", "self_attn.q_norm.weight", VECTOR),
    ("attn/key_norm/scale", "self_attn.k_norm.weight", VECTOR),
)
NORMS = block(
    ("norm1/scale", "input_layernorm.weight", VECTOR),
    ("norm2/scale", "post_attention_layernorm.weight", VECTOR),
)
NORM_BIASES = (
    Row("final_norm/bias", "norm.bias", VECTOR),
    *block(
        ("norm1/bias", "input_layernorm.bias", VECTOR),
        ("norm2/bias", "post_attention_layernorm.bias", VECTOR),
    ),
)


def two_layers(up: str, down: str, under: str = "layers") -> tuple[Row, ...]:
    """Returns the rows of an MLP without a gate, by the names of its layers."""
    return block(
        ("mlp/up/kernel", f"{up}.weight", LINEAR),
        ("mlp/up/bias", f"{up}.bias", VECTOR),
        ("mlp/down/kernel", f"{down}.weight", LINEAR),
        ("mlp/down/bias", f"{down}.bias", VECTOR),
        under=under,
    )


GATED_MLP = block(
    ("mlp/gate/kernel", "mlp.gate_proj.weight", LINEAR),
    ("mlp/up/kernel", "mlp.up_proj.weight", LINEAR),
    ("mlp/down/kernel", "mlp.down_proj.weight", LINEAR),
    ("mlp/gate/bias", "mlp.gate_proj.bias", VECTOR),
    ("mlp/up/bias", "mlp.up_proj.bias", VECTOR),
    ("mlp/down/bias", "mlp.down_proj.bias", VECTOR),
)
