"""A sweep file becomes a plan: its settings, its points, and their configs, checked."""

import ast
import functools
import json
import re
import runpy
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt_jax import commands, names
from gpt_jax import configs as recipes
from gpt_jax.criterion import Criterion
from gpt_jax.population import Evolve
from gpt_jax.seeds import SEED
from gpt_jax.sweep import space as spaces
from gpt_jax.sweep.space import LABEL, OPTIONS, Dimension, Drawn, Point, Pruner

NAME = re.compile(r"[a-z][a-z0-9_]*")
COSTS = ("parameters", "flops", "tokens", "bytes", "seconds")
SAMPLERS = ("tpe", "random", "qmc", "cmaes", "gp")


@dataclass(frozen=True)
class Plan:
    """What a sweep file says.

    Attributes:
      name: the file's name.
      config: the config file and its options, as --config takes it.
      fixed: overrides that all trials share.
      points: the overrides of every trial; None when a search space is given. Under
        the key "config" a point may have further options of the config file, under
        "label" what it is called.
      labels: what keys, and the metric, are called in the report.
      space: what is searched.
      to_config: turns what was drawn, whose keys may be any words then, into a point:
        steps from tokens and batch size, keys that are tied, options of the config
        file. None: that draw is not allowed, another one is made.
      first: draws to begin with; keys that one leaves out are drawn.
      start: the folder of an earlier sweep, whose results the sampler learns from.
      seeds: how many seeds each point, or each draw of a search, is trained with; their
        mean is judged. 0 = one, that of the config.
      sampler, trials, seed: how a space is searched, how many times it draws, and the
        seed of the draws.
      pruner: which trials stop early; None = none.
      evolve: how the points, trained together, copy each other on the way, as
        space.pbt says it; None = they do not.
      metric: what is compared: a name in metrics.jsonl.
      direction: minimize or maximize it.
      at: which evaluation counts: best, last, or as in "last 3" the mean of so many.
      cost: what is to be small as well, one of COSTS or a name of `after`: a search
        then looks for the front that nothing beats in both; "" = the metric alone.
      after: further metrics, measured once when a trial is done: functions from its run
        folder to a number (after.py has some).
      file: where this was read.
    """

    name: str
    config: str
    fixed: Point
    points: tuple[Point, ...] | None = None
    space: Mapping[str, Dimension] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    to_config: Callable[[Point], Point | None] | None = None
    first: tuple[Point, ...] = ()
    start: str = ""
    seeds: int = 0
    sampler: str = "tpe"
    trials: int = 0
    seed: int = 0
    pruner: Pruner | None = None
    evolve: Mapping[str, Any] | None = None
    metric: str = "val_loss"
    direction: str = "minimize"
    at: str = "best"
    cost: str = ""
    after: Mapping[str, Callable[[Path], float]] = field(default_factory=dict)
    file: str = ""

    def __post_init__(self):
        names.choose("sampler", self.sampler, SAMPLERS)
        self.criterion.check()
        if self.points is not None and not self.points:
            raise ValueError(f"the sweep {self.name} is empty: points() gave no point")
        if self.points is None and not self.space:
            raise ValueError(f"the sweep {self.name} is empty: its space has no key")
        if self.points is None and self.trials < 1:
            raise ValueError(
                f"the sweep {self.name} searches a space: say how long, trials = 20"
            )
        self._check_search()
        for key in () if self.to_config else self.labels:  # whose keys any words are
            names.choose("a key of labels", key, [*self.keys, self.metric])
        self._check_after()
        self._check_cost()
        self._check_evolve()
        if self.seeds < 0:
            raise ValueError(f"seeds is {self.seeds}: it must not be negative")
        if self.seeds and SEED in self.fixed.keys() | set(self.keys):
            raise ValueError(
                f"seeds is {self.seeds}, so {SEED} cannot be set as well: leave one out"
            )
        if both := sorted(self.fixed.keys() & set(self.keys)):
            raise ValueError(f"{both[0]} is fixed, so it cannot be swept as well")

    def _check_cost(self) -> None:
        if not self.cost:
            return
        names.choose("cost", self.cost, [*COSTS, *self.after])
        if self.pruner:
            raise ValueError(
                f"the pruner {self.pruner['name']} judges by {self.metric} alone, and "
                f"cost = {self.cost!r} wants the cheap ones kept: leave one out"
            )
        if self.space and self.sampler == "cmaes":
            raise ValueError(
                "sampler = 'cmaes' knows one objective: with a cost use 'tpe'"
            )

    def _check_evolve(self) -> None:
        if self.evolve is None:
            return
        Evolve(**self.evolve).check()
        if self.space or self.pruner or self.seeds:
            raise ValueError(
                "evolve trains a list of points together: leave space, pruner and "
                "seeds out"
            )
        if self.criterion != Criterion(at=self.at):
            raise ValueError(
                "evolve judges members by val_loss, the less the better: leave metric "
                "and direction out"
            )

    def _check_after(self) -> None:
        for name, measure in self.after.items():
            if not NAME.fullmatch(name) or not callable(measure):
                raise ValueError(
                    f"after has {name!r}: {measure!r}; give names of small letters "
                    "and functions from a run folder to a number"
                )
        if self.metric in self.after and self.pruner:
            raise ValueError(
                f"{self.metric} is measured after training, so the pruner "
                f"{self.pruner['name']} cannot judge by it on the way"
            )

    def _check_search(self) -> None:
        space = self.space or {}
        if not space and (self.to_config or self.first or self.start):
            raise ValueError("to_config, first and start belong to a space")
        for place, (key, axis) in enumerate(space.items()):
            for other in axis.when:
                names.choose(f"{key} depends on", other, list(space)[:place])
        for drawn in self.first:
            for key, value in drawn.items():
                axis = names.choose("a key of first", key, space)
                if not axis.holds(value):
                    raise ValueError(f"first has {key}={value!r}, which is not {axis}")

    @property
    def criterion(self) -> Criterion:
        """By what trials are ranked."""
        return Criterion(self.metric, self.direction, self.at)

    @functools.cached_property
    def keys(self) -> list[str]:
        """The dotted keys that differ between trials, in the file's order."""
        if self.space:
            return list(self.space)
        return list(dict.fromkeys(key for point in self.points or () for key in point))

    @property
    def size(self) -> int:
        """The number of trials."""
        count = self.trials if self.points is None else len(self.points)
        return count * (self.seeds or 1)

    def with_seeds(self, point: Point) -> list[Point]:
        """Returns a point with each of its seeds, or as it is."""
        repeated = spaces.seeds(self.seeds) if self.seeds else [{}]
        return spaces.product([point], repeated)

    def draw(self, choose: Callable[[str, Dimension], Any]) -> tuple[Point, Any]:
        """Returns what was drawn, and the point that it means: None, not allowed.

        Args:
          choose: returns a value for a key and its axis.
        """
        drawn: Point = {}
        for key, axis in (self.space or {}).items():
            if axis.applies(drawn):
                drawn[key] = choose(key, axis)
        return drawn, self.to_config(dict(drawn)) if self.to_config else drawn

    @functools.cached_property
    def short(self) -> dict[str, str]:
        """The keys as trials' names write them."""
        return spaces.short_keys(self.keys)

    @functools.cached_property
    def drawn(self) -> bool:
        """Whether chance, or a sampler, chose the points."""
        points = self.points or ()
        return bool(self.space) or any(isinstance(point, Drawn) for point in points)


