"""The words of a sweep file: which values, in which combinations, chosen how.

A point is a dict of dotted config keys: {"hyper.lr": 1e-3, "model.d_model": 128}.
A combinator returns a list of points; combinators nest:

    product(grid({"hyper.lr": (1e-3, 3e-3)}), seeds(3))     # 6 points

Two keys of a point are not the config's: "config" holds further options of the config
file, "label" says what the point is called.
"""

import itertools
import random as python_random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gpt_jax import files
from gpt_jax import names as names_of
from gpt_jax import seeds as repetitions

Point = dict[str, Any]


class Drawn(dict):
    """A point drawn at random: a picture joins it to no other by a line."""


# --- points ---------------------------------------------------------------------------


def grid(axes: Mapping[str, Iterable]) -> list[Point]:
    """Returns every combination of the values of the axes."""
    values = [list(choices) for choices in axes.values()]
    return [dict(zip(axes, chosen)) for chosen in itertools.product(*values)]


def together(axes: Mapping[str, Iterable]) -> list[Point]:
    """Returns the first values of all axes, then the second ones, ...

    Raises:
      ValueError: the axes have different lengths.
    """
    values = {key: list(choices) for key, choices in axes.items()}
    if len({len(choices) for choices in values.values()}) > 1:
        lengths = ", ".join(f"{key} {len(v)}" for key, v in values.items())
        raise ValueError(f"together() wants axes of one length, found: {lengths}")
    return [dict(zip(values, chosen)) for chosen in zip(*values.values())]


def product(*lists: Iterable[Point]) -> list[Point]:
    """Returns every combination of a point of each list.

    Raises:
      ValueError: two lists set the same key.
    """
    points = []
    for parts in itertools.product(*map(list, lists)):
        drawn = any(isinstance(part, Drawn) for part in parts)
        point: Point = Drawn() if drawn else {}
        for part in parts:
            if twice := sorted((point.keys() & part.keys()) - {LABEL}):
                raise ValueError(f"product() is given {twice[0]} twice")
            both = [one[LABEL] for one in (point, part) if LABEL in one]
            point |= {**part, **({LABEL: ", ".join(both)} if both else {})}
        points.append(point)
    return points


def seeds(count: int, first: int = 1337) -> list[Point]:
    """Returns `count` points that differ in the seed only."""
    return [{"seed": first + i} for i in range(count)]


def sample(points: Iterable[Point], count: int, seed: int = 0) -> list[Point]:
    """Returns `count` of the points, drawn without replacement, in their order.

    Raises:
      ValueError: there are not so many.
    """
    points = list(points)
    if count > len(points):
        raise ValueError(f"sample() wants {count} of only {len(points)} points")
    chosen = python_random.Random(seed).sample(range(len(points)), count)
    return [points[i] for i in sorted(chosen)]


def shuffle(points: Iterable[Point], seed: int = 0) -> list[Point]:
    """Returns the points in a random order: for ASHA, which judges a trial by those
    before it and would let every point of an improving row go on."""
    points = list(points)
    python_random.Random(seed).shuffle(points)
    return points


def random(space: Mapping[str, "Dimension"], count: int, seed: int = 0) -> list[Point]:
    """Returns `count` points drawn independently from a space."""
    source = python_random.Random(seed)
    points = []
    for _ in range(count):
        points.append(Drawn())
        for key, axis in space.items():
            if axis.applies(points[-1]):
                points[-1][key] = axis.draw(source)
    return points


