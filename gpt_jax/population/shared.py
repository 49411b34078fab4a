"""What all waves of a population share, and how its trials end."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gpt_jax import metrics, plots, signals
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.checks import Options
from gpt_jax.population import program
from gpt_jax.train import Parts, Result, ends_by, make_hyper


class Shared(NamedTuple):
    """The trials, what trains them, and the results so far, by trial."""

    configs: list[ConfigDict]  # a population that evolves changes their numbers
    options: Options  # what they have in common
    workdirs: Sequence[Path]
    parts: Parts
    stop: signals.Stop
    report: Callable[[int, int, dict], None]
    results: dict[int, Result]
    programs: dict[tuple[int, int], Any]  # by slots and seeds
    end: int  # the last step
    memory: float  # bytes that they may take on a CPU, at most

    @property
    def mesh(self) -> Mesh:
        return self.parts.strategy.mesh

    def slots(self, members: int) -> int:
        """Returns the members, filled up to a multiple of the devices."""
        return math.ceil(members / self.mesh.size) * self.mesh.size

    def program(self, slots: int, seeds: int) -> Any:
        """Returns the compiled steps of so many slots and seeds."""
        if (slots, seeds) not in self.programs:
            config, task = self.options, self.parts.task
            A, B = config.accumulate, config.batch_size // config.accumulate
            example = {name: np.asarray(x) for name, x in task.train[0].items()}
            batch = {
                name: jax.ShapeDtypeStruct(
                    (program.STEPS, seeds, A, B, *x.shape), x.dtype
                )
                for name, x in example.items()
            }
            self.programs[slots, seeds] = program.compile_steps(
                self.parts, make_hyper(config, task), batch, slots
            )
        return self.programs[slots, seeds]

    def going(self) -> list[int]:
        """Returns the trials that have not ended."""
        return [i for i in range(len(self.configs)) if i not in self.results]

    def done(self) -> str:
        """Returns what ends a run at its last step."""
        return ends_by(self.options, self.parts.task)

    def through(self, trial: int, step: int) -> bool:
        """Whether a trial has a checkpoint of `step`, evaluated, or a newer one."""
        newest = reached(self.workdirs[trial])
        if newest == step:
            return loss_at(self.workdirs[trial], step) is not None
        return newest > step

    def conclude(self, trial: int, reason: str, step: int) -> None:
        """Draws the curve of a run and notes how it ended."""
        workdir, numbers = self.workdirs[trial], {}
        if (workdir / metrics.FILE).exists():
            for row in metrics.read(workdir):
                numbers |= row
            del numbers["step"]
            plots.of_run(workdir)
        codes = {"diverged": 1, "signal": self.stop.exit_code}
        self.results[trial] = Result(reason, step, numbers, codes.get(reason, 0))


def reached(workdir: Path) -> int:
    """Returns the step of the newest checkpoint; 0 when there is none."""
    return Checkpoints(workdir / "checkpoints", keep=None).latest() or 0


def loss_at(workdir: Path, step: int) -> float | None:
    """Returns the validation loss recorded for a step, infinite when it was not finite.

    None when none was recorded.
    """
    if not (workdir / metrics.FILE).exists():
        return None
    rows = [row for row in metrics.read(workdir) if row["step"] == step]
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    return (math.inf if losses[-1] is None else losses[-1]) if losses else None
