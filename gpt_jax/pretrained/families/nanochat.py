"""nanochat: squared ReLU, norms without weights, soft-capped logits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families import llama
from gpt_jax.pretrained.families.family import ENDS, ROTARY, SIZES, block
from gpt_jax.pretrained.families.llama import LLAMA
from gpt_jax.pretrained.layouts import LINEAR, SWAPPED, SWAPPED_VECTOR, VECTOR


def _read_nanochat(config: Mapping) -> dict[str, Any]:
    cap = config.get("final_logit_softcapping", 15.0)
    base, scaling = options.rope(config)
    if scaling is not None and scaling.size != 1:  # its norms take lengths back
        scaling = replace(scaling, attention_factor=1.0)
    return {
        **llama.read(config),
        **options.pattern([LayerKind(0, base, scaling)]),
        "activation": options.activation(config.get("hidden_act") or "relu2"),
        "logit_softcap": cap or 0.0,
    }


def _write_nanochat(cfg: GPTConfig) -> dict[str, Any]:
    return {
        **llama.write(cfg),
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
        *block(
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
