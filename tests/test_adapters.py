"""Adapters: which weights move."""

import pytest

from gpt_jax import adapters


def test_the_full_adapter_trains_everything_and_joins_to_the_same_tree():
    weights = {"a": 1, "b": {"c": 2}}
    full = adapters.make(name="full")
    params, frozen = full.split(weights)
    assert (params, frozen) == (weights, {})
    assert full.join(params, frozen) == weights


def test_an_unknown_adapter_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'lorra' is not one of: full"):
        adapters.make(name="lorra")
