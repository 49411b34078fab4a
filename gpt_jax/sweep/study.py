"""Which trial is next, and what became of each: asks and tells Optuna.

The storage is the record (storage.py). One process, the sweep, asks and tells; the
trials' own processes report evaluations to it when something prunes. A trial that the
storage calls running and that nobody runs was left by a sweep that died: it goes on
under the same number, so what it reported still counts.

Trials that differ in the seed alone are one setting: its mean is what is judged.
"""

import contextlib
import functools
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gpt_jax import runs, seeds
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.criterion import Criterion
from gpt_jax.sweep import plan as plans
from gpt_jax.sweep import record, space
from gpt_jax.sweep import storage as storages
from gpt_jax.sweep.plan import Plan
from gpt_jax.sweep.record import failure
from gpt_jax.sweep.shard import Shard
from gpt_jax.sweep.space import Dimension, Point

JOURNAL = "optuna.journal"
ENDED = ("done", "pruned", "diverged", "failed")
MOST_REFUSED = 200  # draws in a row that to_config() does not allow
SCALAR = (str, int, float, bool, type(None))  # what Optuna stores as it is


@dataclass
class Trial:
    """One point of a sweep: `status` is waiting, running, or one of ENDED.

    `crashes` counts its ends that were none, since step `saved`, the newest checkpoint
    then; a trial that got further meanwhile begins to count anew.
    """

    name: str
    overrides: Point
    config: ConfigDict
    number: int = -1  # in the storage
    id: int = -1
    status: str = "waiting"
    crashes: int = 0
    saved: int = 0
    outcome: dict = field(default_factory=dict)
    own: bool = True  # trained here, not by another shard
    draw: int = -1  # of the search that chose its values, where that has its own record
    drawn: Point = field(default_factory=dict)  # what to_config made the overrides of


class Budget(NamedTuple):
    """What one sitting may take: no trial begins after that; 0 = no limit.

    Attributes:
      trials: how many may begin.
      seconds: how long one may begin.
    """

    trials: int = 0
    seconds: float = 0.0


class Setting(NamedTuple):
    """Trials that differ in the seed alone.

    Attributes:
      name: of the trial without its seed.
      trials: one for each seed.
      mean: of the metric over the trials that are done; None when none is.
      whole: whether every trial is done.
    """

    name: str
    trials: list[Trial]
    mean: seeds.Mean | None
    whole: bool


