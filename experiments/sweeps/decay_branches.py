"""Four horizons from one trunk: the rate decays in branches, the trunk goes on.

What: a warm-up-stable-decay schedule is the same for every length until its decay
  begins. So a trunk at the full rate is trained once, and each horizon is a fork of it
  that decays for a fifth of its length (Hagele et al. 2024, section 4).
Expected: every branch is, bit for bit, the run of its length that was trained alone;
  trunk and branches together take 52 % of the tokens of the four runs.
Time: 1 minute on 2 CPU cores, after the trunk to fork:
  python -m experiments.train --config=configs/quickstart.py:size=tiny \\
      --config.steps=640 --config.hyper.decay_fraction=0 \\
      --config.checkpoint_every=160 --config.eval_every=160 --config.keep=4 \\
      --workdir=runs/trunk
Command: python -m experiments.sweep --sweep=experiments/sweeps/decay_branches.py
"""

config = "configs/quickstart.py:size=tiny"
fixed = {"hyper.decay_fraction": 0.2, "eval_every": 100, "sample_every": 0}
at = "last"

_HORIZONS = (200, 400, 600, 800)


def points():
    return [
        {"fork": f"runs/trunk:step={steps * 4 // 5}", "steps": steps}
        for steps in _HORIZONS
    ]
