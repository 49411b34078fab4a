"""Training: one loop for every task, adapter and strategy.

`train(config, workdir)` is the life of a run: build its parts, restore or start, then
loop. What happens to the weights at a step is in step.py.
"""

import contextlib
import gc
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from gpt_jax import (
    adapters,
    chat,
    checkpoint,
    checks,
    data,
    devices,
    evaluate,
    files,
    fork,
    metrics,
    model,
    optimizer,
    pace,
    plots,
    pretrained,
    processes,
    programs,
    runs,
    sample,
    screen,
    sharding,
    signals,
    tasks,
    words,
)
from gpt_jax.optimizer import Hyper
from gpt_jax.step import TrainState, averaged, start, train_step

ADAPTER = 1  # folded into the key of the first weights, for an adapter's own
EVAL_TOKENS = 16_384  # tokens in an evaluation batch, when the config does not say
ROLLOUT = 2**32 - 1  # folded into a run's key: no step has that number


class Parts(NamedTuple):
    """What runs that differ in traced numbers alone can share; see `make_parts`.

    Attributes:
      fresh: (weights, key) -> the state before the first step.
      first: jitted, key -> the state that a new run with random weights begins with.
      measured: the digest of what evaluations measure on, see `measured_on`.
    """

    task: tasks.Task
    strategy: sharding.Strategy
    join: Callable
    fresh: Callable[[Any, jax.Array], TrainState]
    first: Callable[[jax.Array], TrainState]
    step_fn: Callable
    eval_fn: Callable
    rollout_fn: Callable | None
    measured: str


class Job(NamedTuple):
    """The parts of one run, built once by `build`."""

    config: ConfigDict
    workdir: Path
    task: tasks.Task
    strategy: sharding.Strategy
    hyper: Hyper
    key: jax.Array
    step_fn: programs.Program
    eval_fn: Callable
    rollout_fn: Callable | None
    join: Callable
    saves: checkpoint.Checkpoints
    frozen: str  # the digest of what the run stores once, "" for nothing
    writer: metrics.Writer | screen.Silence
    bar: screen.Progress | screen.Silence
    rate: metrics.Throughput
    stop: signals.Stop


class Totals(NamedTuple):
    """What a run has used and reached so far; stored with every checkpoint."""

    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf
    stale: int = 0  # evaluations since the best one
    evaluated: int = -1  # the step of the last evaluation that was not interrupted
    measured: str = ""  # what the best was measured on; "" = an older run does not say
    since: int = 0  # the first step whose evaluations were measured on that


