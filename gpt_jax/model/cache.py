"""What a model remembers of the tokens of each row; its layers make it and own it.

Of what a layer keeps nothing is known here but two axes: which row an entry is of, and
at which place of the row its token stands.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ROW, PLACE = 0, 2  # these axes of every array that a layer keeps
COPIED = 128  # places that are copied at a time


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

    What is copied are the tokens that are there, a few at a time: a copy of the whole
    row would take as long as its prompt.

    Args:
      cache: the rows.
      row: a cache of one row; what it holds fits into the other.
      slot: which row; may be traced.
    """
    if row.rows != 1:
        raise ValueError(f"insert needs a cache of 1 row, not of {row.rows} rows")
    most = min(cache.reach, row.reach)
    size = min(COPIED, most)

    def copy(i, layers):
        start = jnp.minimum(i * size, most - size)

        def place(old, new):
            begin, part = [0] * old.ndim, [*new.shape]
            begin[PLACE], part[PLACE] = start, size
            some = jax.lax.dynamic_slice(new, begin, part).astype(old.dtype)
            begin[ROW] = slot
            return jax.lax.dynamic_update_slice(old, some, begin)

        return jax.tree.map(place, layers, row.layers)

    count = -(-row.length_B[0] // size)
    return Cache(
        layers=jax.lax.fori_loop(0, count, copy, cache.layers),
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
