"""Which shape for how much compute? Width, depth, heads and batch at the same tokens.

What: a search of 12 draws over shape, batch and rate of the tiny model, each draw with
  two seeds, whose mean is judged. Heads must divide the width into heads of at least 8,
  the steps make 38,400 tokens of every batch, and FLOPs are a second objective: the
  search looks for what nothing beats for less.
Expected: the front in the report and on the screen: from 2.45 for 5 GFLOPs to 2.31 for
  92; the dearest of all is not on it.
Time: about 6 minutes on 2 CPU cores.
Command: python -m experiments.sweep --sweep=experiments/sweeps/shape.py
"""

from gpt_jax.sweep.space import choice, integer, log_uniform

config = "configs/quickstart.py:size=tiny"
fixed = {
    "eval_every": 0,
    "eval_windows": 64,
    "checkpoint_every": 10_000,
    "sample_every": 0,
    "early_from": 0,
    "optimizer.name": "adamw",
    "hyper.warmup_steps": 10.0,
    "tensorboard": False,
}
space = {
    "width": integer(16, 96, step=16),
    "layers": integer(1, 4),
    "heads": choice(1, 2, 3, 4),
    "batch": choice(4, 8, 16),
    "rate": log_uniform(2e-3, 3e-2),
}
first = ({"width": 64, "layers": 2, "heads": 2, "batch": 8, "rate": 8e-3},)
trials = 12
seeds = 2
cost = "flops"

_TOKENS, _WINDOW = 38_400, 32


def to_config(drawn):
    width, heads = drawn["width"], drawn["heads"]
    if width % heads or width // heads < 8 or width // heads % 2:
        return None  # heads of even size, for rotary positions
    return {
        "model.d_model": width,
        "model.n_layers": drawn["layers"],
        "model.n_heads": heads,
        "batch_size": drawn["batch"],
        "steps": _TOKENS // (drawn["batch"] * _WINDOW),
        "hyper.lr": drawn["rate"],
    }
