"""Population based training (Jaderberg et al. 2017): the worst go on as the best.

At each milestone the worst members take weights, optimizer state and numbers of members
among the best, and change the numbers by a factor: so a schedule is found while it is
trained. What decides a move lies in the run folders: losses in metrics.jsonl, numbers
in config.json, moves in lineage.jsonl. So a population that was killed goes on as if it
had not been.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from gpt_jax import files, runs, stores, train
from gpt_jax.population.shared import Shared, loss_at, reached

FILE = "lineage.jsonl"
NEW, OLD = "checkpoints.new", "checkpoints.old"  # while they are put into their place


class Evolve(NamedTuple):
    """How a population evolves.

    Attributes:
      every: steps between two milestones.
      keys: the numbers that are explored: dotted keys of hyper.
      share: of the members; so many of the worst copy so many of the best.
      factors: by one of which, drawn for each, a copied number is multiplied.
      seed: of these draws.
    """

    every: int
    keys: tuple[str, ...]
    share: float = 0.25
    factors: tuple[float, ...] = (0.8, 1.25)
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        if self.every < 1:
            raise ValueError(f"every is {self.every}: give a number of steps")
        if not self.keys or not all(key.startswith("hyper.") for key in self.keys):
            raise ValueError(
                f"keys is {self.keys}: only numbers of hyper can change while a "
                "population trains, as in keys=('hyper.lr',)"
            )
        if not 0 < self.share <= 0.5:
            raise ValueError(f"share is {self.share}: it must be above 0, at most 0.5")
        if not self.factors or min(self.factors) <= 0:
            raise ValueError(f"factors is {self.factors}: give numbers above 0")


class Move(NamedTuple):
    """What a member becomes at a milestone: a copy of another one, with new numbers."""

    to: int
    source: int
    hyper: dict[str, float]


def milestones(evolve: Evolve | None, end: int) -> list[int]:
    """Returns the steps after which members move."""
    return [*range(evolve.every, end, evolve.every)] if evolve else []


def lineage(folder: Path) -> list[dict]:
    """Returns the moves of a run, oldest first: "step", "from" and "hyper"."""
    path = folder / FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines()]


def born(folder: Path) -> int:
    """Returns the step at which a run became what it is; 0 if it never moved."""
    moves = lineage(folder)
    return moves[-1]["step"] if moves else 0


def settled(config: ConfigDict, folder: Path) -> ConfigDict:
    """Returns the config that a run goes on with; ends a move that was cut short."""
    if (folder / NEW).is_dir() and not (folder / "checkpoints").is_dir():
        os.replace(folder / NEW, folder / "checkpoints")
    for left in (NEW, OLD):
        shutil.rmtree(folder / left, ignore_errors=True)
    if not (moves := lineage(folder)):
        return config
    config = changed(config, moves[-1]["hyper"])
    write_hyper(folder, moves[-1]["hyper"])
    return config


def moves(shared: Shared, evolve: Evolve, step: int) -> list[Move]:
    """Returns what happens at a milestone that all members have come to.

    Nothing, where some trained on from there: it has happened then.
    """
    going = shared.going()
    if any(reached(shared.workdirs[i]) > step for i in going):
        return []
    losses = {i: loss_at(shared.workdirs[i], step) for i in going}
    known = {i: np.inf if loss is None else loss for i, loss in losses.items()}
    ranked = sorted(going, key=lambda i: (known[i], i))
    count = min(max(1, int(len(ranked) * evolve.share)), len(ranked) // 2)
    found = []
    for to in ranked[len(ranked) - count :]:
        # By the name: members that have ended no longer count, others keep their luck.
        name = int(files.digest(shared.workdirs[to].name)[:8], 16)
        draw = np.random.default_rng([evolve.seed, step, name])
        source = ranked[draw.integers(count)]
        if known[source] < known[to]:
            hyper = explored(shared.configs[source], evolve, draw)
            found.append(Move(to, source, hyper))
    return found


def explored(
    config: ConfigDict, evolve: Evolve, draw: np.random.Generator
) -> dict[str, float]:
    """Returns the numbers of a member, changed; as they are where no run can have that.

    Args:
      config: of the member that is copied.
      evolve: which numbers, by what factors.
      draw: chooses the factors.
    """
    before = {key: float(config.hyper[key.removeprefix("hyper.")])
              for key in evolve.keys}  # fmt: skip
    after = {
        key: value * evolve.factors[draw.integers(len(evolve.factors))]
        for key, value in before.items()
    }
    try:
        train.check(changed(config, after))
    except ValueError:
        return before
    return after


def apply(shared: Shared, move: Move, step: int) -> None:
    """Makes a member a copy of another, on the disk; does nothing the second time.

    In an order in which `settled` can end what a kill leaves: checkpoints, then the
    lineage, then the config.
    """
    source, folder = shared.workdirs[move.source], shared.workdirs[move.to]
    if born(folder) < step:
        with runs.lock(source), runs.lock(folder):
            shutil.rmtree(folder / NEW, ignore_errors=True)
            stores.complete(source / "checkpoints")
            shutil.copytree(source / "checkpoints", folder / NEW)
            files.sync(folder / NEW)
            os.replace(folder / "checkpoints", folder / OLD)
            os.replace(folder / NEW, folder / "checkpoints")
            told = {"step": step, "from": source.name, "hyper": move.hyper}
            lines = [json.dumps(line) for line in [*lineage(folder), told]]
            files.write(folder / FILE, "\n".join(lines) + "\n")
            shutil.rmtree(folder / OLD, ignore_errors=True)
            write_hyper(folder, move.hyper)
    shared.configs[move.to] = changed(shared.configs[move.to], move.hyper)


def changed(config: ConfigDict, hyper: Mapping[str, float]) -> ConfigDict:
    """Returns a config with other numbers."""
    made = config.copy_and_resolve_references()
    for key, value in hyper.items():
        made.hyper[key.removeprefix("hyper.")] = value
    return made


def write_hyper(folder: Path, hyper: Mapping[str, float]) -> None:
    """Writes a run's numbers into its config.json."""
    config = changed(runs.read_config(folder), hyper)
    runs.go_on(folder, config, runs.fingerprint_of(folder) or "")


def schedule(
    folders: Mapping[str, Path], starts: Mapping[str, Mapping], name: str
) -> list[tuple[int, dict[str, float]]]:
    """Returns (step, numbers from there on) of the weights that a member ended with.

    Args:
      folders: of all members, by name.
      starts: the numbers that each began with.
      name: whose.
    """
    found: list[tuple[int, dict[str, float]]] = []
    before: float = np.inf
    while True:
        own = [move for move in lineage(folders[name]) if move["step"] < before]
        if not own:
            return [(0, {**starts[name]}), *found]
        last = own[-1]
        found.insert(0, (last["step"], last["hyper"]))
        name, before = last["from"], last["step"]


def check_members(configs: Sequence[ConfigDict], evolve: Evolve, end: int) -> None:
    """Refuses a population that would not evolve.

    Raises:
      ValueError: there are fewer than two, no milestone, or numbers that are 0.
    """
    if len(configs) < 2:
        raise ValueError("a population of one has nobody to copy: give more points")
    if not milestones(evolve, end):
        raise ValueError(
            f"every is {evolve.every} of {end} steps: nothing would evolve before the "
            "end; give fewer"
        )
    for key in evolve.keys:
        name = key.removeprefix("hyper.")
        if name not in configs[0].hyper:
            raise ValueError(f"there is no config key {key!r}")
        if not all(config.hyper[name] for config in configs):
            raise ValueError(f"{key} is 0: no factor changes it, so leave it out")
