"""When enough pairs have been seen: a paired test that may be read after every pair.

Differences of two sides that share seeds are taken as normal, of unknown mean and
deviation. Evidence against "the mean is m" is the Bayes factor of a mean that lies
N(0, SPREAD) deviations from m, both sides with the prior 1 / sigma on the deviation:

    E = r^(-1/2) ((1 + t^2 / v) / (1 + t^2 / (v r)))^(n/2)

with Student's t of n differences less m, v = n - 1 and r = 1 + n SPREAD. Where m is
true, E is a test martingale whatever the deviation is (Hendriksen, de Heide and
Grunwald 2021, "Optional stopping with Bayes factors", section 4; Perez-Ortiz, Lardy, de
Heide and Grunwald 2024, "E-statistics, group invariance and anytime-valid testing"). So
the chance that it ever reaches 1 / alpha is at most alpha (Ville 1939), however often
one looks and for whatever reason one stops. The m for which it has not reached that are
an interval which holds the true mean at all times at once, with confidence 1 - alpha.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ALPHA = 0.05  # the chance of an error, over all looks together
SPREAD = 2.0  # of means, in squared deviations: finds two deviations after six pairs
MOST = 1000  # further pairs that are still counted
VERDICTS = ("better", "worse", "no difference", "not yet")


class Evidence(NamedTuple):
    """What n differences say of their mean.

    Attributes:
      n: how many.
      mean: of them; nan for none.
      deviation: of single differences; nan for fewer than two.
      low, high: an interval that holds the true mean at all n at once, with confidence
        1 - alpha; infinite as long as no n differences could say anything.
      against: E, the evidence against a mean of 0.
    """

    n: int
    mean: float
    deviation: float
    low: float
    high: float
    against: float


class Verdict(NamedTuple):
    """What is known of a difference.

    Attributes:
      word: of VERDICTS; "no difference" is: none as large as `within`.
      more: pairs that would decide if mean and deviation stayed as they are; 0 where it
        is decided, MOST + 1 where more than MOST would be needed.
    """

    word: str
    more: int


def against(t: float, n: int, spread: float = SPREAD) -> float:
    """Returns E of Student's t of n differences; 1 where n is below 2."""
    if n < 2:
        return 1.0
    v, r = n - 1, 1 + n * spread
    if math.isinf(t):
        ratio = r
    else:
        ratio = (1 + t * t / v) / (1 + t * t / (v * r))
    return math.exp(n / 2 * math.log(ratio) - math.log(r) / 2)


@functools.cache
def critical(n: int, alpha: float = ALPHA, spread: float = SPREAD) -> float:
    """Returns the t from which E of n differences is at least 1 / alpha; inf = none."""
    if n < 2:
        return math.inf
    r = 1 + n * spread
    k = math.exp(2 / n * (math.log(r) / 2 - math.log(alpha)))  # the ratio that it takes
    return math.inf if k >= r else math.sqrt((n - 1) * (k - 1) / (1 - k / r))


def evidence(differences: Sequence[float], alpha: float = ALPHA) -> Evidence:
    """Returns what differences say of their mean.

    Raises:
      ValueError: one is not finite, or alpha is no chance.
    """
    found = np.asarray(differences, float)
    if not np.isfinite(found).all():
        raise ValueError("a difference is not finite: a run that diverged has no loss")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}: it must be above 0 and below 1")
    n = len(found)
    if n < 2:
        mean = float(found[0]) if n else math.nan
        return Evidence(n, mean, math.nan, -math.inf, math.inf, 1.0)
    mean, deviation = float(found.mean()), float(found.std(ddof=1))
    if np.ptp(found) == 0:  # also where rounding makes a deviation of equal numbers
        t, deviation = (math.inf if mean else 0.0), 0.0
        reach = 0.0 if math.isfinite(critical(n, alpha)) or not mean else math.inf
    else:
        t = mean / (deviation / math.sqrt(n))
        reach = critical(n, alpha) * deviation / math.sqrt(n)
    return Evidence(n, mean, deviation, mean - reach, mean + reach, against(t, n))


def verdict(
    differences: Sequence[float],
    *,
    within: float,
    direction: str = "minimize",
    alpha: float = ALPHA,
) -> tuple[Verdict, Evidence]:
    """Returns what differences, the new side less the old, say of the new side.

    Args:
      differences: of the metric, pair by pair.
      within: a difference that small is none.
      direction: minimize or maximize the metric.
      alpha: the chance that "better" or "worse" is said, at any time, of sides that are
        the same; half of it for each.
    """
    found = evidence(differences, alpha)
    good, bad = ("better", "worse")
    if direction == "maximize":
        good, bad = bad, good
    if found.high < 0:
        return Verdict(good, 0), found
    if found.low > 0:
        return Verdict(bad, 0), found
    if -within < found.low and found.high < within:
        return Verdict("no difference", 0), found
    return Verdict("not yet", more(found, within, alpha)), found


def more(found: Evidence, within: float, alpha: float = ALPHA) -> int:
    """Returns how many more pairs would decide if these went on as they are.

    At least 1; MOST + 1 stands for more than MOST. Without a deviation: the fewest that
    could say anything.
    """
    for count in range(1, MOST + 1):
        n = found.n + count
        if math.isinf(critical(n, alpha)):
            continue
        if math.isnan(found.deviation):
            return count
        reach = critical(n, alpha) * found.deviation / math.sqrt(n)
        if reach < abs(found.mean) or abs(found.mean) + reach < within:
            return count
    return MOST + 1
