"""A cache moves, grows and shrinks its rows without knowing what layers keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.model import cache
from gpt_jax.model.cache import Cache
from tests import tiny


def made(rows, length, seed):
    """Returns a cache of a layer with two arrays and of one with another."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    pair = (draw(rows, 2, length, 3), draw(rows, 2, length, 3))
    latent = {"latent": draw(rows, 1, length, 5)}
    lengths = jnp.arange(1, rows + 1, dtype=jnp.int32)
    return Cache(layers=(pair, latent), length_B=lengths)


def arrays(found):
    return [np.asarray(x) for x in jax.tree.leaves(found.layers)]


def test_insert_replaces_one_row_and_free_empties_it():
    full, row = made(3, 6, seed=8), made(1, 4, seed=10)
    both = tiny.jit(cache.insert)(full, row, 1)
    for now, before, one in zip(*map(arrays, (both, full, row)), strict=True):
        np.testing.assert_array_equal(now[1, :, :4], one[0])
        np.testing.assert_array_equal(now[::2], before[::2])
    assert both.length_B.tolist() == [1, 1, 3]
    assert cache.free(both, 2).length_B.tolist() == [1, 1, 0]


@pytest.mark.parametrize("reach", [4, 7, 9])
@pytest.mark.parametrize("held", [1, 3, 4])
def test_insert_copies_what_is_there_whatever_the_row_could_hold(
    monkeypatch, reach, held
):
    monkeypatch.setattr(cache, "COPIED", 3)
    full, row = made(3, 7, seed=8), made(1, reach, seed=10)
    row = row._replace(length_B=jnp.array([held]))
    both = tiny.jit(cache.insert)(full, row, 2)
    for now, before, one in zip(*map(arrays, (both, full, row)), strict=True):
        np.testing.assert_array_equal(now[2, :, :held], one[0, :, :held])
        np.testing.assert_array_equal(now[:2], before[:2])
    assert both.length_B[2] == held


def test_insert_refuses_several_rows():
    with pytest.raises(ValueError, match="2 rows"):
        cache.insert(made(3, 6, seed=8), made(2, 6, seed=8), 0)


def test_a_stretched_cache_keeps_its_entries_and_has_room_or_less_of_it():
    full = made(2, 6, seed=3)
    longer, shorter = cache.stretch(full, 9), cache.stretch(full, 4)
    assert (full.reach, longer.reach, shorter.reach) == (6, 9, 4)
    for old, more, less in zip(*map(arrays, (full, longer, shorter)), strict=True):
        np.testing.assert_array_equal(more[:, :, :6], old)
        assert not more[:, :, 6:].any()
        np.testing.assert_array_equal(less, old[:, :, :4])
