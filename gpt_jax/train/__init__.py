"""Training: one loop for every task, adapter and strategy.

`train(config, workdir)` is the life of a run: build its parts, restore or start, then
loop. What happens to the weights at a step is in step.py. config.py checks and unpacks
the config, parts.py builds what a run is made of, start.py is where it begins, job.py
how long it goes on; feed.py has its batches, events.py what happens between steps.
"""

import contextlib
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt_jax import (
    checkpoint,
    metrics,
    pace,
    processes,
    runs,
    screen,
    sharding,
    signals,
    stores,
)
from gpt_jax.step import TrainState
from gpt_jax.train.config import check, unpack, unread
from gpt_jax.train.events import (
    before_the_first,
    check_saves,
    ended,
    eval_batches,
    evaluate_now,
    finish,
    log,
    profiler,
    record,
    sample_now,
    save,
    save_errors,
    spent,
)
from gpt_jax.train.feed import Feed, rollouts, train_batches
from gpt_jax.train.job import (
    Job,
    Parts,
    Result,
    Totals,
    at_end,
    due,
    early_steps,
    ends_by,
    eval_rows,
    last_step,
    make_hyper,
    rhythm_of,
    tokens_per_step,
)
from gpt_jax.train.parts import (
    build,
    check_memory,
    compile_rollout,
    make_parts,
    make_task,
    open_run,
    parts_of,
    throughput,
)
from gpt_jax.train.start import (
    adopt,
    begin,
    check_fork,
    rate_moves,
    restored,
    resumed,
)

__all__ = [
    "Job",
    "Parts",
    "Result",
    "Totals",
    "adopt",
    "at_end",
    "begin",
    "build",
    "check",
    "check_fork",
    "check_memory",
    "compile_rollout",
    "due",
    "early_steps",
    "ended",
    "ends_by",
    "eval_batches",
    "eval_rows",
    "last_step",
    "log",
    "loop",
    "make_hyper",
    "make_parts",
    "make_task",
    "open_run",
    "parts_of",
    "rate_moves",
    "record",
    "restored",
    "resumed",
    "rollouts",
    "sample_now",
    "save",
    "save_errors",
    "throughput",
    "tokens_per_step",
    "train",
    "train_batches",
    "unpack",
    "unread",
]


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    profile: int = 0,
    report: Callable[[int, dict[str, float]], str] = lambda step, numbers: "",
) -> Result:
    """Trains until the config's end, resuming what `workdir` already holds.

    Args:
      config: see configs/common.py; locked or not, it is not changed.
      workdir: the run folder, here or in a store (gs://bucket/runs/a).
      profile: trace so many steps into `workdir/profile`.
      report: called with (step, numbers) after each evaluation on the way; what it
        returns, if not "", ends the run and is the result's reason.

    Raises:
      ValueError: the config, the data, or the run folder do not fit; nothing was
        overwritten.
      FloatingPointError: `max_skipped` updates in a row were not finite, or spikes.
      OSError: a checkpoint could not be saved, and `on_save_error` is "stop".
    """
    workdir = stores.fetched(workdir)
    if config.fit_seconds:
        return fitted(config, workdir, profile=profile, report=report)
    return sitting(config, workdir, profile=profile, report=report)


def fitted(config: ConfigDict, workdir: Path, **how: Any) -> Result:
    """Trains for `fit_seconds` of wall time, from this call to its return.

    What is not known is how long a step takes, so the run is made in sittings, each of
    which is told to end where the one before it says: see pace.py. Its steps are those
    of a run that was given their final number, since the rate only decays after it is
    known. Time that an interrupted run has used counts; an end that was settled stays.
    """
    check(config)
    if processes.count() > 1:
        raise ValueError(
            f"fit_seconds is {config.fit_seconds}: several processes have no common "
            "clock; set it to 0 and give steps"
        )
    began, config = time.monotonic(), config.copy_and_resolve_references()
    rounds = config.task.get("updates", 1)
    wsd = config.optimizer.schedule == "wsd"
    decay = config.hyper.decay_fraction if wsd else 0.0
    plan, done, used = planned(workdir, rounds)
    while True:
        config.steps = plan.end
        config.hyper.decay_steps = float(plan.last or pace.OPEN)
        started = time.monotonic()
        result = sitting(config, workdir, **how)
        if result.reason != "steps" or plan.end == plan.last:
            return result
        rows, now, how["profile"] = metrics.read(workdir), time.monotonic(), 0
        found = pace.measure(rows, done, result.step, now - started)
        if not found:
            raise ValueError(
                f"log_every is {config.log_every}: fit_seconds needs two lines within "
                f"{pace.TRIAL} steps to know how long one takes; log more often"
            )
        done, left = result.step, config.fit_seconds - used - (now - began)
        last = pace.steps(found, done, left, rounds, config.eval_every)
        plan = pace.then(plan, last, decay, done, rounds)
        screen.say(
            f"fit_seconds: {found.step:.3g} s a step and {max(left, 0):.0f} s left, so "
            f"{last:,} steps"
        )


