"""Train many configurations and compare them: grids, searches, seeds.

  python -m experiments.sweep --sweep=experiments/sweeps/lr.py --out=runs/sweep_lr
  python -m experiments.sweep --sweep=experiments/sweeps/lr.py --out=runs/long \\
      --set=steps=2000 --set=hyper.weight_decay=0
  python -m experiments.sweep --sweep=experiments/sweeps/lr.py --dry_run
  python -m experiments.sweep --sweep=experiments/sweeps/seeds.py --engine=auto

A sweep file (see experiments/sweeps/) names a config and lists points, or a space to
search. Every point is built and checked before the first trial starts. Each trial is a
process of its own and an ordinary run folder, OUT/<its name>/; with --engine=vmap those
that differ in the seed and hyper.* alone share a program, and --engine=auto measures
which is faster. The same command goes on with a sweep that was stopped or killed: what
has ended is not run again.

Many machines that share a file system:

  dask scheduler                            # on one machine, prints its address
  dask worker tcp://HOST:8786 --nthreads 1  # on every machine, as often as it has room
  python -m experiments.sweep --sweep=experiments/sweeps/lr.py \\
      --out=/shared/lr_width --scheduler=tcp://HOST:8786

An array of jobs needs no scheduler: of a list of points --shard=3/16 trains every 16th,
from the third on; the same command without it writes the report at the end.

OUT gets report.html (open it in a browser), results.csv, trials.csv, results.json and
pictures. Exit codes: 0 done; 1 some trials failed, or the sweep could not go on; 2 a
mistake in the sweep; 130 and 143 stopped by a signal, the same command goes on.
"""

import glob
import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from absl import flags

from experiments import door
from gpt_jax import commands

MOST_LINES = 60  # of the printed table; results.csv has all
SLURM = ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE")  # MiB, MiB, cores
# The variable that says which GPUs a process sees, and what lists them.
VISIBLE = {
    "CUDA_VISIBLE_DEVICES": ("nvidia-smi", "-L"),
    "HIP_VISIBLE_DEVICES": ("rocm-smi", "--showid"),
}

SWEEP = door.define_path("sweep", "", "Sweep file, e.g. experiments/sweeps/lr.py.")
OUT = door.define_path("out", "", "Folder (default: runs/sweep_<sweep's name>).")
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of the config, for all trials.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check all trials and list them only.")
ENGINE = flags.DEFINE_enum(
    "engine",
    "process",
    ["process", "vmap", "auto"],
    "A process per trial, many trials in a program, or what is measured to be faster.",
)
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Trials at once; 0 = one per accelerator or core (vmap: what fits)."
)
SCHEDULER = flags.DEFINE_string("scheduler", "", "A dask scheduler: tcp://HOST:8786.")
STORAGE = flags.DEFINE_string(
    "storage", "", "Optuna storage URL, e.g. postgresql://... (default: a file in OUT)."
)
RETRIES = flags.DEFINE_integer(
    "retries", 1, "So often a trial that crashed, and got no further, runs again."
)
TRIAL_TIMEOUT = flags.DEFINE_float(
    "trial_timeout",
    0.0,
    "Seconds without a sign of life after which a trial is killed; 0 = never.",
)
METRIC = flags.DEFINE_string(
    "metric", "", "What tables and report judge by (default: the sweep's own)."
)
DIRECTION = flags.DEFINE_enum(
    "direction", None, ["minimize", "maximize"], "Which of --metric is better."
)
AT = flags.DEFINE_string(
    "at", "", "Which evaluation they count: best, last, or the mean of the 'last 3'."
)
SHARD = flags.DEFINE_string(
    "shard", "", "3/16: only every 16th point, from the third on; others run the rest."
)
MAX_TRIALS = flags.DEFINE_integer(
    "max_trials", 0, "So many trials begin at most this time; 0 = all."
)
MAX_SECONDS = flags.DEFINE_float(
    "max_seconds", 0.0, "No trial begins after so much time; 0 = no limit."
)
GPUS_PER_TRIAL = flags.DEFINE_integer("gpus_per_trial", 1, "GPUs of a trial's process.")
RERUN_FAILED = flags.DEFINE_bool("rerun_failed", False, "Run failed trials once more.")


