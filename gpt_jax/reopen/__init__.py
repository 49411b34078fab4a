"""Steps of a run executed again, with instruments that it did not have.

    found = reopen.reopen("runs/a", 880, 920, ["grad_norms", "noise_scale"])

The run goes back to the nearest checkpoint before the steps (or to its start) and does
what it did: the same batches, keys and program, so the same bits. Whatever it logged on
the way must be met, else nothing is told. Instruments read the state beside the step,
in programs of their own, so that the step stays the one that trained.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gpt_jax import (
    checkpoint,
    checks,
    evaluate,
    files,
    metrics,
    names,
    programs,
    runs,
    screen,
    sharding,
    signals,
    train,
)
from gpt_jax.reopen.instruments import INSTRUMENTS, Frame, Instruments, Line
from gpt_jax.step import TrainState

MOST_STEPS = 1000  # in one page
COMPARED = ("lr", "grad_norm", "skipped")  # of a step; train_* are means over several


class Unmet(FloatingPointError):
    """A logged number is not what executing its step again gives."""


class Reopened(NamedTuple):
    """Steps that were executed again.

    Attributes:
      folder: of the run.
      task: its name.
      began: the step of the checkpoint that it went back to; 0 is the start.
      frames: of each step that was asked for.
      met: steps whose logged numbers were met.
      off: by how much at most, relative; 0 = to the bit.
    """

    folder: Path
    task: str
    began: int
    frames: list[Frame]
    met: list[int]
    off: float


def reopen(
    folder: str | Path,
    first: int,
    last: int,
    look: Sequence[str],
    *,
    tolerance: float = 0.0,
    progress: bool = False,
) -> Reopened:
    """Executes steps `first` to `last` of a run again; writes nothing.

    Args:
      folder: the run folder.
      first, last: numbers of steps; step n is the update after which n were made.
      look: which of INSTRUMENTS.
      tolerance: how far logged numbers may be off, relative; for machines that do not
        give the same bits.
      progress: show how far it is.

    Raises:
      ValueError: this is no run, it has no such steps, its data is another now, or an
        instrument does not fit its task.
      Unmet: a logged number is not met.
    """
    folder = files.expand(folder)
    config = runs.read_config(folder)
    check_instruments(config, look)
    rows = metrics.read(folder)
    check_steps(folder, rows, first, last)
    job, parts, init_key = job_of(config, folder)
    state, began = state_before(config, job, parts, init_key, first)
    instruments = Instruments(job, look)
    lines: dict[int, Line] = {}
    frames, met, off = [], [], 0.0
    batches, roll = train.train_batches(job, start=began), train.rollouts(job)
    recorded = logged(rows)
    with screen.counted("steps", last - began, wanted=progress) as more:
        for step in range(began + 1, last + 1):
            batch = job.strategy.put(next(batches))
            rolled = roll(state, step - 1, batch)
            watch = instruments.before(state, rolled, step) if step >= first else None
            state, sums, info = job.step_fn(state, rolled, job.key, job.hyper)
            sharding.wait_on_cpu(info)
            lines[step] = Line(*jax.device_get((sums, info)))
            if step in recorded:
                since = max([s for s in recorded if s < step], default=0)
                off = max(off, compare(folder, recorded[step], lines, since, tolerance))
                met.append(step)
            if watch:
                frames.append(instruments.after(watch, state, lines[step], step))
            more(1)
    batches.close()
    return Reopened(folder, config.task.name, began, frames, met, off)


# --- what can be reopened -------------------------------------------------------------


def check_instruments(config: Any, look: Sequence[str]) -> None:
    """Refuses instruments that there are not, or that do not fit the task.

    Raises:
      ValueError: names the instrument, and those that fit.
    """
    task = config.task.name
    for name in look:
        fits = names.choose("--look", name, INSTRUMENTS) or (task,)
        if task not in fits:
            others = [n for n, fit in INSTRUMENTS.items() if not fit or task in fit]
            raise ValueError(
                f"--look={name} is for rows of tokens that are predicted (tasks "
                f"{', '.join(fits)}), and this run's task is {task}: those that fit "
                f"are {', '.join(others)}"
            )
    if "noise_scale" in look and config.batch_size < 2:
        raise ValueError(
            "--look=noise_scale compares the examples of a batch, and batch_size is 1: "
            "leave it out"
        )


def check_steps(folder: Path, rows: Sequence[Mapping], first: int, last: int) -> None:
    """Refuses steps that a run does not have, or too many of them."""
    if not 1 <= first <= last:
        raise ValueError(
            f"--steps={first}:{last}: give the first and the last step, from 1 on"
        )
    if last - first >= MOST_STEPS:
        raise ValueError(
            f"--steps={first}:{last} are {last - first + 1:,} steps: a page shows at "
            f"most {MOST_STEPS:,}"
        )
    newest = max((row["step"] for row in rows), default=0)
    if last > newest:
        raise ValueError(f"--steps={first}:{last}: {folder} came to step {newest:,}")


def job_of(config: Any, folder: Path) -> tuple[train.Job, train.Parts, jax.Array]:
    """Returns a run as it trained, its parts, and the key of its first weights.

    It writes nothing.

    Raises:
      ValueError: its data is not what it learnt from.
    """
    config = config.copy_and_resolve_references()
    config.sample_every = 0  # nothing is written
    checks.check(config.to_dict())
    parts = train.parts_of(config, folder)
    options, task = train.unpack(config), parts.task
    stated = runs.fingerprint_of(folder)
    if stated not in (None, task.fingerprint):
        raise ValueError(
            f"{folder} learnt from other data than there is now (its fingerprint was "
            f"{stated} and is {task.fingerprint}): put the data back"
        )
    init_key, key = jax.random.split(jax.random.key(config.seed))
    silence: Any = screen.Silence()
    job = train.Job(
        config=options,
        workdir=folder,
        task=task,
        strategy=parts.strategy,
        hyper=train.make_hyper(options, task),
        key=key,
        step_fn=programs.Program(
            parts.step_fn, name="the train step", tell=silence.print
        ),
        eval_fn=parts.eval_fn,
        rollout_fn=parts.rollout_fn,
        join=parts.join,
        saves=checkpoint.Checkpoints(folder / "checkpoints", keep=None),
        frozen="",
        writer=silence,
        bar=silence,
        rate=train.throughput(task, parts.strategy),
        stop=signals.Stop(),
    )
    return job, parts, init_key


def state_before(
    config: Any, job: train.Job, parts: train.Parts, init_key: jax.Array, first: int
) -> tuple[TrainState, int]:
    """Returns the newest state that was kept before step `first`, placed; its step.

    Where no checkpoint is old enough that is the state that the run began with.

    Raises:
      ValueError: the run began after it.
    """
    kept = [step for step in job.saves.steps() if step < first]
    if kept:
        state, _, _ = train.restored(job.saves, parts, init_key, kept[-1])
    else:
        state, _ = train.begin(config, parts, init_key)
    if (began := int(state.step)) >= first:
        raise ValueError(
            f"{job.workdir} is a fork that begins after step {began}: its first own "
            f"step is {began + 1}; earlier ones are its trunk's"
        )
    return job.strategy.place(state), began


# --- what was logged ------------------------------------------------------------------


def logged(rows: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Returns the lines of training of a record, by step."""
    return {row["step"]: row for row in rows if "grad_norm" in row}


