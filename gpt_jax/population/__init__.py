"""Population training: runs that differ in numbers alone, trained by one program.

The same `step.train_step` under `jax.vmap`, its member axis laid over the devices:
each device trains members of its own and they never talk. Every member keeps the run
folder that it would have had alone, so it can be resumed, sampled and compared as any
other run, and its curve is that of `train.train` up to float32 rounding.

    from configs import quickstart
    from gpt_jax import population

    configs = []
    for lr in (1e-3, 3e-3, 1e-2, 3e-2):
        config = quickstart.get_config("size=tiny")
        config.hyper.lr = lr
        configs.append(config)
    results = population.train(
        configs,
        [f"runs/lr/{config.hyper.lr}" for config in configs],
        members=0,
        rungs=[population.Rung(step=3, keep=2)],
        report=lambda member, step, numbers: print(member, step, numbers["val_loss"]),
    )
"""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from gpt_jax import files, fork, programs, runs, sharding, signals
from gpt_jax import train as alone
from gpt_jax.options import Mesh
from gpt_jax.population import evolve as evolution
from gpt_jax.population import program
from gpt_jax.population.evolve import Evolve
from gpt_jax.population.shared import Shared, loss_at, reached
from gpt_jax.population.wave import Wave, advance, open_wave, shrink
from gpt_jax.tasks.task import DROPOUTS
from gpt_jax.train import Result

__all__ = ["Evolve", "Rung", "group", "train", "use_devices", "varies"]
log = logging.getLogger(__name__)

NOTE = "wave.json"  # in the folder of a wave's first member, until the wave has saved


class Rung(NamedTuple):
    """Successive halving: after `step`, the `keep` trials of lowest loss go on."""

    step: int
    keep: int


def varies(key: str) -> bool:
    """Whether a dotted config key may differ between the members of one program."""
    return key == "seed" or key.startswith("hyper.")


def group(configs: Sequence[ConfigDict]) -> list[list[int]]:
    """Returns the indices of the configs that can train together, first come first."""
    found: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        fixed = {
            k: v for k, v in config.to_dict().items() if k not in ("seed", "hyper")
        }
        found.setdefault(json.dumps(fixed, sort_keys=True), []).append(index)
    return list(found.values())


def train(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[str | Path],
    *,
    members: int,
    rungs: Sequence[Rung],
    report: Callable[[int, int, dict], None],
    memory: float = math.inf,
    evolve: Evolve | None = None,
) -> list[Result]:
    """Trains the configs of one group together, going on with what is there.

    A trial that is done, or that a rung or its own divergence ended before, is not
    trained again. After a kill, each wave goes back to the newest checkpoint that all
    of its members have; one that was killed before it saved, of too little memory
    perhaps, comes again in halves, as does one that the devices have no memory for.

    Args:
      configs: see `group`.
      workdirs: their run folders, in the same order.
      members: at most so many at once; the rest waits. 0 = what fits into memory.
      rungs: by step; evaluated there whatever `eval_every` says. The losers keep their
        checkpoints, so `train.train` can go on with them.
      report: called with (index of the config, step, numbers) after every evaluation.
      memory: bytes that they may take on a CPU at most, where a job is given a share of
        a machine; what a container limits is known without it.
      evolve: how members copy each other on the way (evolve.py); None = they do not.

    Returns:
      How each run ended, in the order of the configs. Reasons are those of
      `train.train`, "pruned" (by a rung) and "diverged" (`max_skipped` updates in a
      row were not finite); `numbers` holds the last of each in metrics.jsonl.

    Raises:
      ValueError: the configs are not of one group, or one of them, the data or a run
        folder does not fit; nothing was overwritten.
    """
    folders = [files.expand(workdir) for workdir in workdirs]
    check(configs, folders, members, rungs)
    if evolve:
        if rungs:
            raise ValueError("rungs end members and evolve replaces them: give one")
        evolve.check()
        configs = [evolution.settled(*one) for one in zip(configs, folders)]
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(signals.watch(configs[0].grace_s))
        with signals.at_once():
            shared = build(configs, folders, stop, report, memory)
        opened = stack.enter_context(contextlib.ExitStack())
        wave = None
        if evolve:
            evolution.check_members(configs, evolve, shared.end)
        stops = evolution.milestones(evolve, shared.end)
        rungs = [*rungs, *(Rung(step, len(configs)) for step in stops)]
        for rung in [*sorted(rungs), Rung(shared.end, len(configs))]:
            wave = climb(shared, wave, rung, members, opened)
            if stop:
                break
            prune(shared, rung)
            if evolve and rung.step in stops:
                wave = move_on(shared, wave, evolve, rung.step, opened)
        for i in shared.going():
            shared.conclude(i, "signal", reached(folders[i]))
    return [shared.results[i] for i in range(len(configs))]


