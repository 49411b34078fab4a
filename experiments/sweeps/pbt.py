"""A schedule that is found while it is trained: population based training.

What: eight rates for the tiny model with a constant schedule. After every 40 of 400
  steps the worst quarter goes on as copies of the best quarter, their rate multiplied
  by 0.7 or 1.4 (Jaderberg et al. 2017).
Expected: the report draws the rates that the best weights were trained with: high at
  first, lower later, as schedules by hand do. They come to 2.106; the best member that
  kept its rate to 2.131.
Time: about 2 minutes on 2 CPU cores.
Command: python -m experiments.sweep --sweep=experiments/sweeps/pbt.py --engine=vmap
"""

from gpt_jax.sweep.space import grid, pbt

config = "configs/quickstart.py:size=tiny"
fixed = {
    "data.source": "builtin:asyncio",
    "steps": 400,
    "eval_every": 40,
    "eval_windows": 128,
    "checkpoint_every": 10_000,
    "sample_every": 0,
    "early_from": 0,
    "optimizer.name": "adamw",
    "optimizer.schedule": "constant",
    "hyper.warmup_steps": 10.0,
    "tensorboard": False,
}
evolve = pbt(every=40, keys=("hyper.lr",), share=0.25, factors=(0.7, 1.4))


def points():
    return grid({"hyper.lr": [1e-3 * 1.7**i for i in range(8)]})
