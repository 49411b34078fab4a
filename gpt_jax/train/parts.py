"""What a run is made of, built once; its folder, opened or begun."""

import contextlib
import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from gpt_jax import (
    adapters,
    checkpoint,
    checks,
    data,
    devices,
    evaluate,
    memory,
    metrics,
    model,
    processes,
    programs,
    runs,
    sample,
    screen,
    sharding,
    signals,
    stores,
    tasks,
)
from gpt_jax.checks import Options
from gpt_jax.step import TrainState, start, train_step
from gpt_jax.train.config import check, check_alike, unpack
from gpt_jax.train.events import first_prompt
from gpt_jax.train.job import (
    Job,
    Parts,
    Totals,
    at_end,
    last_step,
    make_hyper,
    tokens_per_step,
)
from gpt_jax.train.start import (
    begin,
    check_fork,
    first_tokenizer,
    keep_companions,
    restore,
    resumed,
    too_short,
)

ADAPTER = 1  # folded into the key of the first weights, for an adapter's own
ROLLOUT = 2**32 - 1  # folded into a run's key: no step has that number


def build(
    record: ConfigDict, workdir: Path, stop: signals.Stop, stack: contextlib.ExitStack
) -> tuple[Job, TrainState, Totals]:
    """Builds every part of a run; its ConfigDict is unpacked here and ends here.

    What is opened is closed by `stack`, in reverse order.
    """
    check(record)
    config = unpack(record)
    parts = parts_of(record, workdir)
    task, strategy = parts.task, parts.strategy
    processes.in_turn(lambda: stack.enter_context(runs.lock(workdir)))
    stop = processes.together(stop)
    others = processes.index() > 0  # the first process speaks for all
    job, state, totals = open_run(record, workdir, parts, stop, stack, quiet=others)
    if not at_end(config, task, totals, int(state.step)):
        job.bar.print(describe(job, state))
    return job, strategy.place(state), totals


def parts_of(record: ConfigDict, workdir: Path) -> Parts:
    """Builds the parts of a run on the devices that there are; prepares its text.

    Nothing in the run folder is touched: its tokenizer is read where it has one.
    """
    config = unpack(record)
    micro_batch = config.batch_size // config.accumulate
    programs.use_cache(config.compile_cache)
    mesh = vars(config.mesh)
    axes = {key: value for key, value in mesh.items() if key != "strategy"}
    sharding.set_cpu_devices(micro_batch, **axes, processes=processes.count())
    check_alike(record)
    if processes.count() > 1 and config.on_save_error != "stop":
        raise ValueError(
            f"on_save_error is {config.on_save_error}: one of several processes cannot "
            "go on alone; set it to stop"
        )
    processes.in_turn(lambda: check_fork(record, workdir))  # before its text is made
    task = processes.in_turn(lambda: make_task(config, workdir))
    processes.check_same("the fingerprint of the training data", task.fingerprint)
    adapter = config.adapter(model.declared(task.model.cfg))
    strategy = sharding.make(micro_batch, adapter.declared, **mesh)
    parts = make_parts(config, task, strategy)
    check_memory(parts)
    return parts


def check_memory(parts: Parts) -> None:
    """Refuses weights whose training needs more memory than there is, in any batch.

    That is the least that a step needs: what the batch adds is known when the step is
    compiled. The CPU devices of a machine share its memory.
    """
    state = jax.eval_shape(parts.first, jax.eval_shape(lambda: jax.random.key(0)))
    held, here = parts.strategy.held, parts.strategy.mesh.local_devices
    share = len(here) if here[0].platform == "cpu" else 1
    weights = share * sum(map(held, (state.params, state.frozen, state.ema)))
    gradients, moments = share * held(state.params), share * held(state.opt_state)
    need, free = weights + gradients + moments, memory.of_device(here[0])
    if need > free:
        raise memory.too_large(
            f"training this model needs {screen.size(need)} in any batch "
            f"({screen.size(weights)} for weights, {screen.size(gradients)} for "
            f"gradients, {screen.size(moments)} for the optimizer)",
            free,
            f"about {max(0, free) / need:.0%} of its parameters would fit, or an "
            "adapter that trains few (config.adapter), or more devices that share "
            "them (mesh.fsdp)",
        )