SETTINGS = frozenset(Plan.__dataclass_fields__) - {"name", "file"}


def load(path: str | Path, extra: Iterable[str] = ()) -> Plan:
    """Returns the plan that a sweep file describes.

    Args:
      path: a Python file. Its lower-case names are the settings of `Plan`; `points` is
        a function without arguments. Helpers have capitals or an underscore.
      extra: KEY=VALUE settings that stand above `fixed`.

    Raises:
      ValueError: the file cannot be run, or its settings do not fit.
    """
    path = commands.find(commands.SWEEPS, str(path))
    try:
        found = runpy.run_path(str(path))
    except Exception as error:  # whatever a file of the user raises
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    settings = {key: value for key, value in found.items() if _is_setting(key, value)}
    for key in settings:
        if key not in SETTINGS:
            raise ValueError(
                f"{path}: {key!r} is no setting of a sweep; they are "
                f"{', '.join(sorted(SETTINGS))}, and a helper's name begins with an "
                f"underscore or a capital{names.did_you_mean(key, SETTINGS)}"
            )
    if "config" not in settings:
        raise ValueError(f"{path} names no config = 'configs/...'")
    if ("points" in settings) == ("space" in settings):
        raise ValueError(f"{path} must define either points() or a space")
    try:
        if "points" in settings:
            settings["points"] = tuple(settings["points"]())
        settings["first"] = tuple(settings.get("first", ()))
        fixed = {**settings.pop("fixed", {}), **assignments(extra)}
        where = {"name": path.stem, "file": str(path.resolve())}
        return Plan(**where, fixed=fixed, **settings)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


def assignments(texts: Iterable[str], flag: str = "set") -> Point:
    """Returns key -> text of KEY=VALUE texts, as a flag gives them."""
    found: Point = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(
                f"--{flag}={text}: write --{flag}=KEY=VALUE, as in --{flag}=steps=100"
            )
        found[key] = value
    return found


def override(config: ConfigDict, point: Point) -> ConfigDict:
    """Returns a config with dotted overrides, each of the type of what it replaces.

    Raises:
      ValueError: a key is unknown, or a value has another type.
    """
    changed = config.copy_and_resolve_references()
    for dotted, value in point.items():
        *parents, key = dotted.split(".")
        node: Any = changed
        for parent in parents:
            node = node.get(parent) if isinstance(node, ConfigDict) else None
        if not isinstance(node, ConfigDict) or key not in node:
            known = [key for key, _ in _flat(config)]
            near = names.did_you_mean(dotted, known)
            raise ValueError(f"there is no config key {dotted!r}{near}")
        old = node[key]
        if isinstance(old, ConfigDict):
            raise ValueError(
                f"{dotted} is a group of settings: give its keys one by one, as in "
                f"{dotted + '.' + next(iter(old))!r}"
            )
        if isinstance(old, str) != isinstance(value, str) or (
            isinstance(value, bool) != isinstance(old, bool)
        ):
            raise ValueError(_wrong_type(dotted, old, value))
        try:
            node[key] = value
        except (TypeError, ValueError) as error:
            raise ValueError(_wrong_type(dotted, old, value)) from error
    return changed


