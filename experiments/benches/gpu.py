"""The rows that need a GPU; elsewhere they say so, and run as toys on a CPU.

Each function returns the matches of the row of its name.
"""

from typing import Any

from experiments.benches.cpu import OURS, PEERS, population, races
from experiments.benches.match import Match
from experiments.benches.setting import (
    GPT2,
    GPT2_TOKENS,
    GPT2_XL,
    Setting,
    recipe,
    shape,
)
from experiments.benches.worker import Side

# Both sides hold the card at the same time: JAX must not take nearly all of it.
SHARE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
CORRECT = "experiments.benches.correct"
TORCH = "PyTorch, compiled"
TARGET_LOSS = 1.4697  # nanoGPT's best, as its README has it
FAST = {"dtype": "bfloat16", "vocab_multiple": 128}

# What each step to the fast program bought; each holds the ones before it.
# (name, batch, loss_chunk, what changes in the model.)
ABLATION: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("float32, plain attention", 8, 0, {"attention": "plain"}),
    ("+ bfloat16", 8, 0, {"dtype": "bfloat16"}),
    ("+ cuDNN attention", 8, 0, {"attention": "auto"}),
    ("+ vocabulary of 128 k rows", 8, 0, {"vocab_multiple": 128}),
    ("+ loss in chunks, batch 32", 32, 8192, {}),
)


def gpu_train_124m(setting: Setting) -> list[Match]:
    """Training GPT-2 small at T 1024."""
    return [_train(setting, "gpu_train_124m", GPT2, batch=32, goal=1.0)]


def gpu_train_1_5b(setting: Setting) -> list[Match]:
    """Training GPT-2 XL at T 1024, with rematerialisation."""
    deep = {"scan_layers": True, "remat": "full"}
    return [_train(setting, "gpu_train_1.5b", GPT2_XL, batch=8, goal=1.0, **deep)]


def gpu_time_to_loss(setting: Setting) -> list[Match]:
    """nanoGPT's shakespeare_char at its GPU size, from launch to its best loss."""
    size = {"seq_len": 256, "n_layers": 6, "n_heads": 6, "d_model": 384}
    name, stop_at, plan = "size=gpu", TARGET_LOSS, {"steps": 5000, "batch": 64}
    if setting.toy:
        size |= {"seq_len": 16, "n_layers": 1, "n_heads": 2, "d_model": 32}
        name, stop_at, plan = "size=tiny", 20.0, {"steps": 4, "batch": 4}
    device = "cpu" if setting.toy else "cuda"
    train = {"shape": {**size, "dropout": 0.2}, "recipe": plan}
    train |= {"device": device, "compiled": not setting.toy}
    config = f"configs/shakespeare_char.py:{name}"
    found = races("gpu_time_to_loss", setting, config, train, stop_at, None)
    return [_on_gpu(match, setting) for match in found]


def gpu_decode(setting: Setting) -> list[Match]:
    """Greedy text in bfloat16, random weights of GPT-2's size."""
    fixed = shape(GPT2, GPT2_TOKENS, setting)
    prompt, new = (4, 4) if setting.toy else (16, 512)
    device = "cpu" if setting.toy else "cuda"
    matches = []
    for batch in (1,) if setting.toy else (1, 8, 64):
        sizes = {"batch": batch, "prompt": prompt, "new": new}
        options = {"recipe": recipe(fixed, **FAST), "cached": True, **sizes}
        theirs = {"shape": fixed, "device": device, **sizes}
        match = Match(
            "gpu_decode",
            f"batch {batch}, {new} tokens",
            Side("gpt_jax", f"{OURS}:decode_rate", options),
            Side("Hugging Face generate", f"{PEERS}:decode_rate", theirs),
            "tokens/s",
        )
        matches.append(_on_gpu(match, setting))
    return matches


def gpu_ablation(setting: Setting) -> list[Match]:
    """What each step from the naive to the fast program bought, against the first."""
    switches: dict[str, Any] = {}
    matches: list[Match] = []
    for name, batch, chunk, more in ABLATION:
        switches |= more
        ours = _side(setting, GPT2, batch=batch, loss_chunk=chunk, **switches)
        naive = matches[0].ours._replace(name=ABLATION[0][0]) if matches else None
        match = Match("gpu_ablation", name, ours, naive, "tokens/s")
        matches.append(_on_gpu(match, setting))
    return [matches[0], matches[-1]] if setting.toy else matches


