"""Trials that share a compiled program train together (population.py)."""

import math
from collections.abc import Callable
from typing import Any

from gpt_jax import population, signals
from gpt_jax.screen import count
from gpt_jax.sweep import record
from gpt_jax.sweep import trial as ends
from gpt_jax.sweep.space import Pruner
from gpt_jax.sweep.study import Study, Trial
from gpt_jax.sweep.view import View

GENERATION = 16  # trials that a search asks for at once, when members does not say


def run(
    study: Study,
    *,
    members: int,
    memory: float,
    check: Callable[[str, Any], None],
    view: View,
    stop: signals.Stop,
    changed: Callable[[], None],
) -> None:
    """Runs trials, group by group, until none is left or somebody stops the sweep.

    Args:
      study: which trials.
      members: trials at once; 0 = as many as fit.
      memory: see `population.train`.
      check: see `Study.next`.
      view: what shows the state.
      stop: true when the sweep is to end.
      changed: called whenever a group ended.

    Raises:
      ValueError: the pruner is not ASHA by val_loss, or points that are to evolve
        cannot train together.
    """
    pruner = study.plan.pruner
    if pruner and "by" in pruner:
        raise ValueError(
            "--engine=vmap prunes after steps, not by tokens: use --engine=process"
        )
    if pruner and (pruner["name"], study.plan.metric) != ("asha", "val_loss"):
        raise ValueError(
            f"--engine=vmap prunes by asha and val_loss, not by {pruner['name']} and "
            f"{study.plan.metric}: use --engine=process, or pruner = asha(...)"
        )
    evolve = population.Evolve(**study.plan.evolve) if study.plan.evolve else None
    while not (stop or study.late()) and (batch := _batch(study, members, check)):
        groups = population.group([trial.config for trial in batch])
        if evolve and (len(groups) > 1 or study.left() > len(batch)):
            raise ValueError(
                "points that evolve train together: they may differ in seed and "
                "hyper.* alone, and --shard and --max_trials would part them"
            )
        view.print(f"{count(len(batch), 'trial')} in {count(len(groups), 'program')}")
        for group in groups:
            trials = [batch[i] for i in group]
            if stop or study.late():  # the next sitting trains them
                for trial in trials:
                    study.again(trial)
                continue
            stop.signal = _train(study, trials, members, memory, view, evolve) or (
                stop.signal
            )
            changed()


def rungs(pruner: Pruner | None, steps: int, size: int) -> list[population.Rung]:
    """Returns where how many of `size` trials go on: successive halving's rungs."""
    if pruner is None:
        return []
    found, step, keep = [], pruner["first"], size
    while step < min(steps, (pruner["last"] or steps) + 1):
        keep = math.ceil(keep / pruner["factor"])
        found.append(population.Rung(step=step, keep=keep))
        step *= pruner["factor"]
    return found


def _batch(study: Study, members: int, check) -> list[Trial]:
    """Returns the trials to run next: all points, or a generation of a search."""
    limit = study.plan.size if study.plan.points else members or GENERATION
    batch: list[Trial] = []
    while len(batch) < limit and (trial := study.next(check)):
        batch.append(trial)
    return batch


def _train(
    study: Study,
    group: list[Trial],
    members: int,
    memory: float,
    view: View,
    evolve: population.Evolve | None,
) -> int:
    """Trains a group and records its ends; returns the signal that stopped it, or 0."""
    steps: dict[str, tuple] = {}

    def report(member: int, step: int, numbers: dict) -> None:
        trial, value = group[member], numbers.get(study.plan.metric)
        if value is not None and math.isfinite(value):
            study.report(trial, step, value)
        steps[trial.name] = (step, trial.config.steps, value, 0)
        view.update(study, steps)

    results = population.train(
        [trial.config for trial in group],
        [study.out / trial.name for trial in group],
        members=members,
        rungs=rungs(study.plan.pruner, group[0].config.steps, len(group)),
        report=report,
        memory=memory,
        evolve=evolve,
    )
    signal = 0
    for trial, result in zip(group, results):
        if result.reason == "signal":
            signal = result.exit_code - 128
            study.again(trial)
            continue
        folder, ended = study.out / trial.name, ends.how(result, study.plan.metric)
        if ended["status"] == "done" and study.plan.after:
            ended |= ends.measured(folder, study.plan.after)
        outcome = ends.outcome(folder, study.plan.criterion, **ended)
        if outcome.get("no_metric"):
            study.finish(trial, record.failure(outcome["reason"]))
            raise ValueError(f"{trial.name}: {outcome['reason']}")
        outcome["seconds"] /= len(group)  # its share of the time that they took
        record.write(folder / record.OUTCOME, outcome)
        study.finish(trial, outcome)
        view.print(ends.line(trial.name, study.plan.metric, outcome))
    return signal