class Study:
    """The trials of a sweep and their record."""

    def __init__(
        self,
        plan: Plan,
        base: ConfigDict,
        out: Path,
        *,
        storage: str,
        retries: int,
        criterion: Criterion | None = None,
        budget: Budget = Budget(),  # noqa: B008  # it cannot be changed
        shard: Shard = Shard(),  # noqa: B008
        alone: bool = True,
    ):
        """Opens the record of the sweep in `out`, or begins one.

        Args:
          plan: what is swept.
          base: the config that trials change; `plan.fixed` is in it.
          out: the sweep's folder.
          storage: an Optuna storage URL; "" = a journal in the folder.
          retries: so often a trial that crashed runs again.
          criterion: that of the report; None = the plan's.
          budget: what this sitting may take.
          shard: which points are trained here.
          alone: whether nobody else writes to the record now.

        Raises:
          ValueError: the folder is another sweep's, a point does not fit, or a package
            is missing.
        """
        if plan.space and not shard.whole:
            raise ValueError(
                "--shard divides points: what a search draws depends on all that it "
                "drew before. Run one sweep, with --scheduler for many machines"
            )
        self.plan, self.base, self.out = plan, base, out
        self._budget, self._begun, self._opened = budget, 0, time.monotonic()
        self.criterion = criterion or plan.criterion
        self._build = plans.builder(base, plan)
        self.trials: dict[str, Trial] = {}
        self.counts: Counter[str] = Counter()
        self._retries = retries
        self._waiting: deque[Trial] = deque()
        self._ended: dict[str, Trial] = {}  # the first of the same values, by them
        self._groups: dict[str, list[Trial]] = {}  # by what their setting is
        self._settings: dict[str, Setting] = {}
        self._measured: dict[str, dict] = {}
        self._best: Setting | None = None
        built = plans.configs(base, plan)
        trials = [
            Trial(name, *parts, own=shard.owns(index))
            for index, (name, parts) in enumerate(built.items())
        ]
        seeded = {seeds.setting(t.overrides): seeds.without(t.overrides)
                  for t in trials if seeds.SEED in t.overrides}  # fmt: skip
        self._names = dict(zip(seeded, space.names(list(seeded.values()))))
        for trial in trials:
            self._add(trial)
        self.record = record.open_record(plan, base, out, list(self.trials), storage)
        self.storage = storage or str((out / JOURNAL).resolve())
        self._optuna = storages.import_optuna()
        if alone:
            storages.mend(out / JOURNAL)
        self._sampler(0)  # a missing package shows now
        # Of points the sampler chooses nothing, so that the cost is for the report.
        self._costs = [plan.cost] if plan.cost and plan.space else []
        directions = [plan.direction, *("minimize" for _ in self._costs)]
        self._study = self._optuna.create_study(
            storage=storages.open_storage(self.storage),
            study_name=self.record["id"],
            directions=directions,
            pruner=storages.make_pruner(plan.pruner, base.steps),
            load_if_exists=True,
        )
        self._draws = self._study
        self._of_draw: dict[int, list[Trial]] = {}
        if plan.space and plan.seeds:  # a draw is several trials, told as one
            self._draws = self._optuna.create_study(
                storage=self._study._storage,
                study_name=f"{self.record['id']}-draws",
                directions=directions,
                load_if_exists=True,
            )
            self._restore_draws()
        if not self._draws.get_trials(deepcopy=False):
            self._begin_search()
        self._restore()

    @property
    def size(self) -> int:
        """How many trials are to be trained here."""
        return self.plan.size if self.plan.space else sum(self.counts.values())

    def left(self) -> int:
        """Returns how many trials of this shard have not ended."""
        return self.size - sum(self.counts[status] for status in ENDED)

    def late(self) -> bool:
        """Whether the time in which a trial may begin is over."""
        limit = self._budget.seconds
        return bool(limit) and time.monotonic() - self._opened >= limit

    def _spent(self) -> bool:
        return self.late() or 0 < self._budget.trials <= self._begun

    def settings(self) -> list[Setting]:
        """Returns the settings, best first."""
        return sorted(self._settings.values(), key=self._place)

    def best(self) -> Setting | None:
        """Returns the setting with the best mean; None when no trial is done."""
        if self._best is None:
            self._best = min(self._settings.values(), key=self._place, default=None)
        return self._best if self._best and self._best.mean else None

    def next(self, check: Callable[[str, ConfigDict], None]) -> Trial | None:
        """Returns a trial to run, marked as running; None when none is left, or may be.

        Args:
          check: raises ValueError for a config that no run can have; that trial then
            has failed.
        """
        if self._spent():
            return None
        while not self._waiting and self.plan.space and self._drawn < self.plan.trials:
            self._draw(check)
        if not self._waiting:
            return None
        trial = self._waiting.popleft()
        if trial.number < 0:
            self._enter(trial)
        self._set(trial, "running")
        self._begun += 1
        return trial

    def finish(self, trial: Trial, outcome: dict) -> None:
        """Records how a trial ended."""
        if outcome["status"] == "failed":  # maybe it has not even become a run
            told = {**outcome, "final": True, "config": trial.config.to_dict()}
            record.write(self.out / trial.name / record.OUTCOME, told)
        state = self._optuna.trial.TrialState
        states = {"done": state.COMPLETE, "failed": state.FAIL}
        self._attribute(trial, "outcome", outcome)
        self._study.tell(
            trial.number,
            self._values(outcome) if outcome["status"] == "done" else None,
            state=states.get(outcome["status"], state.PRUNED),
        )
        self._end(trial, outcome)

    def crashed(self, trial: Trial, outcome: dict) -> bool:
        """Counts an end that was none; returns whether the trial waits to run again.

        It does `retries` times without a newer checkpoint; then it has failed.
        """
        folder = self.out / trial.name / "checkpoints"
        saved = Checkpoints(folder, keep=None).latest() or 0
        if saved > trial.saved:
            trial.crashes, trial.saved = 0, saved
        trial.crashes += 1
        self._attribute(trial, "crashes", [trial.crashes, trial.saved])
        if trial.crashes <= self._retries:
            self.again(trial)
            return True
        self.finish(trial, outcome)
        return False

    def again(self, trial: Trial) -> None:
        """Puts a trial that was running in front of those that wait."""
        self._set(trial, "waiting")
        self._waiting.appendleft(trial)

    def forget_failures(self) -> int:
        """Lets failed trials run once more; returns how many."""
        failed = [one for one in self.trials.values() if one.status == "failed"]
        failed = [trial for trial in failed if trial.own]
        for trial in failed:
            (self.out / trial.name / record.OUTCOME).unlink(missing_ok=True)
            trial.crashes, trial.number = 0, -1
            self._reopen(trial)
            self._waiting.append(trial)
        return len(failed)

    def report(self, trial: Trial, step: int, value: float) -> None:
        """Records an evaluation of a running trial (a trial's own process prunes)."""
        if self._costs:  # Optuna has no such record of several objectives
            return
        self._optuna.trial.Trial(self._study, trial.id).report(value, step)

    def measured(self, trial: Trial) -> dict:
        """Returns a trial's outcome by the metric of the report; {} before its end."""
        if trial.outcome and trial.name not in self._measured:
            folder = self.out / trial.name
            found = record.judged(trial.outcome, folder, self.criterion)
            self._measured[trial.name] = found
        return self._measured.get(trial.name, {})

    def setting_of(self, trial: Trial) -> str:
        """Returns the name of the setting that a trial is of."""
        return self._settings[seeds.setting(trial.overrides)].name

    # --- trials and settings ---

    def _add(self, trial: Trial) -> None:
        self.trials[trial.name] = trial
        if trial.own:
            self.counts[trial.status] += 1
            self._waiting.append(trial)
        key = seeds.setting(trial.overrides)
        self._groups.setdefault(key, []).append(trial)
        self._judge(key)

    def _reopen(self, trial: Trial) -> None:
        """Lets a trial that has ended wait again."""
        trial.outcome = {}
        self._measured.pop(trial.name, None)
        self._ended.pop(seeds.text(trial.overrides), None)
        self._set(trial, "waiting")

    def _set(self, trial: Trial, status: str) -> None:
        if trial.own:
            self.counts[trial.status] -= 1
            self.counts[status] += 1
        trial.status = status

    def _end(self, trial: Trial, outcome: dict) -> None:
        trial.outcome = outcome
        self._set(trial, outcome["status"])
        self._ended.setdefault(seeds.text(trial.overrides), trial)
        self._judge(seeds.setting(trial.overrides))
        if trial.draw >= 0:
            self._tell_draw(trial.draw)

    def _judge(self, key: str) -> None:
        """Takes the mean of a setting anew."""
        trials = [one for one in self._groups[key] if "same_as" not in one.outcome]
        if not trials:
            return
        name = self._names.get(key, trials[0].name)
        done = [self.measured(trial) for trial in trials if trial.status == "done"]
        values = [one["value"] for one in done if one["value"] is not None]
        mean = seeds.mean(values) if values else None
        found = Setting(name, trials, mean, len(values) == len(trials))
        before, self._settings[key] = self._settings.get(key), found
        # Looking at all settings for each end of a trial would take ever longer.
        if self._best is before or not self._best:
            self._best = None
        elif self._place(found) < self._place(self._best):
            self._best = found

    def _place(self, setting: Setting) -> tuple:
        value = setting.mean.value if setting.mean else None
        return seeds.place(value, setting.whole, self.criterion.direction)

    # --- Optuna ---

    def _enter(self, trial: Trial) -> None:
        """Adds a trial whose values are known to the storage, as one that runs."""
        create, state = self._optuna.trial.create_trial, self._optuna.trial.TrialState
        params, distributions = self._shown(trial)
        template = create(
            state=state.RUNNING,
            params=params,
            distributions=distributions,
            user_attrs={"name": trial.name, "overrides": trial.overrides},
        )  # fmt: skip
        store = self._study._storage  # Study.add_trial() does not tell the number
        trial.id = store.create_new_trial(self._study._study_id, template)
        trial.number = store.get_trial_number_from_id(trial.id)

    def _shown(self, trial: Trial) -> tuple[dict, dict]:
        """Returns the values of a trial and of what they were chosen, for the storage.

        A search learns from them; of points they are for those who look on.
        """
        axes = {**(self.plan.space or {})}
        params = {key: _written(axis, trial.drawn[key])
                  for key, axis in axes.items() if key in trial.drawn}  # fmt: skip
        if axes:
            return params, {key: self._distribution(axes[key]) for key in params}
        axes = self._axes
        own = {key: x for key, x in trial.overrides.items() if key in axes}
        return own, {key: axes[key] for key in own}

    @functools.cached_property
    def _axes(self) -> dict[str, Any]:
        """The keys of points as Optuna describes them.

        A key that the storage knows as something else, since points of other kinds were
        added, is not shown.
        """
        kinds, found, known = self._optuna.distributions, {}, {}
        for one in self._study.get_trials(deepcopy=False):
            known |= one.distributions
        for key in dict.fromkeys([*self.plan.keys, seeds.SEED]):
            all_of = [one.overrides.get(key) for one in self.trials.values()]
            values = {seeds.text({"": x}): x for x in all_of if x is not None}.values()
            types = {type(value) for value in values}
            if not types:
                continue
            if types == {int}:
                axis = kinds.IntDistribution(min(values), max(values))
            elif types <= {int, float}:
                axis = kinds.FloatDistribution(min(values), max(values))
            elif types <= {str, int, float, bool}:
                axis = kinds.CategoricalDistribution([*values])
            else:
                continue
            try:
                kinds.check_distribution_compatibility(known.get(key, axis), axis)
            except ValueError:
                continue
            found[key] = axis
        return found

    def _values(self, outcome: dict) -> list[float]:
        """Returns what the sampler is told of a trial that is done."""
        costs = record.costs(outcome)
        return [outcome["value"], *(costs[name] or 0.0 for name in self._costs)]

    def _attribute(self, trial: Trial, key: str, value: Any) -> None:
        self._optuna.trial.Trial(self._study, trial.id).set_user_attr(key, value)

    @property
    def _drawn(self) -> int:
        return len(self._of_draw if self.plan.seeds else self.trials)

    def _draw(self, check: Callable[[str, ConfigDict], None]) -> None:
        """Adds the trials whose values the sampler chooses; those that can run wait.

        Raises:
          ValueError: none of many draws is allowed.
        """
        drawn: Point = {}
        for _ in range(MOST_REFUSED):
            number = len(self._draws.get_trials(deepcopy=False))
            self._draws.sampler = self._sampler(number)
            asked = self._draws.ask()
            drawn, point = self.plan.draw(partial(_suggest, asked))
            if point is not None:
                break
            asked.set_user_attr("refused", drawn)
            # A sampler forgets what failed, and would draw it for ever.
            self._draws.tell(asked.number, state=self._optuna.trial.TrialState.PRUNED)
        else:
            raise ValueError(
                f"to_config() allows none of {MOST_REFUSED} draws in a row, the last "
                f"of which was {drawn}"
            )
        asked.set_user_attr("drawn", drawn)
        asked.set_user_attr("point", point)
        trials = self._trials_of(asked.number, asked._trial_id, drawn, point)
        for trial in trials:
            if not self.plan.seeds:
                self._attribute(trial, "name", trial.name)
                self._attribute(trial, "overrides", trial.overrides)
            if twin := self._ended.get(seeds.text(trial.overrides)):
                self._end_unrun(trial, {**twin.outcome, "same_as": twin.name})
                continue
            try:
                trial.overrides, trial.config = self._build(trial.overrides)
                check(trial.name, trial.config)
            except ValueError as error:
                self._end_unrun(trial, failure(str(error)))

    def _end_unrun(self, trial: Trial, outcome: dict) -> None:
        """Records the end of a trial that waits."""
        self._waiting.remove(trial)
        if trial.number < 0:
            self._enter(trial)
        self.finish(trial, outcome)

    def _trials_of(
        self, draw: int, id_: int, drawn: Point, point: Point
    ) -> list[Trial]:
        """Adds the trial of a draw, or one for each seed, and returns them."""
        found = []
        for own in self.plan.with_seeds(point):
            name = f"{draw:03d}-{space.name(own, space.short_keys(own))}"
            config = self.base
            with contextlib.suppress(ValueError):  # it has failed then, and says so
                own, config = self._build(own)
            trial = Trial(name, own, config, drawn=drawn)
            if self.plan.seeds:
                trial.draw = draw
            else:
                trial.number, trial.id = draw, id_
            found.append(trial)
        if self.plan.seeds:
            self._of_draw[draw] = found
            short = space.name(point, space.short_keys(point))
            self._names.setdefault(seeds.setting(point), f"{draw:03d}-{short}")
        for trial in found:
            self._add(trial)
        return found

    def _tell_draw(self, draw: int) -> None:
        """Tells the sampler the mean over the seeds of a draw, once all have ended."""
        own, states = self._of_draw[draw], self._optuna.trial.TrialState
        if not all(trial.status in ENDED for trial in own):
            return
        told = self._draws.get_trials(deepcopy=False)[draw]
        if told.state.is_finished():
            return
        values = [self._values(one.outcome) for one in own if one.status == "done"]
        bad = any(trial.status in ("pruned", "diverged") for trial in own)
        if values and not bad:
            self._draws.tell(draw, [sum(each) / len(values) for each in zip(*values)])
        else:
            self._draws.tell(draw, state=states.PRUNED if bad else states.FAIL)

    def _restore_draws(self) -> None:
        """Adds the trials of the draws that were made before."""
        for found in self._draws.get_trials(deepcopy=False):
            told = {key: runs.tuples(x) for key, x in found.user_attrs.items()}
            if "point" in told:
                self._trials_of(found.number, -1, told["drawn"], told["point"])
            elif found.state == self._optuna.trial.TrialState.RUNNING:
                fail = self._optuna.trial.TrialState.FAIL  # it died while it asked
                self._draws.tell(found.number, state=fail)

    def _begin_search(self) -> None:
        """Tells the sampler what an earlier sweep found, and what to draw first."""
        axes = self.plan.space or {}
        for row in record.earlier(self.plan, self._costs):
            point = row.get("drawn") or row["overrides"]
            own = {k: axis for k, axis in axes.items() if point.get(k) is not None}
            self._draws.add_trial(
                self._optuna.trial.create_trial(
                    values=[row["value"], *(record.took(row, x) for x in self._costs)],
                    params={k: _written(axis, point[k]) for k, axis in own.items()},
                    distributions={k: self._distribution(a) for k, a in own.items()},
                    user_attrs={"from": self.plan.start},
                )
            )
        for drawn in self.plan.first:
            self._draws.enqueue_trial(
                {key: _written(axes[key], value) for key, value in drawn.items()}
            )

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
                storages.need("cmaes", "sampler = 'cmaes'")
                return samplers.CmaEsSampler(seed=seed)
            if self.plan.sampler == "gp":
                storages.need("torch", "sampler = 'gp'")
                storages.need("scipy", "sampler = 'gp'")
                return samplers.GPSampler(seed=seed)
            return samplers.RandomSampler(seed=seed)

    def _distribution(self, axis: Dimension):
        kinds = self._optuna.distributions
        if axis.kind == "choice":
            return kinds.CategoricalDistribution(_choices(axis))
        if axis.kind in ("int", "logint"):
            ends, log = (int(axis.low), int(axis.high)), axis.kind == "logint"
            return kinds.IntDistribution(*ends, log=log, step=int(axis.step))
        log, step = axis.kind == "log", axis.step if axis.kind == "steps" else None
        return kinds.FloatDistribution(axis.low, axis.high, log=log, step=step)

    # --- what was there before ---

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
            if not (trial.own or found.state.is_finished()):
                continue  # another shard runs it
            trial.number, trial.id = found.number, found._trial_id
            trial.crashes, trial.saved = found.user_attrs.get("crashes", (0, 0))
            if found.state.is_finished():
                self._end(trial, found.user_attrs["outcome"])
                continue
            if trial.outcome:  # of an older one of its name, which failed
                self._reopen(trial)
            outcome = record.read_outcome(self.out / trial.name)
            if outcome and (outcome["status"] != "failed" or outcome.get("final")):
                self.finish(trial, outcome)
            elif outcome:
                (self.out / trial.name / record.OUTCOME).unlink()
                self.crashed(trial, outcome)
        self._waiting = deque(
            one for one in self.trials.values() if one.own and one.status == "waiting"
        )

    def _known(self, found) -> Trial | None:
        """Returns the trial that an Optuna trial stands for."""
        name = found.user_attrs.get("name")
        overrides = found.user_attrs.get("overrides")
        if name is None or overrides is None:
            return None
        searched = self.plan.space and not self.plan.seeds
        if searched and name not in self.trials:
            point = runs.tuples(overrides)
            drawn = runs.tuples(found.user_attrs.get("drawn", point))
            self._trials_of(found.number, found._trial_id, drawn, point)
        return self.trials.get(name)


