"""Seeds are repetitions. The oracle is scipy; Holm's correction is done by hand."""

import math

import pytest
from scipy import stats

from gpt_jax import seeds


def test_a_mean_has_the_interval_of_students_t():
    values = [2.0, 2.2, 2.4, 2.9]
    found = seeds.mean(values)
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert found.n == 4 and found.value == pytest.approx(2.375)
    assert found.error == pytest.approx(stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_has_no_interval():
    found = seeds.mean([2.5])
    assert (found.value, found.n) == (2.5, 1)
    assert math.isnan(found.error) and math.isnan(found.low)


def test_a_difference_is_a_paired_test_over_the_seeds_that_both_have():
    a = {1: 2.0, 2: 2.2, 3: 2.4, 9: 100.0}
    b = {1: 2.11, 2: 2.29, 3: 2.52, 8: -100.0}
    found = seeds.difference(a, b)
    oracle = stats.ttest_rel([2.11, 2.29, 2.52], [2.0, 2.2, 2.4])
    assert found is not None and found.p == pytest.approx(oracle.pvalue)
    interval = oracle.confidence_interval(0.95)
    assert (found.mean.low, found.mean.high) == pytest.approx(tuple(interval))
    assert seeds.difference({1: 2.0, 2: 2.0}, {2: 3.0}) is None


def test_equal_differences_are_sure_unless_they_are_none():
    assert seeds.difference({1: 1.0, 2: 2.0}, {1: 1.5, 2: 2.5}).p == 0
    assert seeds.difference({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}).p == 1


def test_holm_multiplies_the_smallest_most_and_never_turns_the_order_around():
    assert seeds.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert seeds.holm([0.5, 0.9]) == [1.0, 1.0]
    # Two of the six pairs of four settings, chosen by what was measured.
    assert seeds.holm([0.01, 0.02], tests=6) == pytest.approx([0.06, 0.10])


def test_settings_are_equal_whatever_their_seeds_and_the_way_numbers_are_written():
    a = {"hyper.lr": 1, "seed": 3, "model.window": (0.0, [4])}
    b = {"model.window": [-0.0, (4.0,)], "hyper.lr": 1.0}
    assert seeds.setting(a) == seeds.setting(b)
    assert seeds.setting({"x": True}) != seeds.setting({"x": 1})
    assert seeds.setting({"x": "1"}) != seeds.setting({"x": 1})


def test_a_mean_of_the_survivors_stands_behind_those_that_are_whole():
    places = {
        "lucky": seeds.place(1.0, False, "minimize"),
        "good": seeds.place(2.0, True, "minimize"),
        "bad": seeds.place(3.0, True, "minimize"),
        "none": seeds.place(None, False, "minimize"),
    }
    assert sorted(places, key=lambda name: places[name]) == [
        *("good", "bad", "lucky", "none")
    ]
    assert seeds.place(3.0, True, "maximize") < seeds.place(2.0, True, "maximize")