def make_parts(config: Options, task: tasks.Task, strategy: sharding.Strategy) -> Parts:
    """Builds what depends on neither the run folder nor the traced numbers."""
    cfg = task.model.cfg
    adapter = config.adapter(model.declared(cfg))
    tx = config.optimizer(
        adapter.declared, spread=strategy.spread, scales=model.rates(cfg)
    )
    options = programs.options_for_one_run(model.count(cfg))

    def fresh(weights, key):
        params, frozen = adapter.split(weights, jax.random.fold_in(key, ADAPTER))
        if task.reference:
            frozen = adapters.with_reference(weights, frozen)
        window = config.spike_window
        return start(params, frozen, tx, ema=config.ema, spike_window=window)

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
    record: ConfigDict,
    workdir: Path,
    parts: Parts,
    stop: signals.Stop,
    stack: contextlib.ExitStack,
    *,
    quiet: bool,
) -> tuple[Job, TrainState, Totals]:
    """Opens a locked run folder: restores its newest state, or makes the first one.

    The state is laid out as the strategy says. A quiet job shows no progress. The
    folder keeps the config as it stands in `record`.
    """
    config, task = unpack(record), parts.task
    saves = checkpoint.Checkpoints(workdir / "checkpoints", keep=config.keep)
    stack.callback(saves.close)
    init_key, key = jax.random.split(jax.random.key(config.seed))

    def create_or_check():
        runs.create_or_check(
            workdir, record, task.tokenizer, task.fingerprint, task.classes
        )

    if there := bool(processes.first(saves.steps)):
        processes.in_turn(create_or_check)
        state, totals, frozen = restore(saves, parts, init_key)
        totals, news = resumed(record, workdir, parts, totals, int(state.step))
    elif lost := saves.damaged():  # starting over would hide that a run was lost
        raise ValueError(
            f"no checkpoint of {workdir} is sound; damaged: "
            f"{', '.join(path.name for path in lost)} in {saves.folder}. Copy one back "
            "from elsewhere, or remove these folders to start over"
        )
    else:  # weights that do not fit are refused before there is a run
        state, totals = begin(record, parts, init_key)
        if processes.count() > 1:  # what other processes read and save with this one
            state = parts.strategy.place(state)
        processes.in_turn(create_or_check)
        if processes.index() == 0:
            keep_companions(config, workdir)
        frozen = saves.save_frozen(state.frozen) if state.frozen else ""
        news = too_short(config, task)
        if config.sample_every and not task.prompt:
            told = sample.advice(config.sample.prompt, task.tokenizer)
            news += [f"sample.prompt: {told}"] if told else []
    writer = bar = screen.Silence()
    ended = at_end(config, task, totals, int(state.step))
    if processes.index() == 0 and not ended:  # a run at its end is left as it is
        if there:
            runs.go_on(workdir, record, task.fingerprint)
        runs.keep_test(workdir, task.test)
        writer = metrics.Writer(
            workdir,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            config=record.to_dict(),
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


def make_task(config: Options, workdir: Path) -> tasks.Task:
    """Returns the config's task; its examples are prepared or found prepared."""
    text = config.data
    if (
        checks.begins(config.init_from) != checks.RANDOM
    ):  # weights only fit the vocabulary that they learnt
        text = replace(text, tokenizer=str(first_tokenizer(config, workdir)))
    task = tasks.make(
        config.task,
        model=config.model,
        text=text,
        dropout=config.dropout,
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


def check_rollouts(config: Options, task: tasks.Task) -> None:
    """Refuses what does not go with a task that makes its batches by rollouts.

    Raises:
      ValueError: names the key and the value found.
    """
    if task.rollout and config.mesh.strategy != "mesh":
        raise ValueError(
            f"mesh.strategy is {config.mesh.strategy}: task {config.task.name} needs "
            "mesh, since it draws its batches on the devices"
        )


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
        f"{config.mesh.strategy}; {begin} in {stores.shown(job.workdir)}"
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