def check(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[Path],
    members: int,
    rungs: Sequence[Rung],
) -> None:
    """Refuses what cannot be trained together, before any device work."""
    if not configs or len(configs) != len(workdirs):
        raise ValueError(
            f"there are {len(configs)} configs and {len(workdirs)} run folders: give "
            "at least one config, and a folder for each"
        )
    if len({workdir.absolute() for workdir in workdirs}) < len(workdirs):
        raise ValueError("two members have the same run folder: give each its own")
    if len(group(configs)) > 1:
        other = configs[group(configs)[1][0]]
        lines = runs.difference(configs[0], other)
        fixed = [line for line in lines if not varies(line.split(":")[0])]
        raise ValueError(
            "only seed and hyper.* may differ between the members of a population; "
            "here differ: " + "; ".join(fixed)
        )
    if members < 0:
        raise ValueError(f"members is {members}: give a number, or 0 for what fits")
    for rung in rungs:
        if rung.step < 1 or rung.keep < 1:
            raise ValueError(f"{rung}: step and keep must be at least 1")
    if buckets := configs[0].task.get("buckets"):
        raise ValueError(
            f"task.buckets is {buckets}: the members of a population would pad a batch "
            "to different widths; leave it empty, or train the runs one by one "
            "(a sweep: --engine=process)"
        )
    if configs[0].fit_seconds:
        raise ValueError(
            f"fit_seconds is {configs[0].fit_seconds}: members train together, so none "
            "can choose its steps by its own time; set it to 0 and give steps"
        )
    for config in configs:
        alone.check(config)
    at = fork.parse(configs[0].fork)
    if early := [rung.step for rung in rungs if at and rung.step <= at.step]:
        raise ValueError(
            f"a rung judges after step {early[0]}, but the members begin as a fork, "
            f"{configs[0].fork}: rungs count steps from the trunk's first on"
        )
    for config, workdir in zip(configs, workdirs, strict=True):
        alone.check_fork(config, workdir)
    unread = [alone.unread(config) for config in configs]
    for key in unread[0].keys() & {f"hyper.{name}" for name in configs[0].hyper}:
        values = {config.hyper[key.removeprefix("hyper.")] for config in configs}
        if len(values) > 1 and all(key in keys for keys in unread):
            raise ValueError(
                f"{key} differs between the members, but {unread[0][key]} does not "
                "read it: they would all be the same run"
            )


def build(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[Path],
    stop: signals.Stop,
    report: Callable[[int, int, dict], None],
    memory: float,
) -> Shared:
    """Builds what the trials share, and finds out which have ended already."""
    highest = {  # a rate is left out of the program only if it is 0 for all
        key: max(config.hyper[key] for config in configs) for key in DROPOUTS
    }
    config = alone.unpack(configs[0])
    config = replace(config, hyper=config.hyper._replace(**highest))
    if jax.process_count() > 1:
        raise ValueError("a population trains in one process; start one on each host")
    programs.use_cache(config.compile_cache)
    axes = use_devices(config.mesh)
    task = alone.make_task(config, workdirs[0])
    if task.rollout:
        raise ValueError(
            f"task {config.task.name} makes its batches with its own weights, which a "
            "population does not do: train these runs one after another"
        )
    axes["data"] = min(sharding.make_mesh(0, **axes).size, len(configs))
    strategy = program.strategy(sharding.make_mesh(0, **axes))
    parts = alone.make_parts(config, task, strategy)
    alone.check_memory(parts)  # one member on each device
    parts = parts._replace(eval_fn=program.compile_evaluation(parts))
    end = alone.last_step(config, task)
    fixed = (workdirs, parts, stop, report, {}, {}, end, memory)
    shared = Shared([*configs], config, *fixed)
    for i, (record, workdir) in enumerate(zip(configs, workdirs, strict=True)):
        if reached(workdir):  # refuses another config now, not when its turn comes
            runs.create_or_check(
                workdir, record, task.tokenizer, task.fingerprint, task.classes
            )
        if note := runs.ended(workdir):
            shared.conclude(i, *note)
        elif shared.through(i, end):
            shared.conclude(i, shared.done(), reached(workdir))
    return shared


