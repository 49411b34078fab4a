"""A sweep from its plan to its results, by either engine."""

import contextlib
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gpt_jax import population, runs, seeds, signals
from gpt_jax.criterion import Criterion
from gpt_jax.options import Mesh
from gpt_jax.population import evolve
from gpt_jax.sweep import batch, checks, engine, record
from gpt_jax.sweep import plan as plans
from gpt_jax.sweep import space as spaces
from gpt_jax.sweep.plan import Plan
from gpt_jax.sweep.shard import Shard, hold
from gpt_jax.sweep.space import OPTIONS
from gpt_jax.sweep.study import ENDED, Budget, Setting, Study, Trial
from gpt_jax.sweep.view import View

Results = dict[str, Any]
Row = dict[str, Any]

SHARE = 0.02  # of the time that tables may take while trials run
TOOK = ("step", "tokens", "seconds", "flops", "bytes")
WORST = ("failed", "diverged", "pruned", "running", "waiting", "done")


class Done(NamedTuple):
    """What a sweep came to.

    Attributes:
      results: see `results`.
      exit_code: 0; 1 where trials failed; that of a signal where it was stopped.
      left: how many trials of this sitting's shard have not ended.
    """

    results: Results
    exit_code: int
    left: int


def check(plan: Plan, base: ConfigDict, criterion: Criterion | None = None) -> dict:
    """Builds and checks every trial, and prepares their texts.

    Args:
      plan: what to sweep.
      base: its config.
      criterion: another one that is reported by; None = the plan's.

    Returns:
      What was checked, so that trials of a search are checked faster.

    Raises:
      ValueError: the first mistake, and whose it is.
    """
    known: dict = {}
    if plan.space:
        checks.validate(plans.corners(base, plan), plan, known, criterion)
        checks.all_read(plans.corners(base, plan), plan)
    else:
        built = plans.configs(base, plan).items()
        named = [
            (f"point {index} ({name})", config)
            for index, (name, (_, config)) in enumerate(built)
        ]
        checks.all_differ(named, plan)
        checks.validate(named, plan, known, criterion)
        checks.all_read(named, plan)
    return known


def listing(plan: Plan, base: ConfigDict) -> list[str]:
    """Returns what `--dry_run` prints: the trials, or the space, and their number."""
    if plan.space:
        lines = [f"{key}: {axis}" for key, axis in plan.space.items()]
        each = f", each with {plan.seeds} seeds" if plan.seeds else ""
        return [*lines, f"{plan.trials} draws by {plan.sampler}{each}"]
    return [*plans.configs(base, plan), f"{plan.size} trials"]


def processes(
    plan: Plan,
    base: ConfigDict,
    out: Path,
    *,
    command: list[str],
    trial_timeout: float,
    scheduler: str,
    workers: int,
    accelerators: Sequence[dict[str, str]],
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Done:
    """Runs a sweep with a process per trial.

    Args:
      plan: what to sweep.
      base: its config, `plan.fixed` included.
      out: the sweep's folder; what it holds already is not run again.
      command: see `engine.run`.
      trial_timeout: its `timeout_s`.
      scheduler: the address of a dask scheduler; "" = this machine.
      workers: trials at once on this machine; 0 = one per accelerator, or per core.
      accelerators: see `engine.local`.
      environment: what that of every trial holds besides.
      **options: see `_opened`.

    Raises:
      ValueError: the sweep cannot be what it says, all its trials failed, its folder is
        another sweep's, or no scheduler answers.
    """
    if plan.evolve:
        raise ValueError("points that evolve train together: use --engine=vmap")
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
                timeout_s=trial_timeout,
                environment=environment or {},
                check=lambda name, config: checks.validate(
                    [(name, config)], plan, known
                ),
                view=view,
                stop=stop,
                changed=changed,
            )
        return _done(study, stop)


def batched(
    plan: Plan,
    base: ConfigDict,
    out: Path,
    *,
    members: int,
    memory: float,
    **options: Any,
) -> Done:
    """Runs a sweep with as few compiled programs as its trials need (population.py).

    Args:
      members: how many train at once; 0 = as many as fit into what is free, on a CPU
        into at most `memory` bytes.
      options: those of `processes`, as are the rest.
    """
    population.use_devices(
        Mesh(**base.mesh)
    )  # the checks trace, which starts the backend
    opened = _opened(plan, base, out, **options)
    with opened as (study, view, stop, changed, known):
        check = lambda name, config: checks.validate([(name, config)], plan, known)  # noqa: E731
        batch.run(
            study,
            members=members,
            memory=memory,
            check=check,
            view=view,
            stop=stop,
            changed=changed,
        )
        return _done(study, stop)