class Result(NamedTuple):
    """How a run ended: why, after which step, with which last numbers.

    `trained` is whether there was anything to do: a run at its end is left as it is.
    """

    reason: str
    step: int
    numbers: dict[str, float]
    exit_code: int
    trained: bool = True


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
      workdir: the run folder.
      profile: trace so many steps into `workdir/profile`.
      report: called with (step, numbers) after each evaluation on the way; what it
        returns, if not "", ends the run and is the result's reason.

    Raises:
      ValueError: the config, the data, or the run folder do not fit; nothing was
        overwritten.
      FloatingPointError: `max_skipped` updates in a row were not finite, or spikes.
      OSError: a checkpoint could not be saved, and `on_save_error` is "stop".
    """
    workdir = files.expand(workdir)
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
        last = pace.steps(found, done, left, rounds)
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
        if at_end(config, job.task, totals, step := int(job.strategy.view(state.step))):
            return Result(ends_by(config, job.task), step, {}, 0, trained=False)
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
    config, end = job.config, last_step(job.config, job.task)
    step = int(job.strategy.view(state.step))
    pending, numbers, reason = [], {}, ""
    started = time.monotonic() - totals.seconds
    batches, roll = train_batches(job, start=step), rollouts(job)
    batch: Any = None
    if step < end:
        batch = job.strategy.put(next(batches))
        job.step_fn.begin(state, like_rollout(job, state, batch), job.key, job.hyper)
    trace = profiler(job, step, end, 0 if processes.index() else profile)
    trace(step)
    early = early_steps(config, job.task)
    evaluates = step in (0, end) or due(step, config.eval_every, early)
    if evaluates and totals.evaluated < step:  # new, or interrupted just there
        numbers, totals = evaluate_now(job, state, totals, step)
    if step == 0:
        sample_now(job, state, totals, step, due(step, config.sample_every))
    if end == 0 == step:  # nothing but a start, which can be sampled and gone on with
        save(job, state, totals, step, numbers.get("val_loss"))
    while step < end and not (reason := reason or ended(job, totals, step)):
        rolled = roll(state, step, batch)
        state, sums, info = job.step_fn(state, rolled, job.key, job.hyper)
        step += 1
        last = step == end
        if not last:  # while the device computes
            batch = job.strategy.put(next(batches))
        sharding.wait_on_cpu(info)
        with save_errors(job):
            job.saves.check()
        pending.append((sums, info))
        totals = totals._replace(
            tokens=totals.tokens + tokens_per_step(config, job.task),
            seconds=time.monotonic() - started,
        )
        trace(step)
        metric = None
        evaluates = last or due(step, config.eval_every, early)
        samples = last or due(step, config.sample_every, early)
        if step == 1 or evaluates or samples or due(step, config.log_every):
            numbers |= log(job, totals, step, pending)
            pending = []
        if evaluates:
            measured, totals = evaluate_now(job, state, totals, step)
            numbers |= measured
            metric = measured.get("val_loss")
            if measured and not last:
                reason = report(step, {**measured, "tokens": totals.tokens})
        sample_now(job, state, totals, step, samples)
        improved = metric is not None and totals.stale == 0
        if last or improved or due(step, config.checkpoint_every):
            save(job, state, totals, step, metric)
    if 0 < step < end:
        save(job, state, totals, step, None)
    if not reason:
        cut = job.stop and totals.evaluated < step
        reason = "signal" if cut else ends_by(config, job.task)
    return finish(job, step, reason, numbers)


def build(
    config: ConfigDict, workdir: Path, stop: signals.Stop, stack: contextlib.ExitStack
) -> tuple[Job, TrainState, Totals]:
    """Builds every part of a run; the ConfigDict is unpacked here and ends here.

    What is opened is closed by `stack`, in reverse order.
    """
    check(config)
    parts = parts_of(config, workdir)
    task, strategy = parts.task, parts.strategy
    processes.in_turn(lambda: stack.enter_context(runs.lock(workdir)))
    stop = processes.together(stop)
    others = processes.index() > 0  # the first process speaks for all
    job, state, totals = open_run(config, workdir, parts, stop, stack, quiet=others)
    if not at_end(config, task, totals, int(state.step)):
        job.bar.print(describe(job, state))
    return job, strategy.place(state), totals


def parts_of(config: ConfigDict, workdir: Path) -> Parts:
    """Builds the parts of a run on the devices that there are; prepares its text.

    Nothing in the run folder is touched: its tokenizer is read where it has one.
    """
    micro_batch = config.batch_size // config.accumulate
    programs.use_cache(config.compile_cache)
    mesh = config.mesh
    axes = {key: value for key, value in mesh.items() if key != "strategy"}
    sharding.set_cpu_devices(micro_batch, **axes, processes=processes.count())
    check_alike(config)
    if processes.count() > 1 and config.on_save_error != "stop":
        raise ValueError(
            f"on_save_error is {config.on_save_error}: one of several processes cannot "
            "go on alone; set it to stop"
        )
    processes.in_turn(lambda: check_fork(config, workdir))  # before its text is made
    task = processes.in_turn(lambda: make_task(config, workdir))
    processes.check_same("the fingerprint of the training data", task.fingerprint)
    adapter = adapters.make(model.declared(task.model.cfg), **config.adapter)
    strategy = sharding.make(micro_batch, adapter.declared, **mesh)
    return make_parts(config, task, strategy)


def make_parts(
    config: ConfigDict, task: tasks.Task, strategy: sharding.Strategy
) -> Parts:
    """Builds what depends on neither the run folder nor the traced numbers."""
    cfg = task.model.cfg
    adapter = adapters.make(model.declared(cfg), **config.adapter)
    rule = config.optimizer.to_dict()
    ema = rule.pop("ema")
    tx = optimizer.make(
        adapter.declared, **rule, spread=strategy.spread, scales=model.rates(cfg)
    )
    options = programs.options_for_one_run(model.count(cfg))

    def fresh(weights, key):
        params, frozen = adapter.split(weights, jax.random.fold_in(key, ADAPTER))
        if task.reference:
            frozen = adapters.with_reference(weights, frozen)
        return start(params, frozen, tx, ema=ema, spike_window=config.spike_window)

    def first(key):
        return fresh(model.init(cfg, key), key)

    layout = strategy.layout(jax.eval_shape(first, jax.random.key(0)))
    return Parts(
        task=task,
        strategy=strategy,
        join=adapter.join,
        fresh=fresh,
        first=jax.jit(first, out_shardings=layout, compiler_options=options),
        step_fn=strategy.compile(
            partial(train_step, loss=task.loss, join=adapter.join, tx=tx)
        ),
        eval_fn=evaluate.compile(task.loss, strategy.mesh),
        rollout_fn=compile_rollout(task, adapter.join, strategy),
        measured=measured_on(task, config.eval_windows),
    )


def measured_on(task: tasks.Task, eval_windows: int) -> str:
    """Returns the sha256 of all examples that evaluations go through."""
    total = hashlib.sha256()
    for name, examples in task.evals.items():
        what = (
            name,
            task.tokenizer.sha256,
            data.digest(examples, at_most=eval_windows),
        )
        total.update(f"{what}\n".encode())
    return total.hexdigest()


def open_run(
    config: ConfigDict,
    workdir: Path,
    parts: Parts,
    stop: signals.Stop,
    stack: contextlib.ExitStack,
    *,
    quiet: bool,
) -> tuple[Job, TrainState, Totals]:
    """Opens a locked run folder: restores its newest state, or makes the first one.

    The state is laid out as the strategy says. A quiet job shows no progress.
    """
    task = parts.task
    saves = checkpoint.Checkpoints(workdir / "checkpoints", keep=config.keep)
    stack.callback(saves.close)
    init_key, key = jax.random.split(jax.random.key(config.seed))

    def create_or_check():
        runs.create_or_check(
            workdir, config, task.tokenizer, task.fingerprint, task.classes
        )

    if there := bool(processes.first(saves.steps)):
        processes.in_turn(create_or_check)
        state, totals, frozen = restore(saves, parts, init_key)
        totals, news = resumed(config, workdir, parts, totals, int(state.step))
    elif lost := saves.damaged():  # starting over would hide that a run was lost
        raise ValueError(
            f"no checkpoint of {workdir} is sound; damaged: "
            f"{', '.join(path.name for path in lost)} in {saves.folder}. Copy one back "
            "from elsewhere, or remove these folders to start over"
        )
    else:  # weights that do not fit are refused before there is a run
        state, totals = begin(config, parts, init_key)
        if processes.count() > 1:  # what other processes read and save with this one
            state = parts.strategy.place(state)
        processes.in_turn(create_or_check)
        if processes.index() == 0:
            keep_template(config, workdir)
        frozen = saves.save_frozen(state.frozen) if state.frozen else ""
        news = too_short(config, task)
        if config.sample_every and not task.prompt:
            told = sample.advice(config.sample.prompt, task.tokenizer)
            news += [f"sample.prompt: {told}"] if told else []
    writer = bar = screen.Silence()
    ended = at_end(config, task, totals, int(state.step))
    if processes.index() == 0 and not ended:  # a run at its end is left as it is
        if there:
            runs.go_on(workdir, config, task.fingerprint)
        runs.keep_test(workdir, task.test)
        writer = metrics.Writer(
            workdir,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            config=config.to_dict(),
            resume_step=int(state.step) if there else 0,
        )
        stack.callback(writer.close)
    if not quiet:
        total = last_step(config, task)
        bar = screen.Progress("step", total=total, start=int(state.step))
        stack.callback(bar.close)
    for line in news if processes.index() == 0 and not ended else ():
        if quiet:
            logging.getLogger(__name__).warning("%s: %s", workdir, line)
        else:
            bar.print(line)

    job = Job(
        config=config,
        workdir=workdir,
        task=task,
        strategy=parts.strategy,
        hyper=make_hyper(config, task),
        key=key,
        step_fn=programs.Program(
            parts.step_fn,
            name="the train step",
            tell=bar.print,
            # For those that had to compile: the first step needs all.
            ready=processes.wait,
        ),
        eval_fn=programs.announced(
            parts.eval_fn, "compiling the evaluation", tell=bar.print
        ),
        rollout_fn=parts.rollout_fn,
        join=parts.join,
        saves=saves,
        frozen=frozen,
        writer=writer,
        bar=bar,
        rate=throughput(task, parts.strategy),
        stop=stop,
    )
    return job, state, totals


def check(config: ConfigDict, recipe: ConfigDict | None = None) -> None:
    """Refuses what no run can have; see `checks.check`.

    Raises:
      ValueError: names the key, what it may be and the value found.
    """
    checks.check(config.to_dict(), recipe.to_dict() if recipe else None)


def unread(config: ConfigDict) -> dict[str, str]:
    """Returns the keys that nothing of a run reads; see `checks.unread`."""
    return checks.unread(config.to_dict())


def check_alike(config: ConfigDict) -> None:
    """Refuses processes of one run whose configs differ.

    Raises:
      ValueError: in all processes; names the keys.
    """
    theirs = runs.as_config(json.loads(processes.first(config.to_json)))

    def compare() -> None:
        if lines := runs.difference(theirs, config):
            raise ValueError(
                "this process has another config than the first:\n  "
                + "\n  ".join(lines)
                + "\nstart all processes of a run with the same flags"
            )

    processes.in_turn(compare)


def make_task(config: ConfigDict, workdir: Path) -> tasks.Task:
    """Returns the config's task; its examples are prepared or found prepared."""
    text = config.data.to_dict()
    if (
        checks.begins(config.init_from) != checks.RANDOM
    ):  # weights only fit the vocabulary that they learnt
        text["tokenizer"] = str(first_tokenizer(config, workdir))
    hyper = config.hyper
    task = tasks.make(
        **config.task,
        model=config.model.to_dict(),
        text=text,
        dropout=[key for key in hyper if key.startswith("dropout_") and hyper[key] > 0],
        progress=processes.index() == 0,
    )
    check_rollouts(config, task)
    if config.sample_every and task.classes:
        raise ValueError(
            f"sample_every is {config.sample_every}: a classifier writes no text; set "
            "it to 0"
        )
    if config.sample_every and config.sample.words and not task.known_words:
        raise ValueError(
            f"sample.words is True, but task {config.task.name} learns no running text "
            "whose words could be looked for: set it to False"
        )
    if config.sample_every:  # a prompt that cannot be sampled is refused
        prompt = first_prompt(task, config.sample.prompt)
        ids = task.prompt(prompt) if task.prompt else prompt
        sample.prompt_ids(ids, task.tokenizer, task.model.cfg)
    return task