def compare(
    folder: Path,
    row: Mapping[str, Any],
    lines: Mapping[int, Line],
    since: int,
    tolerance: float,
) -> float:
    """Returns by how much a logged line is off what its steps give again, relative.

    Means are over the steps since the line before, or since a resume in between.

    Args:
      folder: of the run, for the error.
      row: what was logged.
      lines: the steps that were executed, by number.
      since: the step of the line before.
      tolerance: how far it may be off.

    Raises:
      Unmet: it is further off.
    """
    step = row["step"]
    wanted = {key: row[key] for key in COMPARED if row.get(key) is not None}
    found = {key: float(lines[step].info[key]) for key in wanted}
    means = {k: x for k, x in row.items() if k.startswith("train_") and x is not None}
    off = max((_off(wanted[key], found[key]) for key in wanted), default=0.0)
    if means and since + 1 in lines:
        tried = [
            mean_of([lines[s] for s in range(begin, step + 1)])
            for begin in range(since + 1, step + 1)
        ]
        by = [max(_off(x, one.get(key)) for key, x in means.items()) for one in tried]
        best = by.index(min(by))
        off = max(off, by[best])
        wanted, found = wanted | means, found | tried[best]
    if off <= tolerance:
        return off
    key = max(wanted, key=lambda key: _off(wanted[key], found.get(key)))
    raise Unmet(
        f"step {step} of {folder} is not met: its record says {key} {wanted[key]!r}, "
        f"executing it again gives {found.get(key)!r}. Bits are the same on the same "
        "kind and number of devices, with the same versions (machine.json) and the "
        "settings that those steps had; --tolerance lets numbers be off, relative"
    )


def mean_of(lines: Sequence[Line]) -> dict[str, float]:
    """Returns the means of several steps as a run logs them."""
    finite = [line.sums for line in lines if math.isfinite(line.sums["loss"])]
    if not finite:
        return {}
    means = evaluate.means(evaluate.add(finite))
    return {f"train_{name}": value for name, value in means.items()}


def _off(wanted: float, found: float | None) -> float:
    if found is None or not math.isfinite(found):
        return math.inf
    return abs(found - wanted) / max(abs(wanted), 1e-30) if found != wanted else 0.0