def fix(plan: Plan, config: ConfigDict) -> tuple[Plan, ConfigDict]:
    """Returns the plan with its fixed overrides typed, and the config with them in it.

    Raises:
      ValueError: they do not fit the config.
    """
    fixed = literals(config, plan.fixed)
    return replace(plan, fixed=fixed), override(config, fixed)


def literals(config: ConfigDict, changes: Point) -> Point:
    """Returns changes with what is text in them read, where the config has no text."""
    flat = dict(_flat(config))
    return {
        key: value if isinstance(flat.get(key), str) else _literal(value)
        for key, value in changes.items()
    }


def builder(
    base: ConfigDict, plan: Plan
) -> Callable[[Point], tuple[Point, ConfigDict]]:
    """Returns the function from a point to its overrides and its config.

    Overrides are of the types that the config has, so 0 and 0.0 are one value.

    Raises (the function):
      ValueError: the point does not fit the config.
    """
    start = functools.cache(functools.partial(_start, base, plan))
    types = functools.cache(lambda options: dict(_flat(start(options))))

    def build(point: Point) -> tuple[Point, ConfigDict]:
        if both := sorted(plan.fixed.keys() & point.keys()):
            raise ValueError(f"{both[0]} is fixed, so it cannot be swept as well")
        options = point.get(OPTIONS, "")
        typed = _typed(point, types(options))
        changes = {k: x for k, x in typed.items() if k not in (OPTIONS, LABEL)}
        return typed, override(start(options), changes)

    return build


def configs(base: ConfigDict, plan: Plan) -> dict[str, tuple[Point, ConfigDict]]:
    """Returns name -> (overrides, config) of every point; checks none.

    Raises:
      ValueError: a point does not fit the config, or two are the same; the sentence
        names it.
    """
    build, built = builder(base, plan), []
    for index, point in enumerate(plan.points or ()):
        try:
            built.append(build(point))
        except ValueError as error:
            name = spaces.name(point, plan.short)
            raise ValueError(f"point {index} ({name}): {error}") from error
    spaces.names([point for point, _ in built])  # two of the file that are the same
    if plan.seeds:
        built = [
            (seeded, override(config, {SEED: seeded[SEED]}))
            for point, config in built
            for seeded in plan.with_seeds(point)
        ]
    return dict(zip(spaces.names([point for point, _ in built]), built))


def corners(base: ConfigDict, plan: Plan) -> Iterator[tuple[str, ConfigDict]]:
    """Yields (what, config) for both ends, or every choice, of each dimension.

    Raises:
      ValueError: one of them does not fit the config.
    """
    space, build = plan.space or {}, builder(base, plan)
    for key, axis in space.items():
        needed = {other: values[0] for other, values in axis.when.items()}
        for value in axis.ends():
            fixed = {**needed, key: value}
            drawn, point = plan.draw(lambda k, a: fixed.get(k, a.ends()[0]))  # noqa: B023
            if key not in drawn or point is None:
                continue
            try:
                yield f"{key}={value}", build(point)[1]
            except ValueError as error:
                raise ValueError(f"{key}={value}: {error}") from error


def command(plan: Plan, point: Point, workdir: str) -> list[str]:
    """Returns the words of the command that trains a point alone."""
    changes = {**plan.fixed, **{k: x for k, x in point.items() if k != LABEL}}
    file = with_options(plan.config, changes.pop(OPTIONS, ""))
    words = [*commands.typed("train").split(), f"--config={file}"]
    words += [f"--config.{key}={value}" for key, value in changes.items()]
    return [*words, f"--workdir={workdir}"]


def with_options(config: str, options: str) -> str:
    """Returns a config file with more options behind its colon."""
    file, before = commands.split(config)
    more = ",".join(filter(None, (before, options)))
    return f"{file}:{more}" if more else file


def _start(base: ConfigDict, plan: Plan, options: str) -> ConfigDict:
    """Returns the config that points with these options of its file change."""
    if not options:
        return base
    return override(recipes.load(with_options(plan.config, options)), plan.fixed)


def _typed(point: Point, types: Mapping[str, Any]) -> Point:
    """Returns a point whose whole numbers are fractions where the config has those."""

    def like(old: Any, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return float(value) if whole and isinstance(old, float) else value

    return type(point)({key: like(types.get(key), x) for key, x in point.items()})


def _is_setting(key: str, value: Any) -> bool:
    if key in ("points", "to_config"):
        return True
    helper = callable(value) or isinstance(value, types.ModuleType)
    return key[0].islower() and not helper


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _flat(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _wrong_type(key: str, old: Any, value: Any) -> str:
    return (
        f"{key} is {value!r}: it must be of the type {type(old).__name__}, as its "
        f"default {json.dumps(old, default=str)} is"
    )
