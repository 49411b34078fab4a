"""Characters, bytes or BPE, small or large model: after the same bytes of text.

What: five tokenizers and two widths of the tiny model. A token is one byte of text or
  three, so runs of the same steps would not have read the same text: `max_bytes` ends
  each after 300,000 bytes, and bits per byte compare what losses per token cannot.
Expected: BPE ahead of bytes and characters, 1.93 bits per byte with 2,000 tokens at
  width 96; at the same number of parameters a larger vocabulary beats a wider model.
Time: about 6 minutes on 2 CPU cores.
Command: python -m experiments.sweep --sweep=experiments/sweeps/vocabulary.py
"""

from gpt_jax.sweep.space import grid

config = "configs/quickstart.py:size=tiny"
metric = "val_bpb"
cost = "parameters"
fixed = {
    "data.source": "builtin:asyncio",
    "steps": 20_000,
    "max_bytes": 300_000,
    "eval_every": 0,
    "eval_windows": 128,
    "early_from": 0,
    "checkpoint_every": 10_000,
    "sample_every": 0,
    "optimizer.name": "adamw",
    "hyper.lr": 8e-3,
    "hyper.warmup_steps": 20.0,
    "tensorboard": False,
}
labels = {"data.tokenizer": "tokenizer", "model.d_model": "width"}


def points():
    tokenizers = ("char", "byte", "bpe:300", "bpe:500", "bpe:2000")
    return grid({"data.tokenizer": tokenizers, "model.d_model": (32, 96)})
