"""A wave: the members that train at the same time, and what happens at each step.

What is written, evaluated, saved and sampled for a member is what `train` does for a
run alone, with its functions and at the same steps.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import evaluate, runs, screen, sharding, train
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.checks import Options
from gpt_jax.population import program
from gpt_jax.population.evolve import born
from gpt_jax.population.shared import Shared
from gpt_jax.step import TrainState, averaged
from gpt_jax.train import Job, Totals, due

CALL_SECONDS = 1.0  # about the longest call into the program, so that signals are heard


class Member(NamedTuple):
    """One run of a wave.

    Attributes:
      trial: its number in the population.
      slot: its place in the arrays of the wave.
      job: its parts.
      totals: see `train.Totals`.
      began: the time at which it would have begun in one sitting.
      loss: the last validation loss; None before the first.
    """

    trial: int
    slot: int
    job: Job
    totals: Totals
    began: float
    loss: float | None


class Wave(NamedTuple):
    """Members that train together now.

    Attributes:
      members: those that still train.
      step: updates made.
      state: TrainState of arrays [S, ...]; the slots of no member hold copies.
      inputs: which seed [S], key [S], hyper [S].
      batches: by seed, the endless batches from `step` on.
      bar: shows how the wave does.
      pending: (sums [S, K], info [S, K], steps) of each call since the last line.
      pace: seconds of a step in the last call.
      note: a file that is there as long as the wave has not saved.
    """

    members: list[Member]
    step: int
    state: TrainState
    inputs: tuple
    batches: dict[int, Any]
    bar: screen.Progress
    pending: list
    pace: float
    note: Path | None = None


def advance(shared: Shared, wave: Wave, until: int) -> Wave:
    """Trains a wave up to a step; one line per thing that happens."""
    config, step = shared.options, wave.step
    early = train.early_steps(config, shared.parts.task)
    evaluates = step in (0, until) or due(step, config.eval_every, early)
    if evaluates and any(m.totals.evaluated < step for m in wave.members):
        wave = evaluate_now(shared, wave)
    sample_now(wave, step == 0 and due(step, config.sample_every))
    while step < until and (wave := leave(shared, wave)).members:
        wave = call(shared, wave, next_event(config, step, until, early))
        step = wave.step
        evaluates = step == until or due(step, config.eval_every, early)
        samples = step == shared.end or due(step, config.sample_every, early)
        if step == 1 or evaluates or samples or due(step, config.log_every):
            wave = log(shared, wave)
        if evaluates and wave.members:
            wave = evaluate_now(shared, wave)
        sample_now(wave, samples)
        improved = evaluates and any(m.totals.stale == 0 for m in wave.members)
        if step == until or improved or due(step, config.checkpoint_every):
            save(wave)
    for member in wave.members:
        member.job.saves.wait()
        if step >= shared.end:
            cut = shared.stop and member.totals.evaluated < step
            shared.conclude(member.trial, "signal" if cut else shared.done(), step)
    return wave


# ---- members come and go ----


def open_wave(
    shared: Shared, trials: Sequence[int], stack: contextlib.ExitStack
) -> Wave:
    """Opens the run folders of these trials and places them on the devices."""
    opened = open_runs(shared, trials, stack)
    step, now = int(opened[0][1].step), time.monotonic()
    bar = screen.Progress("step", total=shared.end, start=step)
    stack.callback(bar.close)
    members = [
        Member(trial, slot, job, totals, began=now - totals.seconds, loss=None)
        for slot, (trial, (job, _, totals)) in enumerate(
            zip(trials, opened, strict=True)
        )
    ]
    cfg, begin = shared.parts.task.model.cfg, f"resuming after step {step}"
    bar.print(
        f"{len(members)} members, {cfg.n_layers} layers of width {cfg.d_model} each, "
        f"on {shared.mesh.size} {jax.devices()[0].platform} devices; "
        f"{begin if step else 'starting'}"
    )
    states = [state for _, state, _ in opened]
    states += states[:1] * (shared.slots(len(states)) - len(states))
    state = shared.parts.strategy.place(
        jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *states)
    )
    wave = Wave(members, step, state, (), {}, bar, [], pace=math.inf)
    return with_inputs(shared, wave)


def open_runs(
    shared: Shared, trials: Sequence[int], stack: contextlib.ExitStack
) -> list[tuple[Job, TrainState, Totals]]:
    """Opens runs at the newest step of which all of them have a sound checkpoint."""
    workdirs = [shared.workdirs[i] for i in trials]

    def run(i, stack):
        at = (shared.configs[i], shared.workdirs[i], shared.parts)
        return train.open_run(*at, shared.stop, stack, quiet=True)

    while True:
        with contextlib.ExitStack() as attempt:
            for workdir in workdirs:
                attempt.enter_context(runs.lock(workdir))
            stores = [Checkpoints(w / "checkpoints", keep=1) for w in workdirs]
            common = set.intersection(*({0, *store.steps()} for store in stores))
            for store in stores:
                store.rewind(max(common))
            opened = [run(i, attempt) for i in trials]
            # A damaged checkpoint was set aside just now, and the one before it taken.
            if len({int(state.step) for _, state, _ in opened}) == 1:
                check_born(workdirs, int(opened[0][1].step))
                stack.push(attempt.pop_all())
                return opened


def check_born(workdirs: Sequence[Path], step: int) -> None:
    """Refuses to go back to before a run became a copy of another one.

    Raises:
      ValueError: its numbers are no longer those that it had then.
    """
    for workdir in workdirs:
        if step < (since := born(workdir)):
            raise ValueError(
                f"{workdir} became a copy of another run after step {since}, and of "
                f"what all members have step {step} is the newest: the population "
                "cannot go on; begin it anew in other folders"
            )


def with_inputs(shared: Shared, wave: Wave) -> Wave:
    """Returns the wave with the keys, numbers and batches of its members."""
    jobs = [member.job for member in wave.members]
    jobs += jobs[:1] * (shared.slots(len(jobs)) - len(jobs))
    by_seed = {job.config.seed: job for job in jobs}
    batches = {
        seed: wave.batches.get(seed) or train.train_batches(job, start=wave.step)
        for seed, job in by_seed.items()
    }
    which = np.array([[*by_seed].index(job.config.seed) for job in jobs], np.int32)
    keys = jnp.stack([job.key for job in jobs])
    hyper = jax.tree.map(lambda *xs: np.stack(xs), *[job.hyper for job in jobs])
    inputs = shared.parts.strategy.place((which, keys, hyper))
    return wave._replace(inputs=inputs, batches=batches)


def shrink(shared: Shared, wave: Wave, trials: Sequence[int]) -> Wave:
    """Returns the wave with these trials only; the places of the others are freed."""
    assert not wave.pending, "numbers of the old slots would be lost"
    left = [member for member in wave.members if member.trial in trials]
    slots = shared.slots(len(left))
    if slots == len(wave.inputs[0]):
        return wave._replace(members=left)
    order = [member.slot for member in left]
    order += order[:1] * (slots - len(order))
    state = program.gather(wave.state, np.array(order), shared.mesh)
    left = [member._replace(slot=slot) for slot, member in enumerate(left)]
    return with_inputs(shared, wave._replace(members=left, state=state))


def leave(shared: Shared, wave: Wave) -> Wave:
    """Saves and ends the members whose time is over: patience, seconds, a signal."""
    reasons = {m.trial: train.ended(m.job, m.totals, wave.step) for m in wave.members}
    if not any(reasons.values()):
        return wave
    leaving = [m for m in wave.members if reasons[m.trial]]
    if wave.step:
        save(wave._replace(members=leaving))
    for member in leaving:
        member.job.saves.wait()
        shared.conclude(member.trial, reasons[member.trial], wave.step)
    staying = [m.trial for m in wave.members if not reasons[m.trial]]
    return shrink(shared, wave, staying) if staying else wave._replace(members=[])


# ---- what happens ----


def next_event(config: Options, step: int, until: int, early: Sequence[int]) -> int:
    """Returns the next step after which the host has something to do."""
    rhythms = (
        *(config.log_every, config.eval_every),
        *(config.checkpoint_every, config.sample_every),
    )
    following = [step + every - step % every for every in rhythms if every]
    following += [number for number in early if number > step]
    return min(until, *following, 1 if step == 0 else until)


def call(shared: Shared, wave: Wave, until: int) -> Wave:
    """Trains all members for a few steps, in one call of the program."""
    began = time.monotonic()
    n = min(until - wave.step, program.STEPS, max(1, int(CALL_SECONDS / wave.pace)))
    batches = shared.parts.strategy.put(stack_batches(wave.batches.values(), n))
    slots, seeds = len(wave.inputs[0]), len(wave.batches)
    if (slots, seeds) not in shared.programs:
        wave.bar.print("compiling the train step of all members")
    run = shared.program(slots, seeds)
    state, sums, info = run(wave.state, *wave.inputs, batches, np.int32(n))
    sharding.wait_on_cpu(info)
    now = time.monotonic()
    tokens = n * train.tokens_per_step(shared.options, shared.parts.task)

    def later(member: Member) -> Member:
        totals = member.totals._replace(
            tokens=member.totals.tokens + tokens, seconds=now - member.began
        )
        return member._replace(totals=totals)

    return wave._replace(
        members=[later(member) for member in wave.members],
        step=wave.step + n,
        state=state,
        pending=[*wave.pending, (sums, info, n)],
        pace=(now - began) / n,
    )


def stack_batches(sources: Iterable[Any], n: int) -> Mapping[str, np.ndarray]:
    """Returns the next n batches of every source as arrays [K, U, A, B, ...]."""
    sources = list(sources)
    rows = [[next(source) for source in sources] for _ in range(n)]
    rows += rows[:1] * (program.STEPS - n)
    return {
        name: np.stack([[batch[name] for batch in row] for row in rows])
        for name in rows[0][0]
    }


def log(shared: Shared, wave: Wave) -> Wave:
    """Writes each member's line; a member of nothing but NaN ends here, alone."""
    calls = jax.device_get(wave.pending)
    going, speed = [], 0.0
    for member in wave.members:
        steps = [
            at((sums, info), (member.slot, k))
            for sums, info, n in calls
            for k in range(n)
        ]
        with train.save_errors(member.job):
            member.job.saves.check()
        try:
            numbers = train.log(member.job, member.totals, wave.step, steps)
        except FloatingPointError as error:
            wave.bar.print(f"{member.job.workdir} diverged: {error}")
            member.job.saves.wait()
            runs.end(member.job.workdir, "diverged", wave.step)
            shared.conclude(member.trial, "diverged", wave.step)
            continue
        going.append(member)
        speed += numbers.get("tokens_per_second", 0.0)
    best = min((member.totals.best for member in going), default=math.inf)
    shown = {"best": best} if best < math.inf else {}
    shown |= {"tokens_per_second": speed} if speed else {}
    wave.bar.update(wave.step, members=len(going), **shown)
    return wave._replace(members=going, pending=[])


