"""Trials of a tiny model, trained in three ways: what the row population times.

The same runs each time, from a process's launch to its end: they differ in seed and
learning rate, evaluate at their beginning and end, and keep one checkpoint each.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from configs import common


def configs(folder: str, *, trials: int, steps: int, devices: int) -> list[ConfigDict]:
    """Returns the trials' configs; what they prepare and compile goes into `folder`.

    Args:
      folder: new each time, so that nothing is found prepared or compiled.
      trials: how many.
      steps: of each.
      devices: XLA devices on a CPU; 0 = one per core.
    """
    made = []
    for i in range(trials):
        config = common.base()
        config.data.update(source="builtin:json", tokenizer="char")
        config.data.folder = f"{folder}/data"
        config.compile_cache = f"{folder}/cache"
        config.model.update(n_layers=2, d_model=64, n_heads=2, context_length=64)
        config.update(batch_size=8, steps=steps, seed=1337 + i, tensorboard=False)
        config.update(eval_every=steps, early_from=0, eval_windows=64)
        config.checkpoint_every = steps
        config.mesh.cpu_devices = devices
        config.hyper.lr = 10 ** (-3.5 + 2 * i / trials)
        made.append(config)
    return made


def together(folder: str, trials: int, steps: int) -> None:
    """All of them in one program."""
    from gpt_jax import population

    chosen = configs(folder, trials=trials, steps=steps, devices=0)
    results = population.train(
        chosen, _workdirs(folder, trials), members=0, rungs=(), report=lambda *_: None
    )
    sys.exit(any(result.step != steps for result in results))


def one_after_another(folder: str, trials: int, steps: int) -> None:
    """Each by itself, in one process that stays warm."""
    from gpt_jax import train

    chosen = configs(folder, trials=trials, steps=steps, devices=0)
    for config, workdir in zip(chosen, _workdirs(folder, trials), strict=True):
        train.train(config, workdir)


def alone(folder: str, trials: int, steps: int, index: int) -> None:
    """One of them, as a process of its own: other processes train the others."""
    from gpt_jax import train

    config = configs(folder, trials=trials, steps=steps, devices=1)[index]
    train.train(config, _workdirs(folder, trials)[index])


def _workdirs(folder: str, trials: int) -> list[Path]:
    return [Path(folder) / f"trial-{i}" for i in range(trials)]
