"""Attention to long contexts: blocks of keys go by with a running softmax.

Shapes: B batch  T query time  S key time  H query heads  G key/value heads
R query heads per key/value head (H = G R)  K head dim
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gpt_jax.attention.sight import HIDDEN, Sight, filled

BLOCK = 512  # queries, and keys, whose scores exist at once


def streamed(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout):
    """Blocks of keys go by with a running softmax: memory grows with T, not with T^2.

    Forward and backward pass of FlashAttention-2 (Dao 2023, algorithms 1 and 2).
    """
    assert dropout is None and sight.query_BT is None
    T, (B, _, G, K) = q_BTHK.shape[1], k_BSGK.shape
    rows, sight = filled((q_BTHK, k_BSGK, v_BSGK), sight, to=min(BLOCK, T))
    q_BTHK, k_BSGK, v_BSGK = rows
    q_BTGRK = q_BTHK.reshape(B, q_BTHK.shape[1], G, -1, K)
    fixed = _Stream(sight.causal, sight.window, float(scale), float(softcap))
    y_BTGRK: Any = _streamed(fixed, q_BTGRK, k_BSGK, v_BSGK, sight.segment_BT)
    return y_BTGRK.reshape(q_BTHK.shape)[:, :T]


class _Stream(NamedTuple):
    """What is fixed of a streamed attention."""

    causal: bool
    window: int
    scale: float
    softcap: float

    def first(self, i, size: int):
        """Returns the first block of keys that block i of queries can see."""
        return (
            jnp.maximum(0, (i * size - self.window + 1) // size) if self.window else 0
        )

    def last(self, i, size: int, blocks: int):
        """Returns the block of keys behind the last one that they can see."""
        if self.causal:
            return i + 1
        if not self.window:
            return blocks
        return jnp.minimum(blocks, ((i + 1) * size + self.window - 2) // size + 1)

    def scores(self, q_BTGRK, k_BSGK, i, j, size: int, segment_BT):
        """Returns (scores, capped but not masked; what may be seen) of two blocks."""
        s_BGRTS = self.scale * jnp.einsum(
            "BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32
        )
        if self.softcap:
            s_BGRTS = self.softcap * jnp.tanh(s_BGRTS / self.softcap)
        place = jnp.arange(size)
        query_T1, key_1S = (i * size + place)[:, None], (j * size + place)[None]
        seen = jnp.ones((size, size), bool)
        if self.causal:
            seen &= key_1S <= query_T1
        if self.window:
            seen &= key_1S > query_T1 - self.window
        if self.window and not self.causal:
            seen &= key_1S < query_T1 + self.window
        seen_B11TS = seen[None, None, None]
        if segment_BT is not None:
            ours_BT, theirs_BS = (_part(segment_BT, n, size) for n in (i, j))
            same_BTS = ours_BT[:, :, None] == theirs_BS[:, None, :]
            seen_B11TS = seen_B11TS & same_BTS[:, None, None]
        return s_BGRTS, seen_B11TS


def _part(x, n, size: int):
    """Returns block n of the tokens of x [B, T, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, n * size, size, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _streamed(fixed: _Stream, q_BTGRK, k_BSGK, v_BSGK, segment_BT):
    return _streamed_forward(fixed, q_BTGRK, k_BSGK, v_BSGK, segment_BT)[0]


def _streamed_forward(fixed, q_BTGRK, k_BSGK, v_BSGK, segment_BT):
    B, T, G, R, K = q_BTGRK.shape
    size = min(BLOCK, T)
    blocks = T // size

    def queries(i):
        q_BTGRK_i = _part(q_BTGRK, i, size)

        def keys(j, carry):
            most, total, sum_BGRTK = carry
            s_BGRTS, seen = fixed.scores(
                q_BTGRK_i, _part(k_BSGK, j, size), i, j, size, segment_BT
            )
            s_BGRTS = jnp.where(seen, s_BGRTS, HIDDEN)
            higher = jnp.maximum(most, s_BGRTS.max(-1))
            p_BGRTS = jnp.where(seen, jnp.exp(s_BGRTS - higher[..., None]), 0)
            shrink = jnp.exp(most - higher)
            v_BSGK_j = _part(v_BSGK, j, size)
            grown = jnp.einsum(
                "BGRTS,BSGK->BGRTK",
                p_BGRTS.astype(v_BSGK_j.dtype),
                v_BSGK_j,
                preferred_element_type=jnp.float32,
            )
            total = total * shrink + p_BGRTS.sum(-1)
            return higher, total, sum_BGRTK * shrink[..., None] + grown

        low = jnp.full((B, G, R, size), HIDDEN)
        start = (low, jnp.zeros_like(low), jnp.zeros((B, G, R, size, K)))
        first, last = fixed.first(i, size), fixed.last(i, size, blocks)
        most, total, sum_BGRTK = jax.lax.fori_loop(first, last, keys, start)
        y_BGRTK = sum_BGRTK / total[..., None]
        return y_BGRTK.astype(q_BTGRK.dtype), most + jnp.log(total)

    y_nBGRTK, norm_nBGRT = jax.lax.map(queries, jnp.arange(blocks))
    # [n, B, G, R, t, K] -> [B, n t, G, R, K]
    y_BTGRK = y_nBGRTK.transpose(1, 0, 4, 2, 3, 5).reshape(q_BTGRK.shape)
    y_BTGRK = checkpoint_name(y_BTGRK, "attn_out")
    norm_nBGRT = checkpoint_name(norm_nBGRT, "attn_out")
    return y_BTGRK, (q_BTGRK, k_BSGK, v_BSGK, segment_BT, y_BTGRK, norm_nBGRT)


def _streamed_backward(fixed, kept, dy_BTGRK):
    q_BTGRK, k_BSGK, v_BSGK, segment_BT, y_BTGRK, norm_nBGRT = kept
    T = q_BTGRK.shape[1]
    size = min(BLOCK, T)
    blocks = T // size
    products = {"preferred_element_type": jnp.float32}

    def queries(carry, i):
        q_i, y_i, dy_i = (_part(x, i, size) for x in (q_BTGRK, y_BTGRK, dy_BTGRK))
        norm_BGRT1 = norm_nBGRT[i][..., None]
        pull_BTGR = (dy_i.astype(jnp.float32) * y_i.astype(jnp.float32)).sum(-1)
        pull_BGRT1 = pull_BTGR.transpose(0, 2, 3, 1)[..., None]

        def keys(j, carry):
            dk_BSGK, dv_BSGK, dq_BTGRK = carry
            k_j, v_j = _part(k_BSGK, j, size), _part(v_BSGK, j, size)
            s_BGRTS, seen = fixed.scores(q_i, k_j, i, j, size, segment_BT)
            p_BGRTS = jnp.where(seen, jnp.exp(s_BGRTS - norm_BGRT1), 0)
            dv_j = jnp.einsum(
                "BGRTS,BTGRK->BSGK", p_BGRTS.astype(dy_i.dtype), dy_i, **products
            )
            dp_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", dy_i, v_j, **products)
            ds_BGRTS = p_BGRTS * (dp_BGRTS - pull_BGRT1) * fixed.scale
            if fixed.softcap:
                ds_BGRTS *= 1 - jnp.square(s_BGRTS / fixed.softcap)
            ds_BGRTS = ds_BGRTS.astype(q_i.dtype)
            dq_j = jnp.einsum("BGRTS,BSGK->BTGRK", ds_BGRTS, k_j, **products)
            dk_j = jnp.einsum("BGRTS,BTGRK->BSGK", ds_BGRTS, q_i, **products)
            added = (
                jax.lax.dynamic_update_slice_in_dim(
                    x, _part(x, j, size) + new, j * size, axis=1
                )
                for x, new in ((dk_BSGK, dk_j), (dv_BSGK, dv_j))
            )
            return *added, dq_BTGRK + dq_j

        first, last = fixed.first(i, size), fixed.last(i, size, blocks)
        start = (*carry, jnp.zeros(q_i.shape))
        dk_BSGK, dv_BSGK, dq_i = jax.lax.fori_loop(first, last, keys, start)
        return (dk_BSGK, dv_BSGK), dq_i.astype(q_BTGRK.dtype)

    none = (jnp.zeros(k_BSGK.shape), jnp.zeros(v_BSGK.shape))
    (dk, dv), dq_nBTGRK = jax.lax.scan(queries, none, jnp.arange(blocks))
    dq_BTGRK = jnp.moveaxis(dq_nBTGRK, 0, 1).reshape(q_BTGRK.shape)
    return dq_BTGRK, dk.astype(k_BSGK.dtype), dv.astype(v_BSGK.dtype), None


_streamed.defvjp(_streamed_forward, _streamed_backward)
