"""Dropout: the share that is zeroed, the mean that is kept, the rate of nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.dropout import drop
from tests.tiny import jit


def test_dropout_keeps_the_mean_and_zeroes_its_share():
    x = jnp.ones(20000)
    y = drop(x, jnp.float32(0.3), jax.random.key(0))
    assert abs((y == 0).mean() - 0.3) < 0.015
    assert abs(y.mean() - 1) < 0.02
    np.testing.assert_allclose(y[y > 0], 1 / 0.7, rtol=1e-4)


def test_dropout_of_rate_0_changes_nothing():
    x = jax.random.normal(jax.random.key(7), (100,))
    same = jit(drop)(x, 0.0, jax.random.key(0))
    np.testing.assert_array_equal(same, x)
    assert drop(x, None, jax.random.key(0)) is x
