"""OLMo: norms without weights, and then behind each sublayer instead of before it."""

from gpt_jax.pretrained.families.family import (
    ATTENTION,
    ENDS,
    GATED_MLP,
    QK_NORM,
    ROTARY,
    block,
)
from gpt_jax.pretrained.families.llama import LLAMA
from gpt_jax.pretrained.layouts import VECTOR

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
        *block(
            ("post1/scale", "post_attention_layernorm.weight", VECTOR),
            ("post2/scale", "post_feedforward_layernorm.weight", VECTOR),
        ),
    ),
)