@contextlib.contextmanager
def _opened(
    plan: Plan,
    base: ConfigDict,
    out: Path,
    *,
    storage: str,
    retries: int,
    rerun_failed: bool,
    criterion: Criterion | None = None,
    budget: Budget = Budget(),  # noqa: B008  # it cannot be changed
    shard: Shard = Shard(),  # noqa: B008
    changed: Callable[[Results], None],
) -> Iterator[tuple]:
    """Yields what both engines need, the folder locked and every trial checked.

    Args:
      plan, base, out: see `processes`.
      storage, retries, criterion, budget, shard: see `Study`.
      rerun_failed: whether failed trials run once more.
      changed: called with the results when trials have ended, as often as is cheap;
        not by a shard, which knows of a part only.
    """
    known = check(plan, base, criterion)
    strange = out.is_dir() and any(path.name != runs.LOCK for path in out.iterdir())
    if strange and not (out / record.RECORD).is_file():
        raise ValueError(f"{out} is no sweep's folder and not empty; use another --out")
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(signals.watch(base.grace_s + 10))
        alone, opened = stack.enter_context(hold(out, shard))
        study = Study(
            plan,
            base,
            out,
            storage=storage,
            retries=retries,
            criterion=criterion,
            budget=budget,
            shard=shard,
            alone=alone,
        )
        opened()
        if rerun_failed:
            study.forget_failures()
        view = View(total=study.size)
        stack.callback(view.close, study)
        view.print(_greeting(study))
        rows: dict[str, Row] = {}
        tell = _seldom(lambda: changed(results(study, rows)) if shard.whole else None)
        yield study, view, stop, tell, known


def _seldom(act: Callable[[], None]) -> Callable[[], None]:
    """Returns a function that acts now and then, for at most SHARE of the time."""
    due = 0.0

    def maybe() -> None:
        nonlocal due
        began = time.monotonic()
        if began >= due:
            act()
            ended = time.monotonic()
            due = ended + (ended - began) / SHARE

    return maybe


def results(study: Study, rows: dict[str, Row] | None = None) -> Results:
    """Returns what there is to know of a sweep, ready for JSON.

    Args:
      study: the sweep.
      rows: those of trials that have ended, by name; new ones are put there.
    """
    plan, best, rows = study.plan, study.best(), {} if rows is None else rows
    points = (
        (plan.points or ())
        if not plan.space
        else [{**trial.drawn, **trial.overrides} for trial in study.trials.values()]
    )
    keys = spaces.short_keys(key for point in points for key in point)
    keys = {key: plan.labels.get(key, short) for key, short in keys.items()}
    keys.pop(seeds.SEED, None)
    found = {}
    for name, trial in study.trials.items():
        found[name] = rows.get(name) or _row(trial, study, keys)
        if trial.status in ENDED:
            rows[name] = found[name]
    evolved = _evolved(study)
    words = (
        best
        and not evolved
        and plans.command(
            plan, seeds.without(best.trials[0].overrides), f"runs/best_{plan.name}"
        )
    )
    return {
        "sweep": plan.name,
        "config": plan.config,
        "fixed": dict(plan.fixed),
        **study.criterion._asdict(),
        "title": plan.labels.get(study.criterion.metric, study.criterion.metric),
        "pruner": plan.pruner,
        "size": plan.size,
        "keys": keys,
        "after": [*plan.after],
        "cost": plan.cost,
        "evolved": evolved,
        "drawn": plan.drawn,
        "space": {key: axis.kind for key, axis in (plan.space or {}).items()},
        "best": best.name if best else None,
        "command": shlex.join(words) if words else None,
        "settings": [_setting(setting, found) for setting in study.settings()],
        "trials": list(found.values()),
    }


def _evolved(study: Study) -> dict[str, list]:
    """Returns by trial the numbers of its weights, from which step on; best first.

    {} where points do not evolve.
    """
    if not study.plan.evolve:
        return {}

    def place(trial: Trial) -> float:
        value = study.measured(trial).get("value")
        return math.inf if value is None else value

    trials = sorted(study.trials.values(), key=place)
    folders = {trial.name: study.out / trial.name for trial in trials}
    flat = {trial.name: runs.flat(trial.config) for trial in trials}
    starts = {
        name: {key: own[key] for key in study.plan.evolve["keys"]}
        for name, own in flat.items()
    }
    return {name: evolve.schedule(folders, starts, name) for name in folders}


