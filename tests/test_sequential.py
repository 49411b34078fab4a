"""The sequential test: its formula, and how often it errs however often one looks."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from gpt_jax import sequential

# val_loss of configs/quickstart.py:size=tiny with 200 steps and 64 windows, by seed
# from 0 on (jax 0.10.2 on a CPU).
RECORDED = (
    *(2.32597, 2.35454, 2.34904, 2.31509, 2.34272, 2.35601, 2.35414, 2.35908),
    *(2.32104, 2.33673, 2.36700, 2.36417, 2.32634, 2.31780, 2.32443, 2.35282),
    *(2.35219, 2.32411, 2.34566, 2.33318, 2.34126, 2.33143, 2.35708, 2.33848),
)


def words(differences_NP, **how):
    """Returns the first verdict of each row that is one, and after how many pairs."""
    found = []
    for row in differences_NP:
        for n in range(1, len(row) + 1):
            verdict, _ = sequential.verdict(row[:n], **{"within": 0.0, **how})
            if verdict.word != "not yet":
                break
        found.append((verdict.word, n))
    return found


@pytest.mark.parametrize(("n", "t"), [(2, 3.0), (5, -2.5), (12, 4.0), (40, 0.3)])
def test_the_evidence_is_the_bayes_factor_that_integration_gives(n, t):
    """Of t under a mean of d deviations: noncentral t; d is drawn from N(0, SPREAD)."""
    wide = math.sqrt(sequential.SPREAD)

    def weighed(d):
        return stats.nct.pdf(t, n - 1, d * math.sqrt(n)) * stats.norm.pdf(d, 0, wide)

    above, _ = integrate.quad(weighed, -12, 12, points=[t / math.sqrt(n)], limit=400)
    wanted = above / stats.t.pdf(t, n - 1)
    assert sequential.against(t, n) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("n", [4, 7, 30])
def test_the_critical_t_is_where_the_evidence_is_one_in_alpha(n):
    t = sequential.critical(n, alpha=0.05)
    assert sequential.against(t, n) == pytest.approx(20)
    found = sequential.evidence(np.arange(n) * 1.0)
    at_the_edge = sequential.evidence(np.arange(n) - found.low)
    assert at_the_edge.against == pytest.approx(20)
    assert at_the_edge.low == pytest.approx(0, abs=1e-9)


def test_sides_that_are_the_same_are_called_better_at_most_once_in_twenty_tries():
    rng = np.random.default_rng(0)
    for deviation in (1e-4, 30.0):
        found = words(rng.normal(0, deviation, (200, 12)))
        assert sum(word == "better" for word, _ in found) <= 10
        assert sum(word == "worse" for word, _ in found) <= 10


def test_looking_after_every_one_of_a_hundred_pairs_errs_no_more_than_alpha():
    rng = np.random.default_rng(1)
    rows, n = rng.normal(size=(4000, 100)), np.arange(1, 101)
    means = rows.cumsum(1) / n
    squares = (rows**2).cumsum(1) - n * means**2
    t = means[:, 1:] * np.sqrt(n[1:]) / np.sqrt(squares[:, 1:] / (n[1:] - 1))
    limit = np.array([sequential.critical(k) for k in n[1:]])
    erred = (np.abs(t) >= limit).any(1).mean()
    assert 0.01 < erred <= 0.05  # the plain t-test errs in 0.4 of them
    plain = stats.t.ppf(0.975, n[1:] - 1)
    assert (np.abs(t) >= plain).any(1).mean() > 0.3


def test_two_seed_deviations_are_found_within_twelve_seeds():
    rng = np.random.default_rng(2)
    found = words(rng.normal(-2.0, 1.0, (300, 12)) * 0.003)
    right = [n for word, n in found if word == "better"]
    assert len(right) >= 0.9 * 300
    assert np.median(right) <= 7
    assert not any(word == "worse" for word, _ in found)


def test_on_the_noise_of_real_seeds_the_rates_hold_as_well():
    rng, losses = np.random.default_rng(3), np.array(RECORDED)
    pairs = rng.choice(losses, (200, 12)) - rng.choice(losses, (200, 12))
    assert sum(word == "better" for word, _ in words(pairs)) <= 10
    shifted = pairs - 2 * losses.std(ddof=1) * math.sqrt(2)  # of a difference of two
    assert sum(word == "better" for word, _ in words(shifted)) >= 180


def test_a_small_difference_ends_as_none_and_says_how_many_seeds_it_needs():
    rng = np.random.default_rng(4)
    row = rng.normal(0.0, 1.0, 40).tolist()
    verdict, found = sequential.verdict(row, within=2.0)
    assert verdict == ("no difference", 0) and -2 < found.low < found.high < 2
    verdict, found = sequential.verdict(row[:6], within=1.5)
    assert verdict.word == "not yet"
    n = found.n + verdict.more
    reach = sequential.critical(n) * found.deviation / math.sqrt(n)
    before = sequential.critical(n - 1) * found.deviation / math.sqrt(n - 1)
    assert abs(found.mean) + reach < 1.5 <= abs(found.mean) + before
    assert sequential.verdict(row, within=0.0)[0].more > 100


def test_a_direction_turns_the_words_round():
    row = [-1.0, -1.1, -0.9, -1.05, -0.95]
    assert sequential.verdict(row, within=0)[0].word == "better"
    assert sequential.verdict(row, within=0, direction="maximize")[0].word == "worse"


def test_sides_of_the_same_bits_differ_in_nothing_at_once():
    verdict, found = sequential.verdict([0.0, 0.0], within=0.01)
    assert verdict.word == "no difference" and (found.low, found.high) == (0, 0)
    # One number only, again and again, is no proof before the test could say so.
    assert sequential.verdict([0.3] * 2, within=0.01)[0].word == "not yet"
    assert sequential.verdict([0.3] * 6, within=0.01)[0].word == "worse"


def test_a_difference_that_is_none_is_refused():
    with pytest.raises(ValueError, match="diverged"):
        sequential.evidence([0.1, math.nan])
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        sequential.evidence([0.1, 0.2], alpha=1.5)
    empty = sequential.evidence([])
    assert (empty.n, empty.low, empty.high) == (0, -math.inf, math.inf)
