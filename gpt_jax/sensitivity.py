"""How much each traced number of a run matters: paired central differences.

Every number is made larger and smaller by a factor, one at a time, under several seeds;
all of these runs differ in numbers alone, so they train as one population. The two
runs of a pair share their seed, so its noise cancels in their difference.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import files, metrics, names, population, runs, seeds, train
from gpt_jax.criterion import Criterion

FILE = "sensitivity.json"  # in the run folder; its report shows it
MOST = 8  # knobs, where none are named
FACTOR = 1.25  # less, and chance outweighs it; more, and it is no slope
# Shares near 1, of which what is missing to 1 is scaled.
NEAR_1 = ("beta1", "beta2", "momentum", "ema_decay")
# Which are looked at first.
FIRST = (
    *("lr", "matrix_lr", "weight_decay", "warmup_steps", "decay_fraction"),
    *("beta1", "beta2", "momentum", "clip", "final_lr_ratio", "eps"),
)
LAST = Criterion(metric="val_loss", direction="minimize", at="last")


class Knob(NamedTuple):
    """What one number does to the final validation loss.

    Attributes:
      key: hyper.lr, say.
      value: that the run has.
      effects: by seed: the change of the loss where the number (of NEAR_1: what is
        missing to 1) doubles, as far as its slope at the value goes.
      mean: of them, with its interval.
    """

    key: str
    value: float
    effects: list[float]
    mean: seeds.Mean


def measure(
    folder: str | Path,
    out: str | Path,
    *,
    knobs: Sequence[str],
    count: int,
    first: int,
    factor: float,
    report: Callable[[int, int, dict], None],
) -> list[Knob]:
    """Trains a run's neighbours and returns what each number does, largest first.

    Writes FILE into the run folder; the run is left as it is otherwise.

    Args:
      folder: the run folder.
      out: gets a run folder for each neighbour; what is there is not trained again.
      knobs: keys, with or without "hyper."; () = the first MOST that the run reads.
      count: seeds, from `first` on.
      first: the first of them.
      factor: of the numbers, above 1.
      report: see `population.train`.

    Raises:
      ValueError: a knob is none, is not read or is 0, or the task is not one for a
        population; nothing was written.
    """
    folder, out = files.expand(folder), files.expand(out)
    config = quiet(runs.read_config(folder))
    if count < 1 or first < 0 or not 1 < factor <= 4:
        raise ValueError(
            f"seeds {count} from {first} on, factor {factor}: give at least one seed "
            "and a factor above 1, up to 4"
        )
    chosen = chosen_knobs(config, knobs)
    numbers = range(first, first + count)
    points = [
        (key, sign, seed) for key in chosen for seed in numbers for sign in (1, -1)
    ]
    configs, folders = [], []
    for key, sign, seed in points:
        one = config.copy_and_resolve_references()
        one.seed = seed
        one.hyper[key] = moved(key, config.hyper[key], factor**sign)
        configs.append(one)
        folders.append(out / f"{key}{'+' if sign > 0 else '-'},seed={seed}")
    results = population.train(configs, folders, members=0, rungs=[], report=report)
    if bad := [r.reason for r in results if r.reason in ("signal", "diverged")]:
        raise ValueError(
            f"a neighbour ended early ({bad[0]}), so its loss says nothing: the same "
            "command goes on after a signal; of runs that diverge take a smaller factor"
        )
    losses = {point: last_loss(at) for point, at in zip(points, folders, strict=True)}
    found = []
    for key in chosen:
        effects = [
            (losses[key, 1, s] - losses[key, -1, s])
            / (2 * math.log(factor))
            * math.log(2)
            for s in numbers
        ]
        value = float(config.hyper[key])
        found.append(Knob(f"hyper.{key}", value, effects, seeds.mean(effects)))
    found.sort(key=lambda knob: -abs(knob.mean.value))
    note(folder, found, factor)
    return found


def quiet(config: Any) -> Any:
    """Returns a run's config for neighbours that leave nothing but a loss."""
    config = config.copy_and_resolve_references()
    config.update(sample_every=0, checkpoint_every=0, keep=1, tensorboard=False)
    config.update(wandb="", patience=0, eval_every=0, early_from=0)
    if not config.hyper.decay_steps:  # the schedule of the run, not of its neighbours
        config.hyper.decay_steps = float(config.steps)
    return config


def chosen_knobs(config: Any, knobs: Sequence[str]) -> list[str]:
    """Returns the keys of hyper that are looked at.

    Raises:
      ValueError: one is no key of hyper, is not read by the run, or is 0.
    """
    unread = train.unread(config)
    there = [
        key
        for key in (*FIRST, *config.hyper)
        if config.hyper[key] and f"hyper.{key}" not in unread
    ]
    if not knobs:
        return list(dict.fromkeys(there))[:MOST]
    found = []
    for knob in knobs:
        key = names.choose("--knobs", knob.removeprefix("hyper."), [*config.hyper])
        if who := unread.get(f"hyper.{key}"):
            raise ValueError(f"--knobs={knob}: {who} does not read it")
        if not config.hyper[key]:
            raise ValueError(
                f"--knobs={knob}: it is 0 in this run, so no factor changes it"
            )
        found.append(key)
    return list(dict.fromkeys(found))


def moved(key: str, value: float, factor: float) -> float:
    """Returns a number times a factor; of NEAR_1, what is missing to 1 times it."""
    return 1 - (1 - value) * factor if key in NEAR_1 else value * factor


def last_loss(folder: Path) -> float:
    """Returns the last validation loss of a run."""
    return LAST.of(metrics.points(metrics.read(folder), LAST.metric))[0]


def note(folder: Path, found: Sequence[Knob], factor: float) -> None:
    """Writes what was found into the run folder, for its report."""
    told = [
        {**knob._asdict(), "mean": None if knob.mean.n < 2 else knob.mean._asdict()}
        for knob in found
    ]
    text = {"metric": LAST.metric, "factor": factor, "knobs": told}
    files.write(folder / FILE, json.dumps(text, indent=1) + "\n")


def in_words(knob: Knob) -> str:
    """Returns a line on what a number does."""
    twice = "1 - it doubled" if _short(knob.key) in NEAR_1 else "doubled"
    sure = ""
    if knob.mean.n > 1:
        sure = f" (95% {knob.mean.low:+.4f} to {knob.mean.high:+.4f})"
    return f"{knob.key}={knob.value:g}, {twice}: {knob.mean.value:+.4f}{sure}"


def _short(key: str) -> str:
    return key.removeprefix("hyper.")
