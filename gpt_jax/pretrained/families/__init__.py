"""The families of published models, as tables: one file for each kin.

`TABLE` has them all; an export is of the first one in it that can say the model.
"""

from gpt_jax.pretrained.families.cohere import COHERE, COHERE2
from gpt_jax.pretrained.families.falcon import FALCON
from gpt_jax.pretrained.families.family import REQUIRED, Family
from gpt_jax.pretrained.families.gemma import GEMMA, GEMMA2, GEMMA3
from gpt_jax.pretrained.families.gpt2 import GPT2, GPT_NEO, GPTJ
from gpt_jax.pretrained.families.layernorm import STABLELM, STARCODER2
from gpt_jax.pretrained.families.llama import (
    ARCEE,
    GRANITE,
    LLAMA,
    MINISTRAL,
    MISTRAL,
    SMOLLM3,
)
from gpt_jax.pretrained.families.nanochat import NANOCHAT
from gpt_jax.pretrained.families.neox import GPT_NEOX
from gpt_jax.pretrained.families.olmo import EXAONE4, OLMO, OLMO2, OLMO3
from gpt_jax.pretrained.families.opt import OPT
from gpt_jax.pretrained.families.phi import PHI, PHI3
from gpt_jax.pretrained.families.qwen import QWEN2, QWEN3

__all__ = ["REQUIRED", "TABLE", "Family"]

TABLE = {
    family.model_type: family
    for family in (
        OPT,  # before GPT-2, which could say all of it
        *(GPT2, LLAMA, MISTRAL, QWEN3, GEMMA3, NANOCHAT),
        *(QWEN2, GEMMA, GEMMA2, STARCODER2, ARCEE, GPT_NEO),
        *(GRANITE, MINISTRAL, SMOLLM3, OLMO, OLMO2, OLMO3, EXAONE4),
        *(PHI3, PHI, GPT_NEOX, STABLELM, COHERE, COHERE2, GPTJ, FALCON),
    )
}