# --- spaces ---------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Dimension:
    """One key of a search space.

    Attributes:
      kind: float, log, steps (a float in steps), int, logint or choice.
      low, high, step, choices: of which values.
      when: what other keys must have been drawn as, so that this one is.
    """

    kind: str
    low: float = 0
    high: float = 0
    step: float = 1
    choices: tuple = ()
    when: Mapping[str, tuple] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind == "choice":
            if not self.choices:
                raise ValueError("choice() has no values")
            return
        if not self.low < self.high:
            raise ValueError(
                f"a range goes from low to high, not from {self.low} to {self.high}"
            )
        if self.kind in ("log", "logint") and self.low <= 0:
            made = "log_uniform()" if self.kind == "log" else "integer(log=True)"
            raise ValueError(f"{made} starts above 0, not at {self.low}")
        if self.kind in ("int", "steps"):
            count = (self.high - self.low) / self.step if self.step > 0 else 0.5
            if abs(count - round(count)) > 1e-6 * max(1, count):
                made = "integer()" if self.kind == "int" else "uniform()"
                raise ValueError(
                    f"{made} from {self.low} to {self.high} in steps of {self.step} "
                    f"does not end at {self.high}"
                )

    def __repr__(self) -> str:  # sweep.json holds it: what old ones say stays
        told = [f"{name}={getattr(self, name)!r}" for name in
                ("kind", "low", "high", "step", "choices")]  # fmt: skip
        told += [f"when={dict(self.when)!r}"] if self.when else []
        return f"Dimension({', '.join(told)})"

    def applies(self, drawn: Mapping[str, Any]) -> bool:
        """Whether this key is drawn where others were drawn so."""
        return all(drawn.get(key, self) in known for key, known in self.when.items())

    def draw(self, source: python_random.Random) -> Any:
        """Returns a value drawn at random."""
        if self.kind == "choice":
            return source.choice(self.choices)
        if self.kind == "int":
            return source.randrange(int(self.low), int(self.high) + 1, int(self.step))
        if self.kind == "log":
            return self.low * (self.high / self.low) ** source.random()
        if self.kind == "logint":
            low, high = self.low - 0.5, self.high + 0.5
            drawn = round(low * (high / low) ** source.random())
            return min(max(drawn, int(self.low)), int(self.high))
        if self.kind == "steps":
            count = round((self.high - self.low) / self.step)
            return self.low + self.step * source.randrange(count + 1)
        return source.uniform(self.low, self.high)

    def ends(self) -> tuple:
        """Returns the values that must be allowed for all others to be."""
        return self.choices if self.kind == "choice" else (self.low, self.high)

    def holds(self, value: Any) -> bool:
        """Whether a value may be drawn."""
        if self.kind == "choice":
            known = [repetitions.text({"": choice}) for choice in self.choices]
            return repetitions.text({"": value}) in known
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high


def uniform(low: float, high: float, step: float = 0) -> Dimension:
    """A number between low and high, in steps where one is given."""
    kind, step = ("steps", float(step)) if step else ("float", 1)
    return Dimension(kind, float(low), float(high), step)


def log_uniform(low: float, high: float) -> Dimension:
    """A positive number whose logarithm is uniform: for rates."""
    return Dimension("log", float(low), float(high))


def integer(low: int, high: int, step: int = 1, log: bool = False) -> Dimension:
    """A whole number from low to high, both included, in steps or on a log scale."""
    if log and step != 1:
        raise ValueError(f"integer() is given log and step={step}: leave one out")
    if step < 1:
        raise ValueError(f"integer() is given step={step}: it must be at least 1")
    return Dimension("logint" if log else "int", int(low), int(high), step)


def choice(*values: Any) -> Dimension:
    """One of the values."""
    return Dimension("choice", choices=values)


def when(condition: Mapping[str, Any], axis: Dimension) -> Dimension:
    """An axis that is drawn only where keys before it were drawn as these values.

    when({"optimizer.name": "muon"}, log_uniform(2e-3, 1e-1)); several values of a key
    are a tuple.
    """
    wanted = {key: x if isinstance(x, tuple) else (x,) for key, x in condition.items()}
    return replace(axis, when=wanted)


# --- pruners --------------------------------------------------------------------------

Pruner = dict[str, Any]


def asha(first: int, factor: int = 4, last: int = 0, by: str = "steps") -> Pruner:
    """Successive halving: at steps first, first * factor, ... the best 1/factor go on.

    Asynchronous (Li et al. 2020): a trial is judged against those that were there
    before it, so nothing waits.

    Args:
      first: the step of the first rung.
      factor: between the steps of two rungs; also 1 / the share that goes on.
      last: after this step no trial is judged: what is that good ends. 0 = all are.
      by: what first and last count: steps, or training tokens, where steps of trials
        are not of one size.
    """
    names_of.choose("by", by, ("steps", "tokens"))
    if last and last < first:
        raise ValueError(f"asha() is given last={last}: it must not be below first")
    made = _pruner("asha", first=first, factor=factor, last=last)
    return made if by == "steps" else {**made, "by": by}


