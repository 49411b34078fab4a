"""What several seeds of one setting say: a mean, its interval, and what is chance.

A setting is a configuration less its seed. Seeds are repetitions: they are averaged,
never ranked. Two settings that share seeds are compared in pairs: data order and first
weights are then the same, and what they add to both sides cancels.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SEED = "seed"
SURE = 0.95  # the confidence of all intervals


class Mean(NamedTuple):
    """A mean over seeds.

    Attributes:
      value: the mean.
      n: how many seeds.
      error: its standard error, s / sqrt(n); nan for one seed.
      low, high: its 95 % confidence interval (Student's t); nan for one seed.
    """

    value: float
    n: int
    error: float
    low: float
    high: float


class Difference(NamedTuple):
    """Setting b less setting a, over the seeds that both have.

    Attributes:
      mean: of the differences, seed by seed; `n`, `error`, `low` and `high` are its.
      p: how likely so large a mean is where there is no difference (paired t-test).
    """

    mean: Mean
    p: float


def without(point: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a point less its seed: what sets its setting apart."""
    return {key: value for key, value in point.items() if key != SEED}


def setting(point: Mapping[str, Any]) -> str:
    """Returns a text that two points have in common if they are one setting."""
    return text(without(point))


def text(point: Mapping[str, Any]) -> str:
    """Returns a text that equal points have in common: 0 and 0.0, lists and tuples."""
    return json.dumps(_alike(point), sort_keys=True)


def mean(values: Sequence[float]) -> Mean:
    """Returns the mean of the values of at least one seed."""
    n, value = len(values), float(np.mean(values))
    if n < 2:
        return Mean(value, n, math.nan, math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    reach = _students_t().ppf((1 + SURE) / 2, n - 1) * error
    return Mean(value, n, error, float(value - reach), float(value + reach))


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """Returns b - a of seed -> value; None when they share fewer than two seeds."""
    shared = sorted(a.keys() & b.keys())
    if len(shared) < 2:
        return None
    found = mean([b[seed] - a[seed] for seed in shared])
    if not found.error:  # the same in every pair
        return Difference(found, 1.0 if not found.value else 0.0)
    t = abs(found.value) / found.error
    return Difference(found, float(2 * _students_t().sf(t, found.n - 1)))


def holm(ps: Sequence[float], tests: int = 0) -> list[float]:
    """Returns p-values corrected for their number (Holm 1979), in their order.

    If nothing but chance is there, one of them falls below 0.05 once in 20 times.

    Args:
      ps: of single tests.
      tests: how many these were chosen from by what was measured; 0 = no others.
    """
    count, worst = max(tests, len(ps)), 0.0
    found = [0.0] * len(ps)
    for place, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        worst = max(worst, min(1.0, (count - place) * ps[index]))
        found[index] = worst
    return found


def place(value: float | None, whole: bool, direction: str) -> tuple[bool, float]:
    """Returns what settings are sorted by, best first.

    Those of which every seed was trained to its end stand before the others: a mean of
    the seeds that survived flatters.

    Args:
      value: the mean; None where there is none yet.
      whole: whether every seed was trained to its end.
      direction: minimize or maximize.
    """
    if value is None or not math.isfinite(value):
        return True, math.inf
    return not whole, value if direction == "minimize" else -value


def _alike(value: Any) -> Any:
    """Returns a value as JSON writes all that are equal to it."""
    if isinstance(value, Mapping):
        return {str(key): _alike(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_alike(inner) for inner in value]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) + 0.0 if is_number else value  # -0.0 becomes 0.0


def _students_t() -> Any:
    from scipy import stats  # JAX brings it; half a second

    return stats.t
