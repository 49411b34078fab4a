"""Which cases of a test `make test` runs; `make test-slow` runs all."""

from collections.abc import Iterable

import pytest


def few(cases: Iterable, *quick: object) -> list:
    """Returns the cases, of which all but `quick` are slow; a tuple is all arguments.

    For tests whose cases hold the same mechanism, where each costs seconds: a change
    that breaks one nearly always breaks a quick one as well.
    """
    known = list(cases)
    assert all(case in known for case in quick), f"{quick} are not all in {known}"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in quick else pytest.mark.slow,
        )
        for case in known
    ]
