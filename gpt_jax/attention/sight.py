"""Who sees whom: which keys each query reads.

Shapes: B batch  T query time  S key time
"""

import operator
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # the score of a key that may not be seen; finite, so no NaN


class Sight(NamedTuple):
    """Which keys each query sees; no layer's weights have a say in it."""

    causal: bool
    window: int  # how many of the nearest keys, the query's own included; 0 = all
    query_BT: jax.Array | None  # each query's slot among the keys; None = 0, 1, ...
    segment_BT: jax.Array | None  # the document of each query and of the same key

    def mask(self, queries: slice, keys: slice):
        """Returns bool [B or 1, T, S] of these queries and keys; None = see all."""
        key = jnp.arange(keys.start, keys.stop)[None, None, :]
        if self.query_BT is None:
            query = jnp.arange(queries.start, queries.stop)[None, :, None]
        else:
            query = self.query_BT[:, queries, None]
        rules = []
        if self.causal:
            rules.append(key <= query)
        if self.window:
            rules.append(key > query - self.window)
        if self.window and not self.causal:
            rules.append(key < query + self.window)
        if self.segment_BT is not None:
            document_BT, document_BS = (
                self.segment_BT[:, queries],
                self.segment_BT[:, keys],
            )
            rules.append(document_BT[:, :, None] == document_BS[:, None, :])
        return reduce(operator.and_, rules) if rules else None


def filled(rows, sight: Sight, *, to: int):
    """Returns queries, keys and values with a multiple of `to` tokens, and the sight.

    No token sees those behind the end: they come later, or are a document apart.
    """
    more = -rows[0].shape[1] % to
    if not more:
        return rows, sight
    if not sight.causal or sight.segment_BT is not None:
        B, T = rows[0].shape[:2]
        segment_BT = jnp.zeros((B, T), jnp.int32)
        if sight.segment_BT is not None:
            segment_BT = sight.segment_BT
        apart = segment_BT.max(axis=1, keepdims=True) + 1
        segment_BT = jnp.concatenate([segment_BT, jnp.repeat(apart, more, 1)], 1)
        sight = sight._replace(segment_BT=segment_BT)
    return tuple(jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in rows), sight
