"""Coordinate check: do logits grow alike at every width?

What: ten steps of AdamW at one rate, at widths 64 to 512 of the tiny quickstart model,
  in standard parametrisation and in mup; then the size of the logits is measured.
Expected: the report's picture of logit_size over width: under standard it grows with
  the width, under mup it stays (Yang et al. 2022, "Tensor Programs V", section D.1).
Time: 2 minutes on 2 CPU cores.
Command: python -m experiments.sweep --engine=vmap \\
  --sweep=experiments/sweeps/coordinate_check.py
"""

from gpt_jax.sweep.after import logit_size
from gpt_jax.sweep.space import grid, product, together

config = "configs/quickstart.py:size=tiny"
fixed = {
    "steps": 10,
    "eval_every": 10,
    "checkpoint_every": 10,
    "sample_every": 0,
    "batch_size": 8,
    "optimizer.name": "adamw",
    "optimizer.schedule": "constant",
    "hyper.lr": 4e-3,
    "hyper.warmup_steps": 0.0,
    "model.zero_init": False,
}
after = {"logit_size": logit_size}
metric = "logit_size"
labels = {"model.d_model": "width", "model.param": "parametrisation"}


def points():
    heads = (2, 4, 8, 16)
    widths = {"model.d_model": [32 * n for n in heads], "model.n_heads": heads}
    return product(grid({"model.param": ("standard", "mup")}), together(widths))
