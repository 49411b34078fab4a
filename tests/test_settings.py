"""Groups of settings: keys and types are those that their owner declares."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpt_jax import settings


@dataclass(frozen=True)
class Part:
    size: int
    share: float


class Owner(NamedTuple):
    number: int
    rate: float
    name: str
    on: bool
    words: Sequence[str]
    shares: tuple[float, float]
    pairs: Sequence[tuple[str, bool | float]]
    parts: tuple[Part, ...]
    more: Part | None


RIGHT: Mapping[str, Any] = {
    "number": 3,
    "rate": 0.5,
    "name": "a",
    "on": False,
    "words": ("a", "b"),
    "shares": (0.5, 1),
    "pairs": (("a", True), ("b", 0.1)),
    "parts": ({"size": 1, "share": 0.5}, Part(2, 0.1)),
    "more": None,
}


def fit(**changes):
    settings.fit("group", {**RIGHT, **changes}, settings.declared(Owner))


def test_what_is_declared_fits_however_its_numbers_are_kept():
    fit()
    fit(number=np.int64(3), rate=2, words=["a"], shares=[0, np.float32(1)], parts=[])
    fit(words=(), more={"size": 1, "share": 1.0})


@pytest.mark.parametrize(
    "change, told",
    [
        ({"number": True}, "group.number is True: it must be a whole number"),
        ({"number": 1.5}, "group.number is 1.5: it must be a whole number"),
        ({"rate": math.nan}, "group.rate is nan: it must be a finite number"),
        ({"rate": -math.inf}, "group.rate is -inf: it must be a finite number"),
        ({"rate": "fast"}, "group.rate is 'fast': it must be a finite number"),
        ({"name": None}, "group.name is None: it must be text"),
        ({"on": 1}, "group.on is 1: it must be True or False"),
        ({"words": "ab"}, "group.words is 'ab': it must be a tuple, each part of it"),
        ({"words": ("a", 1)}, "group.words[1] is 1: it must be text"),
        ({"shares": (0.1, "a")}, "group.shares[1] is 'a': it must be a finite number"),
        ({"shares": (1,)}, "group.shares is (1,): it must be a tuple of 2"),
        ({"pairs": (("a",),)}, "group.pairs[0] is ('a',): it must be a tuple of 2"),
        ({"pairs": (("a", math.inf),)}, "group.pairs[0][1] is inf: it must be True or"),
        ({"parts": ({"size": 1.5},)}, "group.parts[0]['size'] is 1.5: it must be a"),
        ({"parts": ({"sise": 1},)}, "group.parts[0] has 'sise': its keys are size, sh"),
        ({"more": {"share": "x"}}, "group.more['share'] is 'x': it must be a finite"),
        (
            {"more": 3},
            "group.more is 3: it must be a mapping with the keys size, share",
        ),
        ({"numberr": 3}, "there is no setting group.numberr; did you mean number?"),
    ],
)
def test_what_is_not_is_refused_with_its_key_and_what_it_may_be(change, told):
    with pytest.raises(ValueError) as error:
        fit(**change)
    assert str(error.value).startswith(told)


def test_keys_of_another_variant_are_answered_with_what_to_do():
    wanted = settings.declared(Owner)
    with pytest.raises(ValueError, match=r"^group has no number, .*: take another$"):
        settings.fit("group", {"name": "a"}, wanted, advice=": take another")
    with pytest.raises(ValueError, match=r"^there is no setting group.x: take another"):
        settings.fit("group", {**RIGHT, "x": 1}, wanted, advice=": take another")


def test_a_value_in_the_place_of_a_group_is_refused():
    with pytest.raises(ValueError, match="hyper is 3: it is a group of settings"):
        settings.fit("hyper", 3, {"lr": float})  # type: ignore[arg-type]