def planned(workdir: Path, rounds: int) -> tuple[pace.Plan, int, float]:
    """Returns what a run with fit_seconds does next, its step and seconds so far."""
    done = checkpoint.Checkpoints(workdir / "checkpoints", keep=None).latest() or 0
    trial = math.ceil((done + pace.TRIAL) / rounds) * rounds
    if not done:
        return pace.Plan(trial, 0), 0, 0.0
    old = runs.read_config(workdir)
    last = int(old.hyper.decay_steps) % pace.OPEN
    end = old.steps if done < old.steps or old.steps == last else trial
    rows = [row for row in metrics.read(workdir) if row["step"] <= done]
    used = max((row.get("seconds", 0.0) for row in rows), default=0.0)
    return pace.Plan(min(end, last or end), last), done, used


def sitting(
    config: ConfigDict,
    workdir: Path,
    *,
    profile: int,
    report: Callable[[int, dict[str, float]], str],
) -> Result:
    """Trains to the config's end, once; see `train`."""
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(signals.watch(config.grace_s))
        alone = processes.count() == 1  # one of several that leaves costs all of them
        with signals.at_once() if alone else contextlib.nullcontext():
            job, state, totals = build(config, workdir, stop, stack)
        step = int(job.strategy.view(state.step))
        if at_end(job.config, job.task, totals, step):
            return Result(ends_by(job.config, job.task), step, {}, 0, trained=False)
        # What was built stays: walking it takes the garbage collector a tenth of a
        # second, in the middle of some step.
        gc.freeze()
        stack.callback(gc.unfreeze)
        return loop(job, state, totals, profile=profile, report=report)


def loop(
    job: Job,
    state: TrainState,
    totals: Totals,
    *,
    profile: int,
    report: Callable[[int, dict[str, float]], str],
) -> Result:
    """Runs steps until something ends the run; one line per thing that happens."""
    rhythm, step = rhythm_of(job.config, job.task), int(job.strategy.view(state.step))
    started, pending, reason = time.monotonic() - totals.seconds, [], ""
    feed, trace = Feed(job, step), profiler(job, step, rhythm.end, profile)
    feed.compile(state)
    trace(step)
    numbers, totals = before_the_first(job, state, totals, step)
    while step < rhythm.end and not (reason := reason or ended(job, totals, step)):
        batch = feed.now(state, step)
        state, sums, info = job.step_fn(state, batch, job.key, job.hyper)
        step += 1
        feed.ahead(step)  # while the device computes
        sharding.wait_on_cpu(info)
        check_saves(job)
        pending.append((sums, info))
        totals = spent(job, totals, time.monotonic() - started)
        trace(step)
        metric = None
        if rhythm.logs(step):
            numbers |= log(job, totals, step, pending)
            pending = []
        if rhythm.evaluates(step):
            measured, totals = evaluate_now(job, state, totals, step)
            numbers, metric = numbers | measured, measured.get("val_loss")
            if measured and step < rhythm.end:
                reason = report(step, {**measured, "tokens": totals.tokens})
        sample_now(job, state, totals, step, rhythm.samples(step))
        if rhythm.saves(step) or (metric is not None and totals.stale == 0):
            save(job, state, totals, step, metric)
    if 0 < step < rhythm.end:
        save(job, state, totals, step, None)
    return finish(job, totals, step, reason, numbers)