def main(_: list[str]) -> int:
    """Runs a sweep, writes its report, and returns the exit code."""
    _check_flags()
    from gpt_jax.sweep import plan as plans

    plan = plans.load(SWEEP.value, extra=SET.value)
    plan, base = plans.fix(plan, door.load_config(plan.config))
    out = Path(OUT.value or f"runs/sweep_{plan.name}")

    import jax

    from gpt_jax import stores
    from gpt_jax.sweep import run
    from gpt_jax.sweep.shard import parse

    for flag in (SHARD, SCHEDULER):
        if flag.value and (address := stores.address_of(out)):
            raise ValueError(
                f"--{flag.name} and --out={address}: several machines need a folder "
                "that all of them see; mount the store, and give --out that"
            )
    asked = {"metric": METRIC.value, "direction": DIRECTION.value, "at": AT.value}
    asked = {key: value for key, value in asked.items() if value}
    criterion = plan.criterion._replace(**asked)
    criterion.check()
    shard = parse(SHARD.value)
    os.environ.setdefault("WANDB_RUN_GROUP", out.name)  # what W&B shows together
    places = _places()
    engine = _engine(plan, base, places)
    if engine == "process":  # accelerators are for the trials
        jax.config.update("jax_platforms", "cpu")
    if DRY_RUN.value:
        run.check(plan, base, criterion)
        for line in run.listing(plan, base):
            print(line)
        return 0
    done = _run(plan, base, out, engine, places, criterion=criterion, shard=shard)
    return _end(out, done) if shard.whole else _end_of_shard(out, done)


def _check_flags() -> None:
    """Raises ValueError where a flag cannot be what it is, or not beside another."""
    if not SWEEP.value:
        raise ValueError("--sweep is missing, e.g. --sweep=experiments/sweeps/lr.py")
    for flag in (WORKERS, RETRIES, TRIAL_TIMEOUT, MAX_TRIALS, MAX_SECONDS):
        if not flag.value >= 0:
            raise ValueError(f"--{flag.name}={flag.value} must not be negative")
    if GPUS_PER_TRIAL.value < 1:
        raise ValueError(f"--gpus_per_trial={GPUS_PER_TRIAL.value} must be at least 1")
    for flag in (TRIAL_TIMEOUT, SCHEDULER):
        if flag.value and ENGINE.value == "vmap":
            raise ValueError(
                f"--{flag.name} needs --engine=process: vmap is one process"
            )


def _engine(plan: Any, base: Any, places: list[dict[str, str]]) -> str:
    """Returns the engine that was asked for; the better one, and says why, of auto."""
    if ENGINE.value != "auto":
        return ENGINE.value
    from gpt_jax.sweep import choose

    engine, why = choose.engine(
        plan,
        base,
        command=commands.argv("trial"),
        environment={**os.environ, **(places[0] if places else {})},
        accelerators=len(places),
        workers=WORKERS.value,
        needs_processes=bool(SCHEDULER.value or TRIAL_TIMEOUT.value),
    )
    print(f"engine {engine}: {why}")
    return engine


