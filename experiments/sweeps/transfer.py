"""Learning rate x width x parametrisation: does the best rate stay put?

What: seven rates for each of the widths 64 to 512 of the tiny quickstart model, AdamW,
  once in standard parametrisation and once in mup.
Expected: under standard the best rate falls as the width grows; under mup it moves by
  one step of the row, a factor of 2, at most. So a rate that was found at width 64
  serves at 512.
Time: half an hour on 2 CPU cores.
Command: python -m experiments.sweep --engine=vmap \\
  --sweep=experiments/sweeps/transfer.py
"""

from gpt_jax.sweep.space import grid, product, together

config = "configs/quickstart.py:size=tiny"
fixed = {
    "steps": 200,
    "eval_every": 50,
    "eval_windows": 64,
    "checkpoint_every": 200,
    "sample_every": 0,
    "batch_size": 8,
    "optimizer.name": "adamw",
    "hyper.warmup_steps": 20.0,
    "model.zero_init": False,  # it would hide what the width does at the start
}
labels = {"model.d_model": "width", "hyper.lr": "learning rate"}
labels |= {"model.param": "parametrisation"}
at = "last"


def points():
    heads = (2, 4, 8, 16)
    widths = {"model.d_model": [32 * n for n in heads], "model.n_heads": heads}
    shapes = product(grid({"model.param": ("standard", "mup")}), together(widths))
    return product(shapes, grid({"hyper.lr": [5e-4 * 2**i for i in range(7)]}))
