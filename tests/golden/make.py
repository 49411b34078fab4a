"""Makes the golden files: tiny random models of transformers, and what they compute.

    python -m tests.golden.make [NAME...]  # needs torch and transformers

For every model of MODELS, or of those named, tests/golden/<name> gets config.json and
model.safetensors, as transformers saves them, and answers.npz:

    ids [2, T], logits [2, T, V]            a full context of random ids
    prompt_<n>, greedy_<n> [32]             likeliest continuations, one by one
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CONTEXT, VOCAB, NEW = 64, 128, 32
PROMPTS = (3, 17, 30)  # tokens

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FALCON = {
    key: value
    for key, value in SIZES.items()
    if key not in ("num_key_value_heads", "intermediate_size")
}
# name: (transformers' class of the config, its arguments)
MODELS = {
    "gpt2": (
        "GPT2Config",
        {
            **{"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 32},
            **{"n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": None},
        },
    ),
    "llama": (
        "LlamaConfig",
        {**SIZES, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    # Everything that the one above leaves alone.
    "llama_biases": (
        "LlamaConfig",
        {
            **{**SIZES, "num_key_value_heads": 4, "head_dim": 12, "hidden_act": "gelu"},
            **{"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
            "rope_parameters": {
                **{"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
            },
        },
    ),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 8}),
    "qwen3": (
        "Qwen3Config",
        {
            **{**SIZES, "head_dim": 16, "use_sliding_window": True},
            **{"sliding_window": 8, "max_window_layers": 1},
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **{**SIZES, "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 8},
            **{"sliding_window_pattern": 3, "query_pre_attn_scalar": 24},
            **{"final_logit_softcapping": 10.0, "rope_theta": 5000.0},
            **{"rope_local_base_freq": 300.0},
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "ministral": (
        "MinistralConfig",
        {
            **{**SIZES, "head_dim": 12, "sliding_window": 8, "num_hidden_layers": 3},
            "layer_types": ["full_attention", *["sliding_attention"] * 2],
        },
    ),
    "nanochat": ("NanoChatConfig", SIZES),
    "qwen2": (
        "Qwen2Config",
        {
            **{**SIZES, "num_key_value_heads": 4, "use_sliding_window": True},
            **{"sliding_window": 8, "max_window_layers": 1},
        },
    ),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            **{**SIZES, "head_dim": 16, "sliding_window": 8},
            **{"query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0},
            "final_logit_softcapping": 10.0,
        },
    ),
    "starcoder2": ("Starcoder2Config", {**SIZES, "sliding_window": 8}),
    "arcee": ("ArceeConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **{"vocab_size": VOCAB, "max_position_embeddings": CONTEXT},
            **{"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8},
            **{"attention_types": [[["global", "local"], 1]]},
            **{"bos_token_id": None, "eos_token_id": None},
        },
    ),
    "gptj": (
        "GPTJConfig",
        {
            **{"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 32},
            **{"n_layer": 2, "n_head": 4, "rotary_dim": 6},
            **{"bos_token_id": None, "eos_token_id": None},
        },
    ),
    "granite": (
        "GraniteConfig",
        {
            **{**SIZES, "embedding_multiplier": 12.0, "attention_multiplier": 0.2},
            **{"residual_multiplier": 0.4, "logits_scaling": 13.0},
        },
    ),
    "smollm3": (
        "SmolLM3Config",
        {
            **{**SIZES, "num_hidden_layers": 3, "no_rope_layer_interval": 2},
            **{"use_sliding_window": True, "sliding_window": 8},
        },
    ),
    "olmo": ("OlmoConfig", {**SIZES, "clip_qkv": 0.8}),
    "olmo2": ("Olmo2Config", SIZES),
    "olmo3": (
        "Olmo3Config",
        {
            **{**SIZES, "num_hidden_layers": 4, "sliding_window": 8},
            "rope_parameters": {
                "full_attention": {
                    **{"rope_type": "yarn", "rope_theta": 700.0, "factor": 3.0},
                    **{"original_max_position_embeddings": 32, "beta_fast": 5.0},
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "exaone4": (
        "Exaone4Config",
        {
            **{**SIZES, "num_hidden_layers": 3, "sliding_window": 8},
            **{"sliding_window_pattern": 2, "rope_parameters": LLAMA3},
        },
    ),
    "cohere": (
        "CohereConfig",
        {**SIZES, "logit_scale": 0.3, "attention_bias": True, "rope_theta": 400.0},
    ),
    "cohere2": (
        "Cohere2Config",
        {**SIZES, "sliding_window": 8, "sliding_window_pattern": 2},
    ),
    "phi3": (
        "Phi3Config",
        {
            **{**SIZES, "sliding_window": 8},
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 500.0},
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "phi3_long": (
        "Phi3Config",
        {
            **{**SIZES, "original_max_position_embeddings": CONTEXT},
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0},
                **{"short_factor": [1.0, 1.3, 2.0], "long_factor": [2.0, 3.0, 4.0]},
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "opt": (
        "OPTConfig",
        {
            **{"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64},
            **{"num_hidden_layers": 2, "num_attention_heads": 4},
            **{"max_position_embeddings": CONTEXT, "pad_token_id": None},
            **{"bos_token_id": None, "eos_token_id": None},
        },
    ),
    "falcon": ("FalconConfig", FALCON),
    # The form of 40B.
    "falcon_new": (
        "FalconConfig",
        {
            **{**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
            **{"bias": True, "ffn_hidden_size": 48, "tie_word_embeddings": False},
        },
    ),
    "phi": ("PhiConfig", SIZES),
    "gpt_neox": (
        "GPTNeoXConfig",
        {
            **{key: SIZES[key] for key in SIZES if key != "num_key_value_heads"},
            "rotary_pct": 0.5,
        },
    ),
    "stablelm": ("StableLmConfig", {**SIZES, "use_qkv_bias": True}),
}


def build(name: str, *, seed: int, **changes):
    """Returns a model with weights so large that every part of it shows.

    Args:
      name: which of MODELS.
      seed: of the weights.
      **changes: arguments of its config that are other ones.
    """
    import torch
    import transformers

    kind, arguments = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**arguments, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for path, weight in model.named_parameters():
        draw = torch.randn_like(weight)
        if weight.ndim == 1:
            one = "norm" in path or "ln_" in path
            plus_one = name.startswith("gemma")  # the norms add it to their weights
            start = 1.0 if one and path.endswith("weight") and not plus_one else 0.0
            weight.data = start + 0.2 * draw
        elif "embed" in path or "wte" in path or "wpe" in path:
            weight.data = 0.3 * draw
        else:
            weight.data = 1.5 * draw / weight.shape[-1] ** 0.5
        if "embed_positions" in path:
            weight.data[:2] = 0  # OPT reads none of them
    return model.eval()


def answers(model, *, seed: int) -> dict[str, np.ndarray]:
    """Returns what a model computes, as the module's docstring says."""
    import torch

    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (2, CONTEXT))
    with torch.no_grad():
        found = {"ids": ids, "logits": model(torch.tensor(ids)).logits.numpy()}
        for number, length in enumerate(PROMPTS):
            prompt = rng.integers(0, VOCAB, length)
            out = model.generate(
                torch.tensor(prompt)[None],
                attention_mask=torch.ones(1, length, dtype=torch.long),
                do_sample=False,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
            )
            found[f"prompt_{number}"] = prompt
            found[f"greedy_{number}"] = out[0, length:].numpy()
    return found


def main() -> None:
    from transformers import AutoModelForCausalLM

    for name in sys.argv[1:] or MODELS:
        model = build(name, seed=0)
        if name == "gemma3":  # as it is published: in bfloat16, and in several files
            model.bfloat16().save_pretrained(HERE / name, max_shard_size="60KB")
        else:
            model.save_pretrained(HERE / name)
        model = AutoModelForCausalLM.from_pretrained(HERE / name, dtype="float32")
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        arrays: dict = answers(model, seed=1)
        np.savez_compressed(HERE / name / "answers.npz", **arrays)
        print(name, sum(p.stat().st_size for p in (HERE / name).iterdir()), "bytes")


if __name__ == "__main__":
    main()
