"""Which trial is next, and what became of each: the only file that knows Optuna.

The storage is the record: a journal in the sweep's folder, or any Optuna storage URL.
One process, the sweep, asks and tells; the trials' own processes report evaluations
to it when something prunes. A trial that the storage calls running and that nobody
runs was left by a sweep that died: it goes on under the same number, so what it
reported still counts.
"""

import contextlib
import importlib
import importlib.util
import json
import re
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt_jax import files, metrics, runs
from gpt_jax.sweep import plan as plans
from gpt_jax.sweep.plan import Plan
from gpt_jax.sweep.space import Dimension, Point, Pruner
from gpt_jax.sweep.space import name as name_of

RECORD = "sweep.json"
OUTCOME = "outcome.json"
JOURNAL = "optuna.journal"
ENDED = ("done", "pruned", "diverged", "failed")


@dataclass
class Trial:
    """One point of a sweep: `status` is waiting, running, or one of ENDED."""

    name: str
    overrides: Point
    config: ConfigDict
    number: int = -1  # in the storage
    id: int = -1
    status: str = "waiting"
    attempts: int = 0
    outcome: dict = field(default_factory=dict)


class Study:
    """The trials of a sweep and their record."""

    def __init__(self, plan: Plan, base: ConfigDict, out: Path, *, storage: str):
        """Opens the record of the sweep in `out`, or begins one.

        Args:
          plan: what is swept.
          base: the config that trials change; `plan.fixed` is in it.
          out: the sweep's folder.
          storage: an Optuna storage URL; "" = a journal in the folder.

        Raises:
          ValueError: the folder is another sweep's, a point does not fit, or a package
            is missing.
        """
        self.plan, self.base, self.out = plan, base, out
        self.trials: dict[str, Trial] = {
            name: Trial(name, *built)
            for name, built in plans.configs(base, plan).items()
        }
        self.record = _open_record(plan, base, out, list(self.trials), storage)
        self.storage = storage or str((out / JOURNAL).resolve())
        self._optuna = _import_optuna()
        _mend(out / JOURNAL)
        self._sampler(0)  # a missing package shows now
        self._study = self._optuna.create_study(
            storage=open_storage(self.storage),
            study_name=self.record["id"],
            direction=plan.direction,
            pruner=make_pruner(plan.pruner, base.steps),
            load_if_exists=True,
        )
        self._restore()

    def left(self) -> int:
        """Returns how many trials have not ended."""
        ended = sum(trial.status in ENDED for trial in self.trials.values())
        return self.plan.size - ended

    def best(self) -> Trial | None:
        """Returns the done trial with the best value."""
        done = [trial for trial in self.trials.values() if trial.status == "done"]
        sign = 1 if self.plan.direction == "minimize" else -1
        return min(done, key=lambda t: sign * t.outcome["value"], default=None)

    def next(self, check: Callable[[str, ConfigDict], None]) -> Trial | None:
        """Returns a trial to run, marked as running; None when none is left.

        Args:
          check: raises ValueError for a config that no run can have; that trial then
            has failed.
        """
        for trial in self.trials.values():
            if trial.status != "waiting":
                continue
            if trial.number < 0:
                self._enter(trial, self._study.ask())
            trial.status = "running"
            return trial
        while self.plan.space and len(self.trials) < self.plan.trials:
            trial = self._ask()
            twin = self._twin(trial)
            if twin:
                self.finish(trial, {**twin.outcome, "same_as": twin.name})
                continue
            try:
                trial.config = plans.override(self.base, trial.overrides)
                check(trial.name, trial.config)
            except ValueError as error:
                self.finish(trial, failure(str(error)))
                continue
            trial.status = "running"
            return trial
        return None

    def finish(self, trial: Trial, outcome: dict) -> None:
        """Records how a trial ended."""
        state = self._optuna.trial.TrialState
        states = {"done": state.COMPLETE, "failed": state.FAIL}
        self._attribute(trial, "outcome", outcome)
        self._study.tell(
            trial.number,
            outcome["value"] if outcome["status"] == "done" else None,
            state=states.get(outcome["status"], state.PRUNED),
        )
        trial.status, trial.outcome = outcome["status"], outcome

    def began(self, trial: Trial) -> None:
        """Counts an attempt at a trial."""
        trial.attempts += 1
        self._attribute(trial, "attempts", trial.attempts)

    def again(self, trial: Trial) -> None:
        """Puts a trial that was running back among those that wait."""
        trial.status = "waiting"

    def forget_failures(self) -> int:
        """Lets failed trials run once more; returns how many."""
        failed = [trial for trial in self.trials.values() if trial.status == "failed"]
        for trial in failed:
            (self.out / trial.name / OUTCOME).unlink(missing_ok=True)
            point = trial.overrides
            if self.plan.space:
                self._study.enqueue_trial(point)
                self._enter(trial, self._study.ask(self._distributions()))
            else:
                trial.number = -1
            trial.status, trial.outcome, trial.attempts = "waiting", {}, 0
        return len(failed)

    def report(self, trial: Trial, step: int, value: float) -> None:
        """Records an evaluation of a running trial (a trial's own process prunes)."""
        self._optuna.trial.Trial(self._study, trial.id).report(value, step)

    def importance(self) -> dict[str, float] | None:
        """Returns Optuna's importance of every searched key; None where it has none.

        PED-ANOVA (Watanabe et al. 2023): which keys decide whether a trial is among
        the best.
        """
        done = [trial for trial in self.trials.values() if trial.status == "done"]
        if not self.plan.space or len(done) < 10:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = self._optuna.importance.PedAnovaImportanceEvaluator()
            return self._optuna.importance.get_param_importances(
                self._study, evaluator=evaluator
            )

    def _enter(self, trial: Trial, asked) -> None:
        trial.number, trial.id = asked.number, asked._trial_id
        asked.set_user_attr("name", trial.name)
        asked.set_user_attr("overrides", trial.overrides)

    def _attribute(self, trial: Trial, key: str, value: Any) -> None:
        self._optuna.trial.Trial(self._study, trial.id).set_user_attr(key, value)

    def _ask(self) -> Trial:
        """Returns a new trial whose values the sampler chose."""
        self._study.sampler = self._sampler(len(self._study.get_trials(deepcopy=False)))
        asked = self._study.ask(self._distributions())
        point = {key: asked.params[key] for key in self.plan.space or ()}
        name = f"{asked.number:03d}-{name_of(point, self.plan.short)}"
        trial = Trial(name, point, self.base)
        self._enter(trial, asked)
        self.trials[name] = trial
        return trial

    def _twin(self, trial: Trial) -> Trial | None:
        """Returns an earlier trial of the same values that has ended, if any."""
        for other in self.trials.values():
            same = other is not trial and other.overrides == trial.overrides
            if same and other.status in ENDED and "same_as" not in other.outcome:
                return other
        return None

    def _sampler(self, number: int):
        """Returns the sampler; what trial `number` draws depends on nothing else."""
        samplers = self._optuna.samplers
        seed = self.plan.seed + number
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls half of these experimental
            if self.plan.sampler == "tpe":
                # Trials that run count as bad ones, so that workers spread.
                return samplers.TPESampler(constant_liar=True, seed=seed)
            if self.plan.sampler == "qmc":  # its scrambling must stay the same
                return samplers.QMCSampler(scramble=True, seed=self.plan.seed)
            if self.plan.sampler == "cmaes":
                _need("cmaes", "sampler = 'cmaes'")
                return samplers.CmaEsSampler(seed=seed)
            if self.plan.sampler == "gp":
                _need("torch", "sampler = 'gp'")
                _need("scipy", "sampler = 'gp'")
                return samplers.GPSampler(seed=seed)
            return samplers.RandomSampler(seed=seed)

    def _distributions(self) -> dict:
        space = self.plan.space or {}
        return {key: self._distribution(axis) for key, axis in space.items()}

    def _distribution(self, axis: Dimension):
        kinds = self._optuna.distributions
        if axis.kind == "choice":
            return kinds.CategoricalDistribution(axis.choices)
        if axis.kind == "int":
            return kinds.IntDistribution(int(axis.low), int(axis.high), step=axis.step)
        return kinds.FloatDistribution(axis.low, axis.high, log=axis.kind == "log")

    def _restore(self) -> None:
        """Takes over what the storage knows; see this file's head for running ones."""
        running = self._optuna.trial.TrialState.RUNNING
        for found in self._study.get_trials(deepcopy=False):
            trial = self._known(found)
            if trial is None:  # the sweep died while it asked
                if found.state == running:
                    fail = self._optuna.trial.TrialState.FAIL
                    self._study.tell(found.number, state=fail)
                continue
            trial.number, trial.id = found.number, found._trial_id
            trial.attempts = found.user_attrs.get("attempts", 0)
            trial.status, trial.outcome = "waiting", {}
            if found.state.is_finished():
                trial.outcome = found.user_attrs["outcome"]
                trial.status = trial.outcome["status"]
            elif outcome := read_outcome(self.out / trial.name):
                self.finish(trial, outcome)

    def _known(self, found) -> Trial | None:
        """Returns the trial that an Optuna trial stands for."""
        name = found.user_attrs.get("name")
        overrides = found.user_attrs.get("overrides")
        if name is None or overrides is None:
            return None
        if self.plan.space and name not in self.trials:
            config = self.base
            with contextlib.suppress(ValueError):  # it has failed then, and says so
                config = plans.override(self.base, overrides)
            self.trials[name] = Trial(name, overrides, config)
        return self.trials.get(name)


