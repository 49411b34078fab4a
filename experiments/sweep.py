"""Train many configurations and compare them: grids, searches, seeds.

  python -m experiments.sweep --sweep=experiments/sweeps/lr.py --out=runs/sweep_lr
  python -m experiments.sweep --sweep=experiments/sweeps/lr.py --out=runs/long \\
      --set=steps=2000 --set=hyper.weight_decay=0
  python -m experiments.sweep --sweep=experiments/sweeps/lr.py --dry_run
  python -m experiments.sweep --sweep=experiments/sweeps/seeds.py --engine=vmap

A sweep file (see experiments/sweeps/) names a config and lists points, or a space to
search. Every point is built and checked before the first trial starts. Each trial is a
process of its own and an ordinary run folder, OUT/<its name>/; with --engine=vmap those
that differ in the seed and hyper.* alone share a program. The same command goes on with
a sweep that was stopped or killed: what has ended is not run again.

Many machines that share a file system:

  dask scheduler                            # on one machine, prints its address
  dask worker tcp://HOST:8786 --nthreads 1  # on every machine, as often as it has room
  python -m experiments.sweep --sweep=experiments/sweeps/lr.py \\
      --out=/shared/lr_width --scheduler=tcp://HOST:8786

OUT gets report.html (open it in a browser), results.csv, results.json and pictures.
"""

import os
import shutil
import subprocess
from pathlib import Path

from absl import flags

from experiments import door

MOST_LINES = 60  # of the printed table; results.csv has all

SWEEP = door.define_path("sweep", "", "Sweep file, e.g. experiments/sweeps/lr.py.")
OUT = door.define_path("out", "", "Folder (default: runs/sweep_<sweep's name>).")
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of the config, for all trials.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check all trials and list them only.")
ENGINE = flags.DEFINE_enum(
    "engine", "process", ["process", "vmap"], "A process per trial, or many in one."
)
WORKERS = flags.DEFINE_integer(
    "workers", 0, "Trials at once; 0 = one per accelerator or core (vmap: what fits)."
)
SCHEDULER = flags.DEFINE_string("scheduler", "", "A dask scheduler: tcp://HOST:8786.")
STORAGE = flags.DEFINE_string(
    "storage", "", "Optuna storage URL, e.g. postgresql://... (default: a file in OUT)."
)
RETRIES = flags.DEFINE_integer(
    "retries", 1, "So often a trial that crashed or lost its worker runs again."
)
RERUN_FAILED = flags.DEFINE_bool("rerun_failed", False, "Run failed trials once more.")


def main(_: list[str]) -> int:
    """Runs a sweep, writes its report, and returns the exit code."""
    if not SWEEP.value:
        raise ValueError("--sweep is missing, e.g. --sweep=experiments/sweeps/lr.py")
    if WORKERS.value < 0 or RETRIES.value < 0:
        raise ValueError("--workers and --retries must not be negative")
    from gpt_jax.sweep import plan as plans

    plan = plans.load(SWEEP.value, extra=SET.value)
    plan, base = plans.fix(plan, door.load_config(plan.config))
    out = Path(OUT.value or f"runs/sweep_{plan.name}")

    import jax

    from gpt_jax import commands, report
    from gpt_jax.sweep import run

    if ENGINE.value == "process":  # accelerators are for the trials
        jax.config.update("jax_platforms", "cpu")
    if DRY_RUN.value:
        run.check(plan, base)
        for line in run.listing(plan, base):
            print(line)
        return 0
    options = {
        "storage": STORAGE.value,
        "rerun_failed": RERUN_FAILED.value,
        "changed": lambda results: report.tables(out, results),
    }
    if ENGINE.value == "vmap":
        done = run.batched(plan, base, out, members=WORKERS.value, **options)
    else:
        done = run.processes(
            plan,
            base,
            out,
            command=commands.argv("trial")[1:],
            retries=RETRIES.value,
            scheduler=SCHEDULER.value,
            workers=WORKERS.value,
            accelerators=_accelerators(),
            **options,
        )
    report.write(out, done.results)
    if len(done.results["trials"]) <= MOST_LINES:
        print(report.table(done.results))
    print(report.summary(done.results))
    if done.exit_code:
        print(f"stopped; the same command goes on: {door.command(())}")
        return done.exit_code
    print(f"  the report   {out}/report.html")
    print(f"  the table    {out}/results.csv")
    print(f"  train best   {done.results['command']}")
    return 0


def _accelerators() -> list[str]:
    """Returns the NVIDIA GPUs that this process may use, as CUDA names them.

    JAX is not asked: it would take them.
    """
    if chosen := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return chosen.split(",")
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, line in enumerate(done.stdout.splitlines()) if "GPU" in line]


if __name__ == "__main__":
    door.run(main, __doc__)