def check_rollouts(config: ConfigDict, task: tasks.Task) -> None:
    """Refuses what does not go with a task that makes its batches by rollouts.

    Raises:
      ValueError: names the key and the value found.
    """
    if task.rollout and config.mesh.strategy != "mesh":
        raise ValueError(
            f"mesh.strategy is {config.mesh.strategy}: task {config.task.name} needs "
            "mesh, since it draws its batches on the devices"
        )


def first_tokenizer(config: ConfigDict, workdir: Path) -> Path:
    """Returns the tokenizer.json that belongs to `init_from`'s weights."""
    own = workdir / "tokenizer.json"  # a run that goes on needs no other
    if not own.is_file() and (at := fork.parse(config.fork)):
        return at.trunk / "tokenizer.json"
    if published := hugging_face(config):
        if own.is_file():
            return own
        tokenizer = pretrained.tokenizer(pretrained.find(published))
        path = (
            files.expand(config.data.folder) / f"tokenizer-{tokenizer.sha256[:12]}.json"
        )
        tokenizer.save(path)
        return path
    source = files.expand(config.init_from) / "tokenizer.json"
    if own.is_file() and not source.is_file():
        return own
    runs.read_config(config.init_from)  # refuses what is no run
    return source


def keep_template(config: ConfigDict, workdir: Path) -> None:
    """Keeps the chat template that belongs to `init_from`'s weights."""
    if checks.begins(config.init_from) == checks.RANDOM or config.task.get("template"):
        return
    at, published = fork.parse(config.fork), hugging_face(config)
    source = at.trunk if at else pretrained.find(published or config.init_from)
    template = pretrained.template(source)
    if template and template not in chat.TEMPLATES:
        files.write(workdir / "chat_template.jinja", template)


