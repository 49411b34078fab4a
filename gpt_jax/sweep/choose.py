"""Which engine suits a sweep: a process per trial, or many trials in one program."""

import contextlib
import json
import math
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gpt_jax import files, metrics, population, runs
from gpt_jax.screen import clock, count
from gpt_jax.sweep import plan as plans
from gpt_jax.sweep.plan import Plan

STEPS = 24  # of the run that is measured
FIRST = 5  # the step from which on they are timed
# The share of a device's peak that a step of many members comes to.
FULL = 0.4
MOST = 1000  # points that are looked at


class Measured(NamedTuple):
    """What a run of a sweep takes, in seconds.

    Attributes:
      start: from the start of its process to its first step, compiling included.
      compile: of that, until the program was compiled.
      step: one step.
      mfu: the share of the device's peak that a step alone comes to; 1 on a CPU.
    """

    start: float
    compile: float
    step: float
    mfu: float


def engine(
    plan: Plan,
    base: ConfigDict,
    *,
    command: Sequence[str],
    environment: Mapping[str, str],
    accelerators: int,
    workers: int,
    needs_processes: bool,
) -> tuple[str, str]:
    """Returns "vmap" or "process", and why.

    Where both can train it, a short run of the first point is measured.

    Args:
      plan, base: what is swept.
      command: what starts the process of a trial.
      environment: that of the measured one.
      accelerators: how many there are for trials; 0 = the cores of the CPU.
      workers: trials at once; 0 = one on each.
      needs_processes: whether something was asked for that only processes do.
    """
    if plan.evolve:
        return "vmap", "points that evolve train together"
    if needs_processes:
        return "process", "--scheduler and --trial_timeout need it"
    if plan.pruner and "by" in plan.pruner:
        return "process", "only it prunes by tokens"
    if plan.pruner and (plan.pruner["name"], plan.metric) != ("asha", "val_loss"):
        return "process", f"only it prunes by {plan.pruner['name']} and {plan.metric}"
    configs = sample(plan, base)
    if why := unfit(configs[0]):
        return "process", why
    groups = [len(group) for group in population.group(configs)]
    if max(groups) == 1 and len(groups) > 1:
        return "process", "no two trials could share a program"
    found = measure(configs[0], command, {**environment})
    places = accelerators or files.cores()
    steps = statistics.fmean(config.steps for config in configs)
    scale = plan.size / len(configs)
    alone = of_processes(found, plan.size, workers or places, steps)
    together = scale * of_programs(found, groups, places, steps)
    chosen = "vmap" if together <= alone else "process"
    return chosen, (
        f"about {clock(together)} in {count(round(scale * len(groups)), 'program')}, "
        f"{clock(alone)} in {plan.size} processes (measured: start {found.start:.1f} "
        f"s, of which compiling {found.compile:.1f} s, step {1000 * found.step:.1f} ms)"
    )


def sample(plan: Plan, base: ConfigDict) -> list[ConfigDict]:
    """Returns the configs of a sweep, or of some draws of its space."""
    if not plan.space:
        built = list(plans.configs(base, plan).values())
        return [config for _, config in built][:MOST]
    source, build, found = random.Random(plan.seed), plans.builder(base, plan), []
    for _ in range(50 * plan.trials):
        _, point = plan.draw(lambda key, axis: axis.draw(source))
        if point is not None:
            found += [build(seeded)[1] for seeded in plan.with_seeds(point)]
        if len(found) >= min(plan.size, MOST):
            break
    if not found:
        raise ValueError("to_config() allows none of many draws")
    return found


def unfit(config: ConfigDict) -> str:
    """Returns why a population cannot train such a run; "" where it can."""
    if config.task.get("buckets"):
        return "a population does not pad batches to several widths (task.buckets)"
    if config.task.get("updates"):
        return f"a population makes no rollouts, as task {config.task.name} does"
    if config.mesh.fsdp > 1 or config.mesh.tensor > 1:
        return "the mesh splits the weights of each trial"
    return ""


def measure(
    config: ConfigDict, command: Sequence[str], environment: Mapping[str, str]
) -> Measured:
    """Returns what a short run of a config takes, as a trial's process.

    Raises:
      ValueError: it did not come to its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "trial"
        order = {
            "folder": str(record),
            "config": short(config).to_dict(),
            "criterion": ("train_loss", "minimize", "best"),
            "after": {"names": []},
        }
        began = time.monotonic()
        with (Path(folder) / "trial.log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment},
                text=True,
            )
            with process:  # its input stays open: it leaves when that closes
                pipe: Any = process.stdin
                with contextlib.suppress(BrokenPipeError):
                    pipe.write(json.dumps(order) + "\n")
                    pipe.flush()
                process.wait()
            took = time.monotonic() - began
            log.seek(0)
            said = log.read().strip().splitlines()
        rows = metrics.read(record) if (record / metrics.FILE).is_file() else []
        steps = {row["step"]: row for row in rows if "lr" in row}
        if len(steps) < STEPS:
            raise ValueError(
                "the first trial, which was to be measured, did not train: "
                + (said[-1] if said else f"it ended with code {process.returncode}")
            )
    each = [steps[i + 1]["seconds"] - steps[i]["seconds"] for i in range(FIRST, STEPS)]
    step = statistics.median(each)
    compiling = max(0.0, steps[1]["seconds"] - step)
    rates = [row["mfu"] for row in steps.values() if row.get("mfu")]
    return Measured(
        start=max(0.0, took - sum(each) - FIRST * step),
        compile=compiling,
        step=step,
        mfu=statistics.median(rates) if rates else 1.0,
    )


def short(config: ConfigDict) -> ConfigDict:
    """Returns the config of a run of STEPS steps that writes little."""
    made = runs.as_config(json.loads(config.to_json()))
    made.update(steps=STEPS, max_tokens=0, max_bytes=0, max_seconds=0.0, patience=0)
    made.update(log_every=1, eval_every=0, eval_windows=1, early_from=0)
    made.update(checkpoint_every=0, sample_every=0, tensorboard=False, wandb="")
    made.mesh.cpu_devices = made.mesh.cpu_devices or 1  # as a trial beside others
    return made


def of_processes(found: Measured, size: int, places: int, steps: float) -> float:
    """Returns about how long so many trials take, a process each."""
    rounds = math.ceil(size / min(places, size))
    return rounds * (found.start + steps * found.step)


def of_programs(
    found: Measured, groups: Sequence[int], places: int, steps: float
) -> float:
    """Returns about how long groups take, a program each.

    On a device members take turns as soon as they fill it.
    """
    took = found.start
    for number, size in enumerate(groups):
        members = math.ceil(size / places)
        took += found.compile if number else 0.0
        took += steps * found.step * max(1.0, members * min(1.0, found.mfu / FULL))
    return took
