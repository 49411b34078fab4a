"""How much each swept key decides, beyond what chance would seem to."""

from typing import Any

import numpy as np

from gpt_jax import seeds
from gpt_jax.report import results as tables
from gpt_jax.report.results import Axis, Results, Row

FEWEST = 8  # settings; of fewer nothing can be said
BINS = 4  # groups that the values of a continuous key are put into


def importance(results: Results, axes: list[Axis]) -> dict[str, float]:
    """Returns the share of the differences between settings that each key explains.

    An analysis of variance of ranks, the key that explains most first, then the one
    that explains most of the rest; so shares never add up to more than 1, and in a full
    grid they are main effects. A key counts where it is more than chance (an F-test
    against what all keys together leave, corrected for their number), and what chance
    explains on average is taken off (omega squared: Hays 1963). Ranks, so that a
    hopeless setting does not decide alone: pruned ones stand after all others, those
    that were pruned first last, and after them those that diverged.

    Returns:
      Key -> share, the largest first; a key that is not told from chance is absent.
    """
    ranked = [(row, place) for row in results["settings"] if (place := _place(row))]
    if len(ranked) < FEWEST:
        return {}
    from scipy import stats  # JAX brings it; half a second

    sign = 1 if results["direction"] == "minimize" else -1
    order = [(where, -far, sign * value) for _, (where, far, value) in ranked]
    known = {place: i for i, place in enumerate(sorted(set(order)))}
    ranks = stats.rankdata([known[place] for place in order])
    columns = {axis.key: _columns([tables.at(row, axis.key) for row, _ in ranked])
               for axis in axes}  # fmt: skip
    model = np.ones((len(ranks), 1))
    total = left = _unexplained(model, ranks)
    free, spare = len(ranks) - 1, max(3, len(ranks) // 4)
    taken: dict[str, tuple[float, int]] = {}  # sum of squares, degrees of freedom
    while total and left > 1e-9 * total:
        after = {
            key: _unexplained(np.hstack([model, own]), ranks)
            for key, own in columns.items()
            if key not in taken and free - own.shape[1] >= spare
        }
        if not after:
            break
        key = min(after, key=lambda key: after[key])
        taken[key] = left - after[key], columns[key].shape[1]
        model, left = np.hstack([model, columns[key]]), after[key]
        free -= columns[key].shape[1]
    noise = max(left, 1e-9 * total) / free if free else 0.0
    tests = [float(stats.f.sf(ss / k / noise, k, free)) for ss, k in taken.values()]
    shares = {
        key: (ss - k * noise) / total
        for (key, (ss, k)), p in zip(taken.items(), seeds.holm(tests))
        if p < 1 - seeds.SURE
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _place(row: Row) -> tuple[int, float, float] | None:
    """Returns (group, share of its steps, value) of a setting; None: says nothing."""
    if row["status"] == "diverged":
        return 2, 0.0, 0.0
    if row["value"] is not None:
        return 0, 0.0, row["value"]
    if row["status"] == "pruned" and row["last"] is not None:
        return 1, row["step"] / max(row["steps"], 1), row["last"]
    return None


def _columns(values: list[Any]) -> np.ndarray:
    """Returns a column of 0 and 1 for each group of settings but the first."""
    many = len(set(values)) > max(BINS, len(values) / 2)
    if many and tables.numeric(values):  # groups are quarters of the range
        order = np.argsort(np.argsort(np.array(values, float), kind="stable"))
        group = order * BINS // len(values)
    else:
        group = np.unique([repr(value) for value in values], return_inverse=True)[1]
    return (group[:, None] == np.arange(1, group.max() + 1)).astype(float)


def _unexplained(model: np.ndarray, values: np.ndarray) -> float:
    """Returns the sum of squares that a linear model leaves."""
    fitted = model @ np.linalg.lstsq(model, values, rcond=None)[0]
    return float(((values - fitted) ** 2).sum())