def hugging_face(config: ConfigDict) -> str:
    """Returns what `init_from=hf:...` or `gguf:...` names, "" when it names a run."""
    prefix, _, name = config.init_from.partition(":")
    return name if prefix in ("hf", "gguf") else ""


def make_hyper(config: ConfigDict, task: tasks.Task) -> Hyper:
    """Returns the config's traced numbers as float32 scalars."""
    numbers = config.hyper.to_dict()
    numbers["decay_steps"] = numbers["decay_steps"] or last_step(config, task)
    return Hyper(**{key: jnp.float32(value) for key, value in numbers.items()})


def restore(
    saves: checkpoint.Checkpoints, parts: Parts, key: jax.Array
) -> tuple[TrainState, Totals, str]:
    """Returns the newest sound state of this run, laid out, and its totals.

    Newer checkpoints are set aside. The third is the digest of the frozen trees, "" for
    none.
    """
    state, totals, frozen = restored(saves, parts, key, None)
    saves.rewind(int(state.step))
    return state, totals, frozen


def restored(
    saves: checkpoint.Checkpoints, parts: Parts, key: jax.Array, step: int | None
) -> tuple[TrainState, Totals, str]:
    """Returns the state of a step (None: the newest sound one), and as `restore`."""
    shapes = jax.eval_shape(parts.first, key)
    wanted = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        parts.strategy.layout(shapes),
    )
    state, meta, _ = saves.restore(wanted._replace(frozen={}), step=step)
    runs.check_tokenizer(saves.folder.parent, parts.task.tokenizer, meta)
    if wanted.frozen:
        state = state._replace(frozen=saves.load_frozen(meta["frozen"], wanted.frozen))
    return state, Totals(**meta["totals"]), meta.get("frozen", "")


def resumed(
    config: ConfigDict, workdir: Path, parts: Parts, totals: Totals, step: int
) -> tuple[Totals, list[str]]:
    """Returns the totals that a run goes on with after `step`, and what to tell of it.

    Where evaluations are of something else now, the best loss begins anew.
    """
    read = lambda: runs.read_config(workdir).to_json()  # noqa: E731
    old = runs.as_config(json.loads(processes.first(read)))
    told = rate_moves(old, config, parts.task, step)
    if not totals.measured:  # an older run: as far as its folder can tell
        noted = processes.first(lambda: runs.fingerprint_of(workdir))
        same = noted in (None, parts.task.fingerprint)
        if same and old.eval_windows == config.eval_windows:
            totals = totals._replace(measured=parts.measured)
    if totals.measured != parts.measured:
        if totals.best < math.inf:
            told.append(
                "evaluations are of other data or windows now: the best loss, "
                f"{totals.best:.4f} until here, begins anew"
            )
        totals = totals._replace(
            best=math.inf, stale=0, measured=parts.measured, since=step + 1
        )
    return totals, told


def rate_moves(
    old: ConfigDict, new: ConfigDict, task: tasks.Task, step: int
) -> list[str]:
    """Returns a line where the rate of a resumed run is not what it was to be."""
    hypers = [make_hyper(config, task) for config in (old, new)]
    factor = optimizer.SCHEDULES[new.optimizer.schedule]
    before, now = (float(factor(step, hyper) * hyper.lr) for hyper in hypers)
    if math.isclose(before, now, rel_tol=1e-3):
        return []
    ends, end = (int(hyper.decay_steps) for hyper in hypers)
    return [
        f"the schedule ends at step {end:,} now, not at {ends:,}: at step {step:,} the "
        f"learning rate goes from {before:.2g} to {now:.2g} "
        f"(--config.hyper.decay_steps={ends} keeps it as it was)"
    ]


def too_short(config: ConfigDict, task: tasks.Task) -> list[str]:
    """Returns a line where a run ends before its warm-up does."""
    end, warm = last_step(config, task), config.hyper.warmup_steps
    if not 0 < end <= warm:
        return []
    return [
        f"the warm-up of {warm:,.0f} steps is as long as the run of {end:,}, or "
        "longer: the learning rate does not come to hyper.lr"
    ]