# --- outcomes -------------------------------------------------------------------------


def failure(reason: str, **more: Any) -> dict:
    """Returns the outcome of a trial that failed."""
    return {"status": "failed", "reason": reason, "value": None, "step": 0, **more}


def measure(folder: Path, metric: str, direction: str) -> dict:
    """Returns what a run's record says of a metric.

    Returns:
      "value", the best evaluation, and "at", its step; "last", the last one; "step",
      "tokens", "seconds": how far the run got. Without the metric, "value" is None and
      "names" are those that the record has.
    """
    rows = metrics.read(folder) if (folder / metrics.FILE).is_file() else []
    final = {key: value for row in rows for key, value in row.items()}
    known = {key: final.get(key, 0) for key in ("step", "tokens", "seconds")}
    points = [(row[metric], row["step"]) for row in rows if row.get(metric) is not None]
    if not points:
        return {**known, "value": None, "names": sorted(final.keys() - known.keys())}
    choose = min if direction == "minimize" else max
    value, at = choose(points, key=lambda point: point[0])
    return {**known, "value": value, "at": at, "last": points[-1][0]}


def read_outcome(folder: Path) -> dict | None:
    """Returns how a trial's process said it ended; None when it did not."""
    try:
        return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    files.write(path, json.dumps(content, indent=2) + "\n")


