"""Learning rate x width: does the best rate move when the model grows?

What: seven learning rates for each of three widths of the quickstart model, AdamW.
Expected: the report tells the best rate of each width and shows a valley for each; with
  standard parametrisation the star, its optimum, moves to lower rates as the width
  grows (Yang et al. 2022): 0.016, 0.008, 0.002 for widths 32 to 128.
Time: about 8 minutes on 2 CPU cores.
Command: python -m experiments.sweep --engine=vmap \\
  --sweep=experiments/sweeps/lr_width.py
"""

from gpt_jax.sweep.space import grid

config = "configs/quickstart.py:size=tiny"
fixed = {
    "steps": 400,
    "eval_every": 50,
    "eval_windows": 64,
    "checkpoint_every": 400,
    "sample_every": 0,
    "batch_size": 8,
    "optimizer.name": "adamw",
    "hyper.warmup_steps": 40.0,
    "model.zero_init": False,  # it would hide what the width does at the start
}
labels = {"model.d_model": "width", "hyper.lr": "learning rate"}


def points():
    return grid(
        {
            "model.d_model": (32, 64, 128),
            "hyper.lr": [5e-4 * 2**i for i in range(7)],
        }
    )
