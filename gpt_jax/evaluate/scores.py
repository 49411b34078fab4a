"""Scores of answers against references that need no model, with their uncertainty.

Exact match; token F1 (SQuAD: Rajpurkar et al. 2016, section 5); ROUGE-L (Lin 2004,
section 3, by the package rouge-score); chrF (Popović 2015, by the package sacrebleu).
All of them run from 0 to 100.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gpt_jax import commands

NAMES = ("exact", "f1", "rouge_l", "chrf")
RESAMPLES = 10_000  # of a bootstrap: its own error is then a hundredth of the interval
ARTICLES = re.compile(r"\b(a|an|the)\b")
MARKS = str.maketrans("", "", string.punctuation)


class Interval(NamedTuple):
    """A mean and the 95 % interval that a bootstrap gives it."""

    mean: float
    low: float
    high: float


def rows(answers: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """Returns the scores of each answer by name.

    Raises:
      ValueError: rouge-score or sacrebleu is not installed; or the numbers of answers
        and references differ.
    """
    if len(answers) != len(references):
        raise ValueError(
            f"there are {len(answers)} answers but {len(references)} references"
        )
    measures = {"exact": exact, "f1": f1, **_libraries()}
    pairs = zip(answers, references, strict=True)
    return [{name: measures[name](a, r) for name in NAMES} for a, r in pairs]


def exact(answer: str, reference: str) -> float:
    """Returns 100 when the texts are equal but for space around them."""
    return 100.0 * (answer.strip() == reference.strip())


def f1(answer: str, reference: str) -> float:
    """Returns the harmonic mean of the shares of words that both have.

    Case, punctuation and the articles a, an, the do not count.
    """
    ours, theirs = _words(answer), _words(reference)
    if not ours or not theirs:
        return 100.0 * (ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 200.0 * common / (len(ours) + len(theirs))


def bootstrap(values: Sequence[float], *, seed: int) -> Interval:
    """Returns the mean of values and its percentile interval (Efron 1979).

    Differences of two runs, row by row, give the paired interval of their difference.

    Raises:
      ValueError: there is no value.
    """
    if not len(values):
        raise ValueError("there is not one value to take the mean of")
    value_N = np.asarray(values, np.float64)
    random = np.random.default_rng(seed)
    # One resample at a time: RESAMPLES x N indices of a large test would be gigabytes.
    means = [
        value_N[random.integers(0, len(value_N), len(value_N))].mean()
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(value_N.mean()), float(low), float(high))


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(MARKS)).split()


def _libraries() -> dict[str, Callable[[str, str], float]]:
    """Returns the scores that other packages compute, as (answer, reference)."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ValueError(
            f"ROUGE-L and chrF need the package {error.name}, which is not installed: "
            f"{commands.install('rouge-score', 'sacrebleu')}"
        ) from error
    rouge, chrf = RougeScorer(["rougeL"]), CHRF()
    return {
        "rouge_l": lambda a, r: 100.0 * rouge.score(r, a)["rougeL"].fmeasure,
        "chrf": lambda a, r: chrf.sentence_score(a, [r]).score,
    }