def gpu_population(setting: Setting) -> list[Match]:
    """The row population, its trials on the GPU."""
    found = [one._replace(row="gpu_population") for one in population(setting)]
    return [_on_gpu(one, setting) for one in found]


def gpu_correct(setting: Setting) -> list[Match]:
    """What the GPU computes against what the CPU does; goals are the most allowed."""
    fixed = shape({**GPT2, "n_layers": 2}, GPT2_TOKENS, setting)
    tokens = fixed["context"] if setting.toy else 128
    steps = {"recipe": recipe(fixed), "seq_len": tokens, "batch": 2}
    texts = {"recipe": recipe(fixed), "batch": 2, "prompt": 4}
    texts |= {"new": 4 if setting.toy else 64}
    heads = {"tokens": 17 if setting.toy else 1023, "heads": 4, "groups": 2}
    found = [
        ("losses of 20 steps", "losses_apart", steps, "relative", 1e-4),
        ("greedy ids", "ids_apart", texts, "ids", 0.0),
        ("resume", "resume_apart", steps, "weights", 0.0),
        ("cuDNN against XLA", "attention_apart", heads, "relative", 0.02),
    ]
    # What is added up in no certain order differs in the last bit.
    same = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
    return [
        _on_gpu(
            Match(
                "gpu_correct",
                name,
                Side("gpt_jax", f"{CORRECT}:{make}", options),
                None,
                unit,
                goal,
                repeats=1,
            ),
            setting,
            **same,
        )
        for name, make, options, unit, goal in found
    ]


# In the ten minutes that a card is lent for: what is right first, the longest last.
SUITE = (
    *("gpu_correct", "gpu_train_124m", "gpu_decode", "gpu_train_1.5b"),
    *("gpu_population", "gpu_ablation", "gpu_time_to_loss"),
)

ROWS = {
    "gpu_correct": gpu_correct,
    "gpu_train_124m": gpu_train_124m,
    "gpu_train_1.5b": gpu_train_1_5b,
    "gpu_time_to_loss": gpu_time_to_loss,
    "gpu_decode": gpu_decode,
    "gpu_ablation": gpu_ablation,
    "gpu_population": gpu_population,
}


def _train(
    setting: Setting, row: str, size: dict, *, batch: int, goal: float, **model: Any
) -> Match:
    fixed = shape(size, -(-GPT2_TOKENS // 128) * 128, setting)
    plain = {**fixed, "seq_len": fixed["context"], "bias": True}
    del plain["context"]
    device = "cpu" if setting.toy else "cuda"
    theirs = {"shape": plain, "batch": 4 if setting.toy else batch, "device": device}
    theirs |= {"seconds": setting.seconds, "compiled": not setting.toy}
    peer = Side(TORCH, f"{PEERS}:plain_step_rate", theirs)
    ours = _side(setting, size, batch=batch, **FAST, **model)
    shown = f"T {fixed['context']}, B {theirs['batch']}, bf16"
    return _on_gpu(Match(row, shown, ours, peer, "tokens/s", goal), setting)


def _side(
    setting: Setting, size: dict, *, batch: int, loss_chunk: int = 0, **model: Any
) -> Side:
    fixed = shape(size, GPT2_TOKENS, setting)
    options = {"recipe": recipe(fixed, **model), "seq_len": fixed["context"]}
    options |= {"batch": 4 if setting.toy else batch, "accumulate": 1}
    options |= {"seconds": setting.seconds}
    options["recipe"]["task"]["loss_chunk"] = (
        min(loss_chunk, 8) if setting.toy else loss_chunk
    )
    return Side("gpt_jax", f"{OURS}:train_step_rate", options)


def _on_gpu(match: Match, setting: Setting, **env: str) -> Match:
    """Returns the match as one that needs a GPU and shares its memory; not a toy."""
    if setting.toy:
        return match
    ours = match.ours._replace(env={**SHARE, **env})
    return match._replace(ours=ours, gpu=True)
