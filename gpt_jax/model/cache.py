"""What a model remembers of the tokens of each row; its layers make it and own it.

Of what a layer keeps nothing is known here but two axes: which row an entry is of, and
at which place of the row its token stands.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROW, PLACE = 0, 2  # these axes of every array that a layer keeps


class Cache(NamedTuple):
    """Rows of earlier tokens.

    Row b holds length_B[b] tokens; what lies behind them is never seen.

    Attributes:
      layers: what each layer keeps: a tree of arrays.
      length_B: int32.
    """

    layers: tuple[Any, ...]
    length_B: jax.Array

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.length_B)

    @property
    def reach(self) -> int:
        """How many tokens a row can hold."""
        return jax.tree.leaves(self.layers)[0].shape[PLACE]


def insert(cache: Cache, row: Cache, slot) -> Cache:
    """Returns the cache with its row `slot` replaced by a cache of one row.

    Args:
      cache: the rows.
      row: a cache of one row, at most as long.
      slot: which row; may be traced.
    """
    if row.rows != 1 or row.reach > cache.reach:
        raise ValueError(
            f"insert needs a cache of 1 row of at most {cache.reach} tokens, not of "
            f"{row.rows} rows of {row.reach}"
        )

    def place(old, new):
        begin = [0] * old.ndim
        begin[ROW] = slot
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), begin)

    return Cache(
        layers=jax.tree.map(place, cache.layers, row.layers),
        length_B=cache.length_B.at[slot].set(row.length_B[0]),
    )


def free(cache: Cache, slot) -> Cache:
    """Returns the cache with row `slot` empty; its old entries are never seen again."""
    return cache._replace(length_B=cache.length_B.at[slot].set(0))


def block(cache: Cache, slot, start, *, size: int) -> tuple[Any, ...]:
    """Returns what row `slot` keeps of `size` tokens from `start` on, both traced."""

    def cut(x):
        row = jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=ROW)
        return jax.lax.dynamic_slice_in_dim(row, start, size, axis=PLACE)

    return jax.tree.map(cut, cache.layers)


def put_block(row: Cache, block: tuple[Any, ...], start) -> Cache:
    """Returns a cache of one row with such a block at `start`; its length stays."""

    def put(x, part):
        return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=PLACE)

    return row._replace(layers=jax.tree.map(put, row.layers, block))


def stretch(cache: Cache, reach: int) -> Cache:
    """Returns the cache with room for `reach` tokens in each row: more, or fewer."""

    def cut(x):
        kept = jax.lax.slice_in_dim(x, 0, min(reach, x.shape[PLACE]), axis=PLACE)
        more = [(0, 0)] * x.ndim
        more[PLACE] = (0, reach - kept.shape[PLACE])
        return jnp.pad(kept, more)

    return cache._replace(layers=jax.tree.map(cut, cache.layers))
