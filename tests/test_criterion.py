"""Which of a run's evaluations counts; oracle: by hand."""

import pytest

from gpt_jax.criterion import Criterion

POINTS = [(0, 4.0), (2, 1.0), (4, 3.0), (6, 2.0)]


@pytest.mark.parametrize(
    ("at", "least", "most"),
    [
        ("best", (1.0, 2), (4.0, 0)),
        ("last", (2.0, 6), (2.0, 6)),
        ("last 1", (2.0, 6), (2.0, 6)),
        ("last 3", (2.0, 6), (2.0, 6)),
        ("last 4", (2.5, 6), (2.5, 6)),
    ],
)
def test_the_evaluation_that_counts_is_the_one_that_is_asked_for(at, least, most):
    assert Criterion(at=at).of(POINTS) == least
    assert Criterion(direction="maximize", at=at).of(POINTS) == most


def test_what_cannot_count_is_refused():
    for at in ("first", "last 0", "last  2", "last two", ""):
        with pytest.raises(ValueError, match=r"give best, last, or as in 'last 3'"):
            Criterion(at=at).check()
    with pytest.raises(ValueError, match="direction 'up' is not one of"):
        Criterion(direction="up").check()
    Criterion(at="last 12", direction="maximize").check()