def _run(
    plan: Any, base: Any, out: Path, engine: str, places: list[dict[str, str]], **fixed
) -> Any:
    """Runs the trials with what the flags say; returns what `sweep.run` does."""
    from gpt_jax import report
    from gpt_jax.sweep import run
    from gpt_jax.sweep.study import Budget

    options = {
        "storage": STORAGE.value,
        "retries": RETRIES.value,
        "rerun_failed": RERUN_FAILED.value,
        "budget": Budget(MAX_TRIALS.value, MAX_SECONDS.value),
        "changed": lambda results: report.tables(out, results),
        **fixed,
    }
    if engine == "vmap":
        limits = {"members": WORKERS.value, "memory": _memory()}
        return run.batched(plan, base, out, **limits, **options)
    return run.processes(
        plan,
        base,
        out,
        command=commands.argv("trial")[1:],
        trial_timeout=TRIAL_TIMEOUT.value,
        scheduler=SCHEDULER.value,
        workers=WORKERS.value,
        accelerators=places,
        environment={"WANDB_RUN_GROUP": os.environ["WANDB_RUN_GROUP"]},
        **options,
    )


def _end(out: Path, done: Any) -> int:
    """Writes the report, says what came of the sweep, and returns its exit code."""
    from gpt_jax import report

    missing = report.write(out, done.results)
    if len(done.results["settings"]) <= MOST_LINES:
        print(report.table(done.results))
    print(report.summary(done.results))
    if done.exit_code > 1:
        print(f"stopped; the same command goes on: {door.command(())}")
        return done.exit_code
    if done.left:
        print(f"{done.left} trials are left; the same command goes on")
    print(f"  the report   {missing or f'{out}/report.html'}")
    print(f"  the table    {out}/results.csv")
    if done.results["command"]:
        print(f"  train best   {done.results['command']}")
    if done.exit_code:
        print("some trials failed: --rerun_failed runs them again")
    return done.exit_code


def _end_of_shard(out: Path, done: Any) -> int:
    """Says what became of a shard, and returns its exit code."""
    if done.exit_code > 1:
        print(f"stopped; the same command goes on: {door.command(())}")
    elif done.left:
        print(f"{done.left} trials are left; the same command goes on")
    else:
        failed = ", some of its trials failed" if done.exit_code else ""
        print(
            f"shard {SHARD.value} has ended{failed}; when all have, the same command "
            f"without --shard writes {out}/report.html"
        )
    return done.exit_code


def _places() -> list[dict[str, str]]:
    """Returns what the environment of each trial at once must hold, by accelerators.

    Raises:
      ValueError: there are not as many as a trial is to have.
    """
    found, each = _accelerators(), GPUS_PER_TRIAL.value
    if each == 1:
        return found
    gpus = [place for place in found if place]
    if len(gpus) < each:
        raise ValueError(
            f"--gpus_per_trial={each}: there are {len(gpus)} GPUs for trials here"
        )
    (name,) = gpus[0]
    groups = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)]
    return [{name: ",".join(gpu[name] for gpu in group)} for group in groups]


def _memory() -> float:
    """Returns the bytes that Slurm gave this job on this machine; inf without it."""
    told = {name: int(os.environ.get(f"SLURM_{name}") or 0) for name in SLURM}
    of_cores = told["MEM_PER_CPU"] * told["CPUS_ON_NODE"]
    return 2.0**20 * (told["MEM_PER_NODE"] or of_cores) or math.inf


def _accelerators() -> list[dict[str, str]]:
    """Returns what a process's environment must hold to use one accelerator alone.

    JAX is not asked: it would take them. {} is a TPU, which a process has as a whole.
    """
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    for name, program in VISIBLE.items():
        chosen = os.environ.get(name)
        if chosen is not None:  # "" and -1 hide them all; what follows a -1 is hidden
            shown = itertools.takewhile(lambda x: x != "-1", chosen.split(","))
            return [{name: gpu} for gpu in map(str.strip, shown) if gpu]
        if shutil.which(program[0]):
            done = subprocess.run(program, capture_output=True, text=True)
            found = re.findall(r"^GPU\W*(\d+)", done.stdout, re.M)
            return [{name: gpu} for gpu in dict.fromkeys(found)]
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return [{}] if chips and importlib.util.find_spec("libtpu") else []


if __name__ == "__main__":
    door.run(main, __doc__)