def begin(
    config: ConfigDict, parts: Parts, key: jax.Array
) -> tuple[TrainState, Totals]:
    """Returns the state and totals that a new run begins with.

    They are those of `fork`'s step, or of none: `init_from`'s weights, or random ones.
    """
    if at := fork.parse(config.fork):
        return forked(at, config, parts, key)
    return first_state(config, parts, key), Totals(measured=parts.measured)


def check_fork(config: ConfigDict, workdir: Path) -> None:
    """Refuses a new run whose trunk is not there; one that goes on needs none."""
    started = checkpoint.Checkpoints(workdir / "checkpoints", keep=None).steps()
    if (at := fork.parse(config.fork)) and not started:
        fork.check_there(at, workdir)


def forked(
    at: fork.Fork, config: ConfigDict, parts: Parts, key: jax.Array
) -> tuple[TrainState, Totals]:
    """Returns the state of a trunk at a step, and the tokens that it has seen.

    Seconds and evaluations are those of the new run alone.

    Raises:
      ValueError: the fork would be another model, or ends before it begins.
    """
    task = parts.task
    processes.in_turn(
        lambda: fork.check_same(at, config, task.tokenizer, task.fingerprint)
    )
    if (end := last_step(config, task)) <= at.step:
        raise ValueError(
            f"{ends_by(config, task)} ends the run at step {end:,}, but it forks after "
            f"step {at.step:,}: steps count on from there, give more"
        )
    saves = checkpoint.Checkpoints(at.trunk / "checkpoints", keep=None)
    state, totals, _ = restored(saves, parts, key, at.step)
    return state, Totals(tokens=totals.tokens, measured=parts.measured)


def first_state(config: ConfigDict, parts: Parts, key: jax.Array) -> TrainState:
    """Returns the state before step 1, from `init_from`'s weights or random ones."""
    if checks.begins(config.init_from) == checks.RANDOM:
        return parts.first(key)
    cfg = parts.task.model.cfg
    if published := hugging_face(config):
        folder = pretrained.find(published)
        weights = pretrained.load(folder, replace(cfg, n_classes=0))
    else:
        weights = runs.open(config.init_from).params
    weights = model.stack(weights, cfg) if cfg.scan_layers else weights
    weights = adopt(weights, parts.task, key)
    check_positions(weights, cfg.context_length)
    checkpoint.check_same(jax.eval_shape(partial(model.init, cfg), key), weights)
    layout = parts.strategy.layout
    weights = sharding.lay_out(weights, layout(weights))
    places = layout(jax.eval_shape(parts.fresh, weights, key))
    return jax.jit(parts.fresh, out_shardings=places)(weights, key)


def check_positions(weights: Any, context_length: int) -> None:
    """Refuses learned positions that are not as many as the context is long."""
    learned = weights.get("positions", {}).get("embedding")
    if learned is not None and len(learned) != context_length:
        raise ValueError(
            f"model.context_length is {context_length}, but init_from learnt vectors "
            f"for {len(learned)} positions: take {len(learned)}, and shorter windows "
            "with data.seq_len; only models with rope can be given a longer context"
        )


def adopt(weights: Any, task: tasks.Task, key: jax.Array) -> Any:
    """Returns weights of another task, less `task.drops`, with new `task.draws`."""
    cfg = task.model.cfg
    wanted = flatten_dict(jax.eval_shape(partial(model.init, cfg), key), sep="/")
    found: dict[str, Any] = flatten_dict(weights, sep="/")  # type: ignore[assignment]
    kept = {
        path: leaf
        for path, leaf in found.items()
        if path in wanted or not any(re.search(rule, path) for rule in task.drops)
    }
    absent = [
        path
        for path in wanted.keys() - kept.keys()
        if any(re.search(rule, path) for rule in task.draws)
    ]
    if absent:

        def draw(key):  # these alone: the whole model may not fit on one device
            drawn = flatten_dict(model.init(cfg, key), sep="/")
            return {path: drawn[path] for path in absent}

        kept |= jax.jit(draw)(key)
    return unflatten_dict(kept, sep="/")


def last_step(config: ConfigDict, task: tasks.Task) -> int:
    """Returns the step at which `steps`, or a limit before it, ends the run."""
    return min(_last_steps(config, task).values())


def at_end(config: ConfigDict, task: tasks.Task, totals: Totals, step: int) -> bool:
    """Whether a run that has come to `step` has nothing left to do."""
    end = last_step(config, task)
    return step > end or (step == end and totals.evaluated >= step)


def ends_by(config: ConfigDict, task: tasks.Task) -> str:
    """Returns which key ends a run at its last step."""
    ends = _last_steps(config, task)
    return min(ends, key=lambda key: ends[key])


def _last_steps(config: ConfigDict, task: tasks.Task) -> dict[str, int]:
    """Returns the last step by each key that sets one; `steps` goes first."""
    found, each = {"steps": config.steps}, tokens_per_step(config, task)
    if config.max_tokens:
        found["max_tokens"] = math.ceil(config.max_tokens / each)
    if config.max_bytes and task.bytes_per_token:
        found["max_bytes"] = math.ceil(config.max_bytes / bytes_of(task, each))
    rounds = task.updates
    return {
        key: step if key == "steps" else math.ceil(step / rounds) * rounds
        for key, step in found.items()
    }