def _choices(axis: Dimension) -> list:
    """Returns the choices as Optuna takes them: others than scalars by their number."""
    plain = all(isinstance(value, SCALAR) for value in axis.choices)
    return list(axis.choices if plain else range(len(axis.choices)))


def _suggest(asked, key: str, axis: Dimension) -> Any:
    """Returns the value that a sampler chooses for a key."""
    if axis.kind == "choice":
        return _read(axis, asked.suggest_categorical(key, _choices(axis)))
    if axis.kind in ("int", "logint"):
        ends, log = (int(axis.low), int(axis.high)), axis.kind == "logint"
        return asked.suggest_int(key, *ends, log=log, step=int(axis.step))
    log, step = axis.kind == "log", axis.step if axis.kind == "steps" else None
    return asked.suggest_float(key, axis.low, axis.high, log=log, step=step)


def _written(axis: Dimension, value: Any) -> Any:
    """Returns a value of an axis as Optuna takes it; `_read` is the way back."""
    if axis.kind != "choice":
        return value
    same = [seeds.text({"": choice}) for choice in axis.choices]
    return _choices(axis)[same.index(seeds.text({"": value}))]


def _read(axis: Dimension, value: Any) -> Any:
    if axis.kind != "choice":
        return value
    return axis.choices[_choices(axis).index(value)]