def evaluate_now(shared: Shared, wave: Wave) -> Wave:
    """Evaluates all members on every named set and writes their numbers."""
    put, (_, _, hyper) = shared.parts.strategy.put, wave.inputs

    def sums(batch):
        params, frozen = averaged(wave.state), wave.state.frozen
        return shared.parts.eval_fn(params, frozen, put(batch), hyper)

    found = {}
    for name, examples in shared.parts.task.evals.items():
        batches = train.eval_batches(wave.members[0].job, examples)
        found[name] = evaluate.collect(batches, sums, interrupted=lambda: shared.stop)
        if found[name] is None:
            return wave
    return wave._replace(
        members=[
            record(shared, member, wave.step, at(found, member.slot))
            if member.totals.evaluated < wave.step
            else member
            for member in wave.members
        ]
    )


def record(shared: Shared, member: Member, step: int, sums: Mapping) -> Member:
    """Writes and reports what an evaluation of one member found, by named set."""
    numbers = {
        f"{name}_{key}": value
        for name, parts in sums.items()
        for key, value in evaluate.means(evaluate.add(parts)).items()
    }
    totals = train.record(member.job, member.totals, step, numbers)
    shared.report(member.trial, step, numbers)
    return member._replace(totals=totals, loss=numbers.get("val_loss"))


def sample_now(wave: Wave, wanted: bool) -> None:
    """Writes the samples of all members, when wanted."""
    if not wanted:
        return
    host = jax.device_get(wave.state)
    for member in wave.members:
        state = jax.tree.map(jnp.asarray, at(host, member.slot))
        train.sample_now(member.job, state, member.totals, wave.step, wanted)


def save(wave: Wave) -> None:
    """Starts a checkpoint of every member, so that all have the same steps."""
    host = jax.device_get(wave.state._replace(frozen={}))  # stored already
    for member in wave.members:
        metric = member.loss if member.totals.evaluated == wave.step else None
        state = at(host, member.slot)
        train.save(member.job, state, member.totals, wave.step, metric)
    if wave.note and wave.note.exists():  # the copies of a save were what takes most
        for member in wave.members:
            member.job.saves.wait()
        wave.note.unlink(missing_ok=True)


def at(tree: Any, where: Any) -> Any:
    """Returns the entry `where` of every array of a tree."""
    return jax.tree.map(lambda x: x[where], tree)