def _row(trial: Trial, study: Study, keys: Mapping[str, str]) -> Row:
    """Returns what there is to know of a trial.

    All trials have all keys: one that a point leaves has its config's value, or None
    where its config has no such key or a search did not draw it.
    """
    point = {**dict.fromkeys(keys), **trial.drawn, **trial.overrides}
    point.pop(seeds.SEED, None)
    absent = [key for key in keys if key not in trial.overrides]
    if absent and not study.plan.space:
        flat = runs.flat(trial.config)
        point |= {key: runs.tuples(flat[key]) for key in absent if key in flat}
        point |= {OPTIONS: ""} if OPTIONS in absent else {}
    told = {"value": None, "at": None, "last": None, "step": 0, "tokens": 0}
    told |= {"seconds": 0.0, "reason": "", "parameters": None}
    outcome = study.measured(trial)
    told |= {key: outcome[key] for key in told if key in outcome}
    costs = record.costs(outcome)
    told |= {"flops": costs["flops"], "bytes": costs["bytes"]}
    after = outcome.get("after", {})
    told["after"] = {name: after.get(name) for name in study.plan.after}
    if twin := outcome.get("same_as"):  # it was not trained again
        nothing = {"step": 0, "tokens": 0, "seconds": 0.0}
        told |= {**nothing, "reason": f"the same as {twin}"}
    if trial.status in ("diverged", "failed"):  # what it reached before says nothing
        told |= {"value": None, "at": None}
    return {
        "name": trial.name,
        "setting": study.setting_of(trial),
        "status": trial.status,
        **told,
        "steps": trial.config.steps,
        "seed": trial.config.seed,
        "crashes": trial.crashes,
        "overrides": point,
        **({"drawn": trial.drawn} if trial.drawn != trial.overrides else {}),
    }


def _average(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return int(mean) if mean is not None and mean.is_integer() else mean


def _setting(setting: Setting, rows: Mapping[str, Row]) -> Row:
    """Returns what there is to know of a setting; `status` is the worst of its seeds.

    `value`, `error`, `low` and `high` are of the mean over the `n` seeds that are done,
    `last` is the mean of all last evaluations; step, tokens, seconds, flops and bytes
    are what one of its runs took, on average.
    """
    own = [rows[trial.name] for trial in setting.trials]
    worst = min(own, key=lambda row: WORST.index(row["status"]))
    at = [row["at"] for row in own if row["status"] == "done" and row["at"] is not None]
    mean = setting.mean._asdict() if setting.mean else {"value": None, "n": 0}
    known = dict.fromkeys(("error", "low", "high")) | mean
    last = [row["last"] for row in own if row["last"] is not None]
    return {
        "name": setting.name,
        "status": worst["status"],
        **{key: None if x is None or math.isnan(x) else x for key, x in known.items()},
        "seeds": len(own),
        "at": round(statistics.median(at)) if at else None,
        "last": statistics.fmean(last) if last else None,
        "parameters": own[0]["parameters"],
        **{key: _average(row[key] for row in own) for key in TOOK},
        "after": {
            name: _average(row["after"][name] for row in own)
            for name in own[0]["after"]
        },
        "steps": max(row["steps"] for row in own),
        "reason": worst["reason"] if worst["status"] != "done" else "",
        "overrides": own[0]["overrides"],
        **({"drawn": own[0]["drawn"]} if "drawn" in own[0] else {}),
        "trials": [row["name"] for row in own],
    }


def _greeting(study: Study) -> str:
    plan, ended = study.plan, study.size - study.left()
    what = f"searched by {plan.sampler}" if plan.space else "points"
    pruned = f", pruned by {plan.pruner['name']}" if plan.pruner else ""
    pruned += ", evolving" if plan.evolve else ""
    before = f"; {ended} ended before" if ended else ""
    of = f" of {plan.size}" if study.size < plan.size else ""
    return f"{study.size}{of} trials ({what}{pruned}) in {study.out}{before}"


def _done(study: Study, stop: signals.Stop) -> Done:
    trials = [trial for trial in study.trials.values() if trial.own]
    failed = [trial for trial in trials if trial.status == "failed"]
    if failed and not stop and len(failed) == len(trials):
        raise ValueError(
            f"all {len(failed)} trials failed, the first ({failed[0].name}) because: "
            f"{failed[0].outcome['reason']}; its log is "
            f"{study.out / failed[0].name / 'trial.log'}; after the cause is mended, "
            f"--rerun_failed runs them again"
        )
    code = stop.exit_code if stop else int(bool(failed))
    return Done(results(study), code, study.left())
