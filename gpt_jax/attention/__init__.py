"""Attention over arrays: its mathematics, and which implementation of it is best.

No parameters live here; `model.Attention` holds them.

Shapes: B batch  T query time  S key time  H query heads  G key/value heads
R query heads per key/value head (H = G R)  K head dim
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax import mesh, native
from gpt_jax.attention.fused import TILE, cudnn, cudnn_works, splash, xla
from gpt_jax.attention.sight import HIDDEN, Sight
from gpt_jax.attention.stream import streamed
from gpt_jax.dropout import Drop, drop

# All take (q_BTHK, k_BSGK, v_BSGK, sight) and return [B, T, H, K].


def _block(q_BTHK, k_BSGK, v_BSGK, mask_BTS, *, scale, softcap, dropout):
    """softmax(q k scale) v, scores and softmax in float32."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    score_BGRTS = scale * jnp.einsum(
        "BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32
    )
    if softcap:
        score_BGRTS = softcap * jnp.tanh(score_BGRTS / softcap)
    if mask_BTS is not None:
        score_BGRTS = jnp.where(mask_BTS[:, None, None], score_BGRTS, HIDDEN)
    weight_BGRTS = jax.nn.softmax(score_BGRTS).astype(v_BSGK.dtype)
    if dropout is not None:
        weight_BGRTS = drop(weight_BGRTS, dropout.rate, dropout.key)
    # In this order the products read the keys and values of a cache as they lie.
    y_BGRTK = jnp.einsum("BGRTS,BSGK->BGRTK", weight_BGRTS, v_BSGK)
    return y_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def plain(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout):
    """Every query against every key: the reference."""
    mask_BTS = sight.mask(slice(0, q_BTHK.shape[1]), slice(0, k_BSGK.shape[1]))
    how = {"scale": scale, "softcap": softcap, "dropout": dropout}
    return _block(q_BTHK, k_BSGK, v_BSGK, mask_BTS, **how)


def blocked(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout):
    """Blocks of queries, each against the only keys that it can see.

    Half the work of `plain` for causal attention, less within a window.
    """
    T = q_BTHK.shape[1]
    size = -(-T // 4) if T <= 512 else 128
    ys = []
    for i, start in enumerate(range(0, T, size)):
        stop = min(start + size, T)
        queries = slice(start, stop)
        first = max(0, start - sight.window + 1) if sight.window else 0
        last = stop if sight.causal else T
        if sight.window and not sight.causal:
            last = min(T, stop + sight.window - 1)
        keys = slice(first, last)
        own = dropout and Drop(dropout.rate, jax.random.fold_in(dropout.key, i))
        rows = (q_BTHK[:, queries], k_BSGK[:, keys], v_BSGK[:, keys])
        mask_BTS = sight.mask(queries, keys)
        ys.append(_block(*rows, mask_BTS, scale=scale, softcap=softcap, dropout=own))
    return jnp.concatenate(ys, axis=1)


# ---------------------------------------------------------------- which one

IMPLEMENTATIONS = {
    **{"plain": plain, "blocked": blocked, "streamed": streamed},
    **{"xla": xla, "cudnn": cudnn, "splash": splash},
}
NATIVE = "native"  # as auto, and our own kernel reads a cache on a CPU
KNOW_SOFTCAPS = ("plain", "blocked", "streamed", "splash")
KNOW_DROPOUT = ("plain", "blocked")
LONG = 2048  # from more tokens on, scores are not kept for the backward pass


def natively(cfg: Any) -> bool:
    """Returns whether a kernel of ours reads the cache of a model (a `GPTConfig`)."""
    return cfg.attention == NATIVE and native.attends(cfg)


def choose(
    name: str, q_BTHK, k_BSGK, sight: Sight, *, cached: bool, softcap: float, dropout
):
    """Returns the implementation for `name`; "auto" looks at platform and queries.

    A cache that no kernel of ours reads needs `plain` (its queries stand anywhere among
    the keys). What knows no soft-caps or no dropout gives way to `plain`, and JAX's
    cuDNN attention to its own where a window is not causal: it would look ahead,
    without an error (jax issue 39576).
    """
    if cached:
        return plain
    if name in ("auto", NATIVE):
        name = best(
            mesh.platform(),
            tokens=q_BTHK.shape[1],
            halves=q_BTHK.dtype.itemsize == 2,
            softcap=bool(softcap),
            dropout=dropout,
            cudnn=lambda: cudnn_works(
                str(q_BTHK.dtype),
                q_BTHK.shape[1:],
                k_BSGK.shape[2],
                sight.causal,
                sight.window,
                sight.segment_BT is not None,
            ),
        )
    blind = (softcap and name not in KNOW_SOFTCAPS) or (
        dropout and name not in KNOW_DROPOUT
    )
    if blind:
        return plain
    if name == "cudnn" and sight.window and not sight.causal:
        return xla
    return IMPLEMENTATIONS[name]


def best(
    platform: str,
    *,
    tokens: int,
    halves: bool,
    softcap: bool,
    dropout: bool,
    cudnn: Callable[[], bool],
) -> str:
    """Returns the fastest implementation.

    Args:
      platform: cpu, gpu or tpu.
      tokens: of a row.
      halves: queries are 16-bit floats.
      softcap, dropout: there is one.
      cudnn: whether cuDNN takes the shapes; asked where it would be best.
    """
    if platform == "tpu" and tokens >= TILE and not dropout:
        return "splash"
    if platform == "gpu" and halves and not softcap and not dropout and cudnn():
        return "cudnn"
    if tokens > LONG and not dropout:
        return "streamed"
    if platform == "cpu":
        return "blocked" if tokens >= 128 else "plain"
    return "xla"


# ---------------------------------------------------------------- earlier keys, values


def extend(old_BGSK, new_BTGK, slot_BT):
    """Writes new entries into their slots; what falls behind the end is dropped."""
    if old_BGSK.dtype == jnp.bfloat16 and mesh.platform() == "cpu":
        # XLA:CPU would write all of it anew, as float32 and back.
        bits = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
        new_BTGK = bits(new_BTGK.astype(jnp.bfloat16))
        found = extend(bits(old_BGSK), new_BTGK, slot_BT)
        return jax.lax.bitcast_convert_type(found, jnp.bfloat16)
    B, G = old_BGSK.shape[:2]
    # With an index for every head XLA:CPU writes in place also when there is one row.
    where = (jnp.arange(B)[:, None, None], jnp.arange(G), slot_BT[:, :, None])
    return old_BGSK.at[where].set(new_BTGK.astype(old_BGSK.dtype), mode="drop")
