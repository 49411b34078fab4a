"""A sweep file becomes a plan: its settings, its points, and their configs, checked."""

import ast
import functools
import json
import runpy
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt_jax import names
from gpt_jax.seeds import SEED
from gpt_jax.sweep import space as spaces
from gpt_jax.sweep.space import OPTIONS, Dimension, Drawn, Point, Pruner

SAMPLERS = ("tpe", "random", "qmc", "cmaes", "gp")
DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True)
class Plan:
    """What a sweep file says.

    Attributes:
      name: the file's name.
      config: the config file and its options, as --config takes it.
      fixed: overrides that all trials share.
      points: the overrides of every trial; None when a search space is given. Under
        the key "config" a point may have further options of the config file.
      space: what is searched.
      seeds: how many seeds each point, or each draw of a search, is trained with; their
        mean is judged. 0 = one, that of the config.
      sampler, trials, seed: how a space is searched, how many times it draws, and the
        seed of the draws.
      pruner: which trials stop early; None = none.
      metric: what is compared: a name in metrics.jsonl.
      direction: minimize or maximize it.
    """

    name: str
    config: str
    fixed: Point
    points: tuple[Point, ...] | None = None
    space: Mapping[str, Dimension] | None = None
    seeds: int = 0
    sampler: str = "tpe"
    trials: int = 0
    seed: int = 0
    pruner: Pruner | None = None
    metric: str = "val_loss"
    direction: str = "minimize"

    def __post_init__(self):
        names.choose("sampler", self.sampler, SAMPLERS)
        names.choose("direction", self.direction, DIRECTIONS)
        if self.points is not None and not self.points:
            raise ValueError(f"the sweep {self.name} is empty: points() gave no point")
        if self.points is None and not self.space:
            raise ValueError(f"the sweep {self.name} is empty: its space has no key")
        if self.points is None and self.trials < 1:
            raise ValueError(
                f"the sweep {self.name} searches a space: say how long, trials = 20"
            )
        if self.seeds < 0:
            raise ValueError(f"seeds is {self.seeds}: it must not be negative")
        if self.seeds and SEED in self.fixed.keys() | set(self.keys):
            raise ValueError(
                f"seeds is {self.seeds}, so {SEED} cannot be set as well: leave one out"
            )
        if both := sorted(self.fixed.keys() & set(self.keys)):
            raise ValueError(f"{both[0]} is fixed, so it cannot be swept as well")

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

    @functools.cached_property
    def short(self) -> dict[str, str]:
        """The keys as trials' names write them."""
        return spaces.short_keys(self.keys)

    @functools.cached_property
    def drawn(self) -> bool:
        """Whether chance, or a sampler, chose the points."""
        points = self.points or ()
        return bool(self.space) or any(isinstance(point, Drawn) for point in points)


SETTINGS = frozenset(Plan.__dataclass_fields__) - {"name"}


def load(path: str | Path, extra: Iterable[str] = ()) -> Plan:
    """Returns the plan that a sweep file describes.

    Args:
      path: a Python file. Its lower-case names are the settings of `Plan`; `points` is
        a function without arguments. Helpers have capitals or an underscore.
      extra: KEY=VALUE settings that stand above `fixed`.

    Raises:
      ValueError: the file cannot be run, or its settings do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no sweep file {path}; see experiments/sweeps/")
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
        fixed = {**settings.pop("fixed", {}), **dict(map(_assignment, extra))}
        return Plan(name=path.stem, fixed=fixed, **settings)
    except Exception as error:
        raise ValueError(f"{path}: {error}") from error


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
    flat = dict(_flat(config))
    fixed = {
        key: value if isinstance(flat.get(key), str) else _literal(value)
        for key, value in plan.fixed.items()
    }
    return replace(plan, fixed=fixed), override(config, fixed)


def configs(base: ConfigDict, plan: Plan) -> dict[str, tuple[Point, ConfigDict]]:
    """Returns name -> (overrides, config) of every point; checks none.

    Overrides are of the types that the config has, so 0 and 0.0 are one value.

    Raises:
      ValueError: a point does not fit the config, or two are the same; the sentence
        names it.
    """
    start = functools.cache(functools.partial(_start, base, plan))
    types = functools.cache(lambda options: dict(_flat(start(options))))
    points: list[Point] = []
    for index, point in enumerate(plan.points or ()):
        try:
            points.append(_typed(point, types(point.get(OPTIONS, ""))))
        except ValueError as error:
            raise ValueError(f"point {index} ({point}): {error}") from error
    spaces.names(points)  # the same one twice is told by its number in the file
    points = [seeded for point in points for seeded in plan.with_seeds(point)]
    built = {}
    for place, (name, point) in enumerate(zip(spaces.names(points), points)):
        index = place // (plan.seeds or 1)
        try:
            changes = {key: value for key, value in point.items() if key != OPTIONS}
            built[name] = (point, override(start(point.get(OPTIONS, "")), changes))
        except ValueError as error:
            raise ValueError(f"point {index} ({name}): {error}") from error
    return built


def corners(base: ConfigDict, plan: Plan) -> Iterator[tuple[str, ConfigDict]]:
    """Yields (what, config) for both ends, or every choice, of each dimension."""
    space = plan.space or {}
    start = override(base, {key: axis.ends()[0] for key, axis in space.items()})
    for key, axis in space.items():
        for value in axis.ends():
            yield f"{key}={value}", override(start, {key: value})


def command(plan: Plan, point: Point, workdir: str) -> list[str]:
    """Returns the words of the command that trains a point alone."""
    changes = {**plan.fixed, **point}
    file = with_options(plan.config, changes.pop(OPTIONS, ""))
    words = ["python", "-m", "experiments.train", f"--config={file}"]
    words += [f"--config.{key}={value}" for key, value in changes.items()]
    return [*words, f"--workdir={workdir}"]


def with_options(config: str, options: str) -> str:
    """Returns a config file with more options behind its colon."""
    file, _, before = config.partition(":")
    more = ",".join(filter(None, (before, options)))
    return f"{file}:{more}" if more else file


def _start(base: ConfigDict, plan: Plan, options: str) -> ConfigDict:
    """Returns the config that points with these options of its file change."""
    if not options:
        return base
    path, _, arg = with_options(plan.config, options).partition(":")
    return override(runpy.run_path(path)["get_config"](arg or None), plan.fixed)


def _typed(point: Point, types: Mapping[str, Any]) -> Point:
    """Returns a point whose whole numbers are fractions where the config has those."""

    def like(old: Any, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return float(value) if whole and isinstance(old, float) else value

    return type(point)({key: like(types.get(key), x) for key, x in point.items()})


def _is_setting(key: str, value: Any) -> bool:
    if key == "points":
        return True
    helper = callable(value) or isinstance(value, types.ModuleType)
    return key[0].islower() and not helper


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set={text}: write --set=KEY=VALUE, as in --set=steps=100")
    return key, value


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
