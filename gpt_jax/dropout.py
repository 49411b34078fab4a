"""Dropout at a rate that may be traced: some numbers become 0, the others larger."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Drop(NamedTuple):
    """A rate, which may be traced, and its key."""

    rate: jax.Array | float
    key: jax.Array


def drop(x, rate, key):
    """Zeroes a share `rate` of x and scales the rest to keep the mean.

    `rate` may be traced (and vmapped); None switches dropout off for good.
    """
    if rate is None:
        return x
    kept_share = 1.0 - jnp.asarray(rate, jnp.float32)
    kept = jax.random.uniform(key, x.shape) < kept_share
    scale = (1.0 / jnp.maximum(kept_share, 1e-6)).astype(x.dtype)
    return jnp.where(kept, x * scale, 0)