def use_devices(mesh: Mesh) -> dict[str, int]:
    """Asks for a CPU device per core, before anything else asks JAX for devices.

    Returns:
      The axes of the mesh.
    """
    # The devices of a population do not talk: it has no strategy.
    axes = {key: value for key, value in vars(mesh).items() if key != "strategy"}
    sharding.set_cpu_devices(0, **axes)
    return axes


def climb(
    shared: Shared,
    wave: Wave | None,
    rung: Rung,
    members: int,
    opened: contextlib.ExitStack,
) -> Wave | None:
    """Trains all trials that go on up to a rung, in as few waves as possible.

    A wave that holds them all goes on as it is; other waves come from checkpoints.
    """
    waiting = [i for i in shared.going() if not shared.through(i, rung.step)]
    if not waiting:
        return wave
    if wave and {*waiting} <= {member.trial for member in wave.members}:
        return advance(shared, shrink(shared, wave, waiting), rung.step)
    size = members or fit(shared, waiting)
    queue = split(waiting, min(size, *(halved(shared, i, size) for i in waiting)))
    while queue and not shared.stop:
        trials = queue.pop(0)
        wave = drop(wave, opened)  # its place on the devices is needed
        note = shared.workdirs[trials[0]] / NOTE
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"members": len(trials)}), encoding="utf-8")
        try:
            wave = open_wave(shared, trials, opened)
            wave = advance(shared, wave._replace(note=note), rung.step)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or len(trials) == 1:
                raise
            log.warning("there is no memory for %d members at once", len(trials))
            queue = split(trials, math.ceil(len(trials) / 2)) + queue
        finally:
            note.unlink(missing_ok=True)  # not killed: whatever happened is told
    return wave


def drop(wave: Wave | None, opened: contextlib.ExitStack) -> None:
    """Closes the run folders of a wave and frees its place on the devices."""
    if wave:
        jax.tree.map(lambda x: x.delete(), wave.state)
    opened.close()


def move_on(
    shared: Shared,
    wave: Wave | None,
    evolve: Evolve,
    step: int,
    opened: contextlib.ExitStack,
) -> Wave | None:
    """Has the worst members go on as copies of the best; returns the wave, if it does.

    They come from the disk then, as after a kill: so both are the same.
    """
    found = evolution.moves(shared, evolve, step)
    if not found:
        return wave
    wave = drop(wave, opened)
    for move in found:
        evolution.apply(shared, move, step)
    names = [shared.workdirs[move.to].name for move in found]
    log.info("after step %d %s go on as copies", step, ", ".join(names))
    return wave


def halved(shared: Shared, trial: int, size: int) -> int:
    """Returns half the members of a wave that was killed before it saved, or `size`.

    What kills a wave so early, each time again, is most often that the system has no
    memory left: nobody can be told of it then.
    """
    note = shared.workdirs[trial] / NOTE
    try:
        members = int(json.loads(note.read_text(encoding="utf-8"))["members"])
    except (OSError, ValueError, KeyError, TypeError):
        return size
    log.warning("%d members at once were killed before they saved: now half", members)
    return min(size, max(1, members // 2))


def fit(shared: Shared, trials: Sequence[int]) -> int:
    """Returns how many of these trials can train at once."""
    seeds = len({shared.configs[i].seed for i in trials})
    return program.fit(
        shared.slots(len(trials)),
        shared.mesh,
        lambda slots: shared.program(slots, min(seeds, slots)),
        shared.memory,
    )


def split(trials: Sequence[int], size: int) -> list[list[int]]:
    """Returns the waves: as few as possible, of nearly equal sizes, in order."""
    count = math.ceil(len(trials) / size)
    return [part.tolist() for part in np.array_split(trials, count)]


def prune(shared: Shared, rung: Rung) -> None:
    """Ends all but the best `keep` of the trials that came to a rung."""
    going = shared.going()
    losses = [loss_at(shared.workdirs[i], rung.step) for i in going]
    known = [math.inf if loss is None else loss for loss in losses]
    ranked = [i for _, i in sorted(zip(known, going, strict=True))]
    for i in ranked[rung.keep :]:
        runs.end(shared.workdirs[i], "pruned", rung.step)
        shared.conclude(i, "pruned", rung.step)