def hyperband(first: int, factor: int = 3) -> Pruner:
    """Several ASHA brackets that begin to prune at different steps (Li et al. 2018)."""
    return _pruner("hyperband", first=first, factor=factor)


def median(first: int, trials: int = 4) -> Pruner:
    """From step `first` on, a trial worse than the median of the others stops.

    Args:
      first: no trial is judged before this step.
      trials: so many trials finish before any is judged.
    """
    if trials < 1:
        raise ValueError(f"median() is given trials={trials}: it must be at least 1")
    return _pruner("median", first=first, trials=trials)


def _pruner(name: str, **numbers: int) -> Pruner:
    if numbers["first"] < 1:
        raise ValueError(f"{name}() is given first={numbers['first']}: at least step 1")
    if numbers.get("factor", 2) < 2:
        raise ValueError(f"{name}() is given factor={numbers['factor']}: at least 2")
    return {"name": name, **numbers}


# --- populations ----------------------------------------------------------------------


def pbt(
    every: int,
    keys: Sequence[str],
    share: float = 0.25,
    factors: Sequence[float] = (0.8, 1.25),
    seed: int = 0,
) -> dict[str, Any]:
    """Population based training: the worst points go on as copies of the best.

    Args: see `population.Evolve`.
    """
    told = {"every": every, "keys": tuple(keys), "share": share}
    return {**told, "factors": tuple(factors), "seed": seed}


# --- names ----------------------------------------------------------------------------

OPTIONS = "config"  # the key of a point that holds options of the config file
LABEL = "label"  # and the one that says what the point is called
LONGEST = 100  # characters in a trial's name, which is a folder


def names(points: Sequence[Point]) -> list[str]:
    """Returns a name for every point, made of its overrides; all are different.

    Numbers are shortened where that keeps the names apart.

    Raises:
      ValueError: two points are the same.
    """
    seen: dict[str, int] = {}
    for index, point in enumerate(points):
        first = seen.setdefault(repetitions.text(point), index)
        if first < index:
            raise ValueError(f"points {first} and {index} are the same: {point}")
    short = short_keys(key for point in points for key in point)
    for write in (_brief, str, _digest):
        found = [name(point, short, write) for point in points]
        if len(set(found)) == len(found):
            break
    return found


def name(
    point: Point, short: Mapping[str, str], write: Callable[[Any], str] | None = None
) -> str:
    """Returns a point as a folder's name: lr=0.001,d_model=128."""
    write = write or _brief
    if LABEL in point:
        point = {key: x for key, x in point.items() if key in (LABEL, repetitions.SEED)}
    parts = [
        _clean(value, "=,")
        if key in (OPTIONS, LABEL)
        else f"{short[key]}={_clean(write(value))}"
        for key, value in point.items()
    ]
    whole = ",".join(parts) or "base"
    if len(whole) <= LONGEST:
        return whole
    return f"{whole[: LONGEST - 9]}-{_digest(whole)}"


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Returns the last word of every dotted key, or the whole where that is not clear.

    >>> short_keys(["hyper.lr", "optimizer.name"])
    {'hyper.lr': 'lr', 'optimizer.name': 'optimizer'}
    """
    keys = list(dict.fromkeys(keys))
    last = [key.removesuffix(".name").rpartition(".")[2] for key in keys]
    return {k: s if last.count(s) == 1 else k for k, s in zip(keys, last)}


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _digest(value: Any) -> str:
    return files.digest(repr(value))[:8]


def _clean(text: str, also: str = "") -> str:
    """Keeps what a folder's name may hold on every system."""
    kept = "".join(c if c.isalnum() or c in f"._+-{also}" else "_" for c in text)
    return kept or "_"