def bytes_of(task: tasks.Task, tokens: int) -> float:
    """Returns the bytes of training text that so many tokens stand for."""
    assert task.bytes_per_token, "checks.unread refuses max_bytes there"
    return tokens * task.bytes_per_token()


def tokens_per_step(config: ConfigDict, task: tasks.Task) -> int:
    """Returns the training tokens of one step, over all devices."""
    return config.batch_size * task.tokens


def throughput(task: tasks.Task, strategy: sharding.Strategy) -> metrics.Throughput:
    """Returns the meter of tokens per second, and of MFU where the peak is known."""
    cfg = task.model.cfg
    return metrics.Throughput(
        flops_per_token=metrics.flops_per_token(
            model.count(cfg),
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            head_dim=cfg.head_dim,
            seq_len=task.tokens,
        ),
        peak_flops=devices.peak_flops(jax.devices()[0].device_kind),
        devices=strategy.mesh.size,
    )


def describe(job: Job, state: TrainState) -> str:
    """Returns the lines that a run begins with: what trains, on what, from where."""
    cfg, task, mesh = job.task.model.cfg, job.task, job.strategy.mesh
    config, platform, step = job.config, jax.devices()[0].platform, int(state.step)
    begin = f"resuming after step {step}" if step else "starting"
    if config.fork and job.saves.latest() is None:
        begin = f"forking {config.fork}"
    parameters = f"{model.count(cfg):,} parameters"
    if "base" in state.frozen:
        total = model.count(state.params) + model.count(state.frozen["base"])
        parameters = f"{model.count(state.params):,} trainable of {total:,} parameters"
    return (
        f"{parameters}, {cfg.n_layers} layers of width "
        f"{cfg.d_model}, vocabulary {cfg.vocab_size:,}\n"
        f"{len(task.train):,} training windows of {task.tokens} tokens, "
        f"{tokens_per_step(config, task):,} tokens a step\n"
        f"{mesh.size} {platform} device{'s' * (mesh.size > 1)}, strategy "
        f"{config.mesh.strategy}; {begin} in {job.workdir}"
    )