# --- storage and pruners --------------------------------------------------------------


def open_storage(where: str):
    """Returns an Optuna storage: a URL's, or the journal in a file.

    Raises:
      ValueError: it cannot be opened.
    """
    optuna = _import_optuna()
    if "://" not in where:
        backend = importlib.import_module("optuna.storages.journal").JournalFileBackend
        return optuna.storages.JournalStorage(backend(where))
    try:
        return optuna.storages.get_storage(where)
    except Exception as error:  # SQLAlchemy and its drivers raise whatever they like
        text = str(error).splitlines()[0]
        secret, _, place = where.rpartition("@")  # a user and a password
        text = text.replace(secret, "...") if secret else text
        raise ValueError(f"the storage {place} cannot be opened: {text}") from None


def make_pruner(chosen: Pruner | None, steps: int):
    """Returns Optuna's pruner for runs of so many steps."""
    pruners = _import_optuna().pruners
    if chosen is None:
        return pruners.NopPruner()
    if chosen["name"] == "asha":
        return pruners.SuccessiveHalvingPruner(
            min_resource=chosen["first"], reduction_factor=chosen["factor"]
        )
    if chosen["name"] == "median":
        return pruners.MedianPruner(
            n_startup_trials=chosen["trials"], n_warmup_steps=chosen["first"] - 1
        )
    return pruners.HyperbandPruner(
        min_resource=chosen["first"],
        max_resource=steps,
        reduction_factor=chosen["factor"],
    )


def _mend(journal: Path) -> None:
    """Cuts off a last line whose writer was killed; the next would be part of it."""
    if not journal.is_file():
        return
    with journal.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _open_record(
    plan: Plan, base: ConfigDict, out: Path, trials: list[str], storage: str
) -> dict:
    """Returns sweep.json, made or checked: points may be added, no more changes."""
    new = {
        "sweep": plan.name,
        "config": plan.config,
        "base": json.loads(json.dumps(base.to_dict())),
        "metric": plan.metric,
        "direction": plan.direction,
        "pruner": plan.pruner,
        "space": {key: str(axis) for key, axis in (plan.space or {}).items()},
        "sampler": [plan.sampler, plan.seed] if plan.space else None,
        # A password before the @ stays out of the file.
        "storage": storage.rpartition("@")[2],
    }
    path = out / RECORD
    if not path.is_file():
        if out.is_dir() and any(p.name != "run.lock" for p in out.iterdir()):
            raise ValueError(
                f"{out} is not a sweep's folder (it has no {RECORD}) and not empty: "
                f"use another --out"
            )
        made = {"id": f"{out.name}-{uuid.uuid4().hex[:8]}", **new, "trials": trials}
        write(path, made)
        return made
    old = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in new if key != "base" and new[key] != old.get(key)]
    lines = [f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in changed]
    before, now = ConfigDict(old["base"]), ConfigDict(new["base"])
    differences = runs.difference(before, now)
    where = "|".join(runs.WHERE)
    lines += [d for d in differences if not re.fullmatch(where, d.split(":")[0])]
    if gone := sorted(set(old["trials"]) - set(trials)):
        lines.append(f"{len(gone)} of its trials are no points any more: {gone[0]}")
    if lines:
        raise ValueError(
            f"{out} holds another sweep:\n  " + "\n  ".join(lines) + "\n"
            "put these back to go on, or use another --out"
        )
    now_known = {**old, **new, "trials": trials}
    write(path, now_known)
    return now_known


def _import_optuna():
    _need("optuna", "a sweep")
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _need(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs the package {package}: pip install {package}")
