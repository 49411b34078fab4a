"""A sweep from its plan to its results, by either engine."""

import contextlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gpt_jax import runs, signals
from gpt_jax.sweep import batch, checks, engine
from gpt_jax.sweep import plan as plans
from gpt_jax.sweep.plan import Plan
from gpt_jax.sweep.space import OPTIONS
from gpt_jax.sweep.study import Study, Trial
from gpt_jax.sweep.view import View

Results = dict[str, Any]


class Done(NamedTuple):
    """What a sweep came to: its results, and 0 or the exit code of a signal."""

    results: Results
    exit_code: int


def check(plan: Plan, base: ConfigDict) -> dict:
    """Builds and checks every trial, and prepares their texts.

    Returns:
      What was checked, so that trials of a search are checked faster.

    Raises:
      ValueError: the first mistake, and whose it is.
    """
    known: dict = {}
    if plan.space:
        checks.validate(plans.corners(base, plan), plan, known)
        checks.all_read(plans.corners(base, plan), plan)
    else:
        built = plans.configs(base, plan).items()
        named = [
            (f"point {index} ({name})", config)
            for index, (name, (_, config)) in enumerate(built)
        ]
        checks.validate(named, plan, known)
        checks.all_read(named, plan)
    return known


def listing(plan: Plan, base: ConfigDict) -> list[str]:
    """Returns what `--dry_run` prints: the trials, or the space, and their number."""
    if plan.space:
        lines = [f"{key}: {axis}" for key, axis in plan.space.items()]
        return [*lines, f"{plan.trials} trials, chosen by {plan.sampler}"]
    return [*plans.configs(base, plan), f"{plan.size} trials"]


def processes(
    plan: Plan,
    base: ConfigDict,
    out: Path,
    *,
    command: list[str],
    retries: int,
    scheduler: str,
    workers: int,
    accelerators: Sequence[str],
    **options: Any,
) -> Done:
    """Runs a sweep with a process per trial.

    Args:
      plan: what to sweep.
      base: its config, `plan.fixed` included.
      out: the sweep's folder; what it holds already is not run again.
      command: see `engine.run`.
      retries: see `engine.run`.
      scheduler: the address of a dask scheduler; "" = this machine.
      workers: trials at once on this machine; 0 = one per accelerator, or per core.
      accelerators: see `engine.local`.
      **options: see `_opened`.

    Raises:
      ValueError: the sweep cannot be what it says, all its trials failed, its folder is
        another sweep's, or no scheduler answers.
    """
    with contextlib.ExitStack() as stack:
        study, view, stop, changed, known = stack.enter_context(
            _opened(plan, base, out, **options)
        )
        if study.left():
            where = engine.remote(scheduler) if scheduler else None
            where = where or engine.local(min(workers, study.left()), accelerators)
            engine.run(
                study,
                stack.enter_context(where),
                command=command,
                retries=retries,
                check=lambda name, config: checks.validate(
                    [(name, config)], plan, known
                ),
                view=view,
                stop=stop,
                changed=changed,
            )
        return _done(study, stop)


def batched(
    plan: Plan, base: ConfigDict, out: Path, *, members: int, **options: Any
) -> Done:
    """Runs a sweep with as few compiled programs as its trials need (population.py).

    Args: as `processes`; `members` trials train at once, 0 = as many as fit.
    """
    with _opened(plan, base, out, **options) as (study, view, stop, changed, known):
        check = lambda name, config: checks.validate([(name, config)], plan, known)  # noqa: E731
        batch.run(
            study, members=members, check=check, view=view, stop=stop, changed=changed
        )
        return _done(study, stop)


@contextlib.contextmanager
def _opened(
    plan: Plan,
    base: ConfigDict,
    out: Path,
    *,
    storage: str,
    rerun_failed: bool,
    changed: Callable[[Results], None],
) -> Iterator[tuple]:
    """Yields what both engines need, the folder locked and every trial checked.

    Args:
      plan, base, out: see `processes`.
      storage: an Optuna storage URL; "" = a journal in `out`.
      rerun_failed: whether failed trials run once more.
      changed: called with the results whenever a trial ended.
    """
    known = check(plan, base)
    if not (out / "sweep.json").is_file() and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is no sweep's folder and not empty; use another --out")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(signals.watch(base.grace_s + 10))
        stack.enter_context(runs.lock(out, "--out"))
        study = Study(plan, base, out, storage=storage)
        if rerun_failed:
            study.forget_failures()
        view = View(total=plan.size)
        stack.callback(view.close, study)
        view.print(_greeting(study))
        yield study, view, stop, partial(_tell, study, changed), known


def _tell(study: Study, changed: Callable[[Results], None]) -> None:
    changed(results(study))


def results(study: Study) -> Results:
    """Returns what there is to know of a sweep, ready for JSON."""
    plan, trials = study.plan, list(study.trials.values())
    best = study.best()
    return {
        "sweep": plan.name,
        "config": plan.config,
        "fixed": dict(plan.fixed),
        "metric": plan.metric,
        "direction": plan.direction,
        "pruner": plan.pruner,
        "size": plan.size,
        "keys": plan.short,
        "space": {key: axis.kind for key, axis in (plan.space or {}).items()},
        "importance": study.importance(),
        "best": best.name if best else None,
        "command": shlex.join(
            plans.command(plan, best.overrides, f"runs/best_{plan.name}")
        )
        if best
        else None,
        "trials": [_row(trial, plan.keys) for trial in trials],
    }


def _row(trial: Trial, keys: Iterable[str]) -> dict:
    """Returns what there is to know of a trial; keys that it leaves have its config's
    values, so that all trials have all keys."""
    flat = runs.flat(trial.config)
    own = {key: runs.tuples(flat[key]) for key in keys if key in flat}
    own |= {} if OPTIONS not in keys else {OPTIONS: ""}
    told = {"value": None, "at": None, "last": None, "step": 0, "tokens": 0}
    told |= {"seconds": 0.0, "reason": ""}
    told |= {key: trial.outcome[key] for key in told if key in trial.outcome}
    return {
        "name": trial.name,
        "status": trial.status,
        **told,
        "steps": trial.config.steps,
        "attempts": trial.attempts,
        "overrides": own | trial.overrides,
    }


def _greeting(study: Study) -> str:
    plan, ended = study.plan, study.plan.size - study.left()
    what = f"searched by {plan.sampler}" if plan.space else "points"
    pruned = f", pruned by {plan.pruner['name']}" if plan.pruner else ""
    before = f"; {ended} ended before" if ended else ""
    return f"{plan.size} trials ({what}{pruned}) in {study.out}{before}"


def _done(study: Study, stop: signals.Stop) -> Done:
    trials = study.trials.values()
    failed = [trial for trial in trials if trial.status == "failed"]
    if failed and not stop and len(failed) == len(trials):
        raise ValueError(
            f"all {len(failed)} trials failed, the first ({failed[0].name}) because: "
            f"{failed[0].outcome['reason']}; its log is "
            f"{study.out / failed[0].name / 'trial.log'}; after the cause is mended, "
            f"--rerun_failed runs them again"
        )
    return Done(results(study), stop.exit_code if stop else 0)