def train_batches(job: Job, start: int) -> data.Batches:
    """Returns the endless batches of this process from step `start` on."""
    batch_size, accumulate = job.config.batch_size, job.config.accumulate
    return data.batches(
        job.task.train,
        batch_size=batch_size,
        accumulate=accumulate,
        seed=job.config.seed,
        start=start,
        rows=job.strategy.rows(batch_size // accumulate),
        timeout_s=job.config.data_timeout_s,
    )


def compile_rollout(
    task: tasks.Task, join: Callable, strategy: sharding.Strategy
) -> Callable | None:
    """Returns the jitted `(params, frozen, batch, key, step) -> batch` of a task.

    Each device rolls out its own rows, for as long as these take.
    """
    if task.rollout is None:
        return None
    rollout, rows = task.rollout, sharding.ROWS

    def rolled(params, frozen, batch, key, step):
        key = jax.random.fold_in(jax.random.fold_in(key, ROLLOUT), step)
        return rollout(join(params, frozen), batch, key)

    alike = PartitionSpec()
    return jax.jit(
        jax.shard_map(
            rolled,
            mesh=strategy.mesh,
            in_specs=(alike, alike, rows, alike, alike),
            out_specs=rows,
            check_vma=False,  # the first values of a decode loop belong to no device
        )
    )


def rollouts(job: Job) -> Callable[[TrainState, int, tasks.Batch], tasks.Batch]:
    """Returns (state, step, batch) -> the batch that the step trains on.

    That is the batch itself or, where the task has one, its rollout, which
    `task.updates` steps share.
    """
    held: tasks.Batch = {}

    def roll(state: TrainState, step: int, batch: tasks.Batch) -> tasks.Batch:
        nonlocal held
        if job.rollout_fn is None:
            return batch
        if not held or step % job.task.updates == 0:
            number = np.uint32(step)
            held = job.rollout_fn(state.params, state.frozen, batch, job.key, number)
            sharding.wait_on_cpu(held)
        return held

    return roll


def like_rollout(job: Job, state: TrainState, batch: tasks.Batch) -> tasks.Batch:
    """Returns a batch, or the shapes of one, like those that steps train on."""
    if job.rollout_fn is None:
        return batch
    step = (state.params, state.frozen, batch, job.key, np.uint32(0))
    return jax.eval_shape(job.rollout_fn, *step)


def due(step: int, every: int, early: Collection[int] = ()) -> bool:
    """Whether something that happens each `every` steps (0 = never) happens now.

    Before the first of them it also happens at the `early` steps.
    """
    return every > 0 and (step % every == 0 or (step in early and step < every))


def early_steps(config: ConfigDict, task: tasks.Task) -> list[int]:
    """Returns the steps 1, 2, 5, 10, 20, 50, ... from `early_from` (0 = none) on.

    A model learns most in its first steps, between which an even rhythm sees nothing.
    Steps amid those that share a rollout are left out: a best one would be saved there.
    """
    most = max(config.eval_every, config.sample_every)
    series = [n * 10**k for k in range(len(str(most))) for n in (1, 2, 5)]
    first = config.early_from or most
    return [n for n in series if first <= n < most and n % task.updates == 0]


def ended(job: Job, totals: Totals, step: int) -> str:
    """Returns why the run ends after `step`, before its last one, or "" to go on."""
    config = job.config
    if step % job.task.updates:  # a resumed run begins with a new rollout
        return ""
    if job.stop.look(0 < config.max_seconds <= totals.seconds):
        return "signal"
    if job.stop.late:
        return "max_seconds"
    if config.patience and totals.stale >= config.patience:
        return "patience"
    return ""


def log(job: Job, totals: Totals, step: int, pending: list) -> dict[str, float]:
    """Writes the means of the steps since the last line; the loop's only wait.

    Raises:
      FloatingPointError: too many updates in a row were skipped.
    """
    sums, infos = zip(*jax.device_get(pending), strict=True)
    first = step - len(infos) + 1
    for at, (part, said) in enumerate(zip(sums, infos, strict=True), start=first):
        if said.get("spike"):
            loss = part["loss"] / part["weight"]
            job.bar.print(f"step {at}: loss {loss:.4f} is a spike; update skipped")
        elif said["skipped_in_a_row"]:
            job.bar.print(f"step {at}: not finite; update skipped")
    info: dict = {name: float(value) for name, value in infos[-1].items()}
    in_a_row = [int(info["skipped_in_a_row"]) for info in infos]
    info.pop("spike", None)
    del info["skipped_in_a_row"]
    info["skipped"] = int(info["skipped"])
    if (worst := max(in_a_row)) >= job.config.max_skipped:
        raise give_up(job, worst, first + in_a_row.index(worst))
    if info["skipped"] >= step == last_step(job.config, job.task):
        raise give_up(job, worst, first + in_a_row.index(worst))
    finite = [part for part in sums if math.isfinite(part["loss"])]
    numbers = dict(info)
    if finite:
        means = evaluate.means(evaluate.add(finite))
        means.pop("perplexity", None)  # train_loss says the same
        numbers |= {f"train_{name}": value for name, value in means.items()}
    numbers |= job.rate.measure(totals.tokens)
    write(job, totals, step, numbers)
    job.bar.update(step, **numbers)
    return numbers


def write(job: Job, totals: Totals, step: int, numbers: dict[str, float]) -> None:
    """Records numbers; a line that a full disk refuses is written with a later one."""
    spent = {"tokens": totals.tokens, "seconds": totals.seconds}
    if job.config.max_bytes:
        spent["bytes"] = bytes_of(job.task, totals.tokens)
    with save_errors(job):
        job.writer.write(step, **spent, **numbers)


def give_up(job: Job, worst: int, step: int) -> FloatingPointError:
    """Returns why a run cannot go on after `worst` skipped updates; keeps their data.

    `skipped-<step>.npz` in the run folder holds the last batch, the steps and, for each
    of them, the numbers of its examples [steps, batch_size].
    """
    steps = np.arange(step - worst + 1, step + 1)
    size, seed, examples = job.config.batch_size, job.config.seed, job.task.train
    ids = [data.members(len(examples), size, seed, int(s) - 1) for s in steps]
    path = job.workdir / f"skipped-{step}.npz"
    batches = train_batches(job, start=step - 1)
    kept: dict[str, Any] = {**next(batches), "steps": steps, "examples": np.array(ids)}
    batches.close()
    if processes.index() == 0:  # its share of the batch
        with save_errors(job), files.draft(path) as part, part.open("wb") as file:
            np.savez(file, **kept)
    shown = ", ".join(map(str, ids[-1][:8])) + ", ..." * (size > 8)
    spikes = " or spikes" if job.config.spike_window else ""
    return FloatingPointError(
        f"{worst} updates in a row were not finite{spikes}, the last at step {step} "
        f"(batch {step - 1} of seed {seed}, examples {shown}: see {path}); none was "
        "applied: start again with a lower hyper.lr or a longer hyper.warmup_steps in "
        f"another --workdir; --config.init_from={job.workdir} takes the last good "
        "weights"
    )


def weights_of(job: Job, state: TrainState) -> tuple[Any, Any]:
    """Returns (weights, frozen) on the mesh; the moving average where one is kept."""
    params, frozen = job.strategy.view((averaged(state), state.frozen))
    return job.join(params, frozen), frozen


def evaluate_now(
    job: Job, state: TrainState, totals: Totals, step: int
) -> tuple[dict[str, float], Totals]:
    """Evaluates every named set, writes the numbers, and keeps the best loss."""
    weights, frozen = weights_of(job, state)
    numbers: dict[str, float] = {}
    for name, examples in job.task.evals.items():
        job.bar.doing(f"evaluating {name}")
        means = evaluate.evaluate(
            weights,
            frozen,
            eval_batches(job, examples),
            job.hyper,
            compiled=job.eval_fn,
            mesh=job.strategy.mesh,
            interrupted=job.stop.look,
        )
        if means is None:
            return {}, totals
        numbers |= {f"{name}_{key}": value for key, value in means.items()}
    return numbers, record(job, totals, step, numbers)


def record(job: Job, totals: Totals, step: int, numbers: dict[str, float]) -> Totals:
    """Writes and shows the numbers of an evaluation; returns the totals with it."""
    loss = numbers.get("val_loss", math.inf)
    better = loss < totals.best
    totals = totals._replace(
        best=loss if better else totals.best,
        stale=0 if better else totals.stale + 1,
        evaluated=step,
    )
    since = {"evaluated_since": totals.since} if totals.since else {}
    write(job, totals, step, numbers | since)
    job.bar.print(
        f"step {step}: "
        + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
    )
    job.rate.pause()
    return totals


def eval_batches(job: Job, examples) -> Iterator[tasks.Batch]:
    """Returns the batches of one evaluation, as large as one device likes them."""
    devices = job.strategy.mesh.size
    return data.once(
        examples,
        batch_size=eval_rows(job.config, job.task, len(examples), devices),
        at_most=job.config.eval_windows,
    )


def eval_rows(config: ConfigDict, task: tasks.Task, examples: int, devices: int) -> int:
    """Returns how many of so many examples an evaluation's batch holds."""
    size = config.eval_batch_size or max(
        config.batch_size // config.accumulate, EVAL_TOKENS // task.tokens
    )
    size = min(size, config.eval_windows or examples, examples)
    return math.ceil(size / devices) * devices


def sample_now(
    job: Job, state: TrainState, totals: Totals, step: int, wanted: bool
) -> None:
    """Writes samples to samples.md and shows them, when wanted."""
    if not (wanted and job.config.sample_every) or job.stop:
        return
    prompt = first_prompt(job.task, job.config.sample.prompt)
    ids = job.task.prompt(prompt) if job.task.prompt else None
    weights, _ = weights_of(job, state)
    texts = sample.texts(
        model=job.task.model,
        params=sharding.for_decoding(weights, job.strategy),
        tokenizer=job.task.tokenizer,
        prompts=[ids or prompt],
        count=job.config.sample.count,
        seed=job.config.seed,
        stop=job.task.stop,
        **checks.sample_settings(job.config.sample),
    )
    prompt += "\n" if ids else ""
    if processes.index() == 0:
        whole = [prompt + text.text for text in texts]
        with save_errors(job):
            runs.add_samples(job.workdir, step, whole)
            job.writer.samples(step, whole)
    for text in texts:
        job.bar.print(f"--- sample after step {step}\n{prompt}{text.text}\n---")
    known = job.task.known_words if job.config.sample.words else None
    if known and processes.index() == 0:
        share = words.share([(prompt, text.text) for text in texts], known())
        if share is not None:
            write(job, totals, step, {"sample_words": share})
            job.bar.print(f"{share:.0%} of its words are words of the text")
    job.rate.pause()


def first_prompt(task: tasks.Task, prompt: str) -> str:
    """Returns the prompt of the samples; an empty one may need a character of the text.

    Raises:
      ValueError: the prompt has characters that the tokenizer never saw.
    """
    if task.tokenizer.encode(prompt) or task.tokenizer.eos_id is not None:
        return prompt
    return task.tokenizer.decode([int(task.train[0]["tokens"][0])])


def save(
    job: Job, state: TrainState, totals: Totals, step: int, metric: float | None
) -> None:
    """Starts an asynchronous checkpoint of everything that a resume needs."""
    view = job.strategy.view(state._replace(frozen={}))
    meta = {
        "totals": totals._asdict(),
        "fingerprint": job.task.fingerprint,
        "tokenizer": job.task.tokenizer.sha256,
    }
    if job.frozen:
        meta["frozen"] = job.frozen
    with save_errors(job):
        job.saves.wait()
    with save_errors(job):
        job.saves.save(step, view, metric=metric, meta=meta, since=totals.since)


@contextlib.contextmanager
def save_errors(job: Job) -> Iterator[None]:
    """Lets a failure to write pass, told, where on_save_error is "continue"."""
    try:
        yield
    except OSError as error:
        # One of several cannot decide alone, and a lost process is no full disk.
        if job.config.on_save_error == "stop" or processes.count() > 1:
            raise
        job.bar.print(f"training goes on, though: {error}")


def finish(job: Job, step: int, reason: str, numbers: dict[str, float]) -> Result:
    """Waits for the last checkpoint, draws the curve, and says how the run ended."""
    job.saves.wait()
    last = processes.first(job.saves.latest) or 0
    if last < step:  # what was to be passed over may not be the last one
        raise OSError(
            f"the checkpoint of step {step}, the last one, is not in "
            f"{job.saves.folder} (the newest there is {last}); the same command goes "
            "on from that"
        )
    if processes.index() == 0:
        plots.of_run(job.workdir)
    code = job.stop.exit_code if job.stop else 0
    return Result(reason=reason, step=step, numbers=numbers, exit_code=code)


def profiler(job: Job, start: int, end: int, steps: int) -> Callable[[int], None]:
    """Returns what the loop calls after each step to trace `steps` of them."""
    first = max(start, min(start + 5, end - steps))  # past compilation, if it fits
    last = min(first + steps, end)

    def trace(step: int) -> None:
        if first >= last or step not in (first, last):
            return
        try:
            if step == first:
                jax.profiler.start_trace(str(job.workdir / "profile"))
                return
            jax.profiler.stop_trace()
            job.bar.print(f"profile written to {job.workdir / 'profile'}")
        except (OSError, RuntimeError) as error:  # a full disk, or none is running
            job.bar.print(f"training goes on without a profile: {error}")

    return trace
