"""Holes in the model: attention and the layers round it.

Shapes: T query time  S key time  D width  H query heads  G key/value heads
R query heads per key/value head  K head dim
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import attention as real_attention
from gpt_jax import configs, model
from gpt_jax import rope as real_rope
from gpt_jax.attention import Sight
from gpt_jax.learn.hole import hole, normal
from gpt_jax.model import layers
from gpt_jax.model.architecture import ACTIVATIONS

EYE = Sight(causal=True, window=0, query_BT=None, segment_BT=None)


@functools.cache
def _cfg(**fields) -> model.GPTConfig:
    options = configs.base().model.to_dict()
    options.update(vocab_size=8, context_length=8, n_layers=1, d_model=6, n_heads=1)
    return model.GPTConfig(**{**options, **fields})


# ---------------------------------------------------------------- softmax and masks


@hole(3, lambda: [(normal(0, 4, 6),), (100 + normal(1, 3, 5),)], grads=(0,))
def softmax(score_TS):
    """Returns weights that add up to 1 over the last axis, also of large scores.

    Args:
      score_TS: float scores.
    """
    return jax.nn.softmax(score_TS, axis=-1)


@softmax.mistake("the softmax is over the wrong axis: each row must add up to 1")
def _(score_TS):
    return jax.nn.softmax(score_TS, axis=0)


@softmax.mistake("exp of a large score overflows: take the largest off first")
def _(score_TS):
    e_TS = jnp.exp(score_TS)
    return e_TS / e_TS.sum(-1, keepdims=True)


@hole(3, lambda: [(5, 0), (6, 3), (4, 1)])
def causal_mask(tokens, window):
    """Returns bool [T, T]: whether the token of a row may see that of a column.

    A token sees itself and what is before it; within a window only the nearest
    `window` tokens, itself included.

    Args:
      tokens: T.
      window: 0 = all before it.
    """
    every = slice(0, tokens)
    found = Sight(True, window, None, None).mask(every, every)
    assert found is not None
    return found[0]


@causal_mask.mistake("off by one: a token must see itself")
def _(tokens, window):
    apart = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    return (apart > 0) & ((window == 0) | (apart <= window))


@causal_mask.mistake("off by one: a token must not see the next one")
def _(tokens, window):
    apart = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    return (apart >= -1) & ((window == 0) | (apart < window))


@causal_mask.mistake("off by one: the window holds `window` tokens, itself included")
def _(tokens, window):
    apart = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    return (apart >= 0) & ((window == 0) | (apart <= window))


@causal_mask.mistake("it is turned: rows are who looks, columns what is looked at")
def _(tokens, window):
    apart = jnp.arange(tokens) - jnp.arange(tokens)[:, None]
    return (apart >= 0) & ((window == 0) | (apart < window))


# ---------------------------------------------------------------- attention


def _single():
    return [tuple(normal(seed, 3, 5, 4)) for seed in (0, 1)]


@hole(3, _single, grads=(0, 1, 2), batched=True)
def attention(q_TK, k_SK, v_SK):
    """Returns what causal attention of one head reads, [T, K].

    softmax(q k^T / sqrt(K)) v, where a token sees itself and those before it.

    Args:
      q_TK: queries.
      k_SK: keys, of as many tokens.
      v_SK: values.
    """
    q, k, v = (x[None, :, None] for x in (q_TK, k_SK, v_SK))
    how = {"scale": q_TK.shape[-1] ** -0.5, "softcap": 0.0, "dropout": None}
    return real_attention.plain(q, k, v, EYE, **how)[0, :, 0]


def _attended(q_TK, k_SK, v_SK, *, scale=None, before=0, axis=-1, masked=True):
    scale = q_TK.shape[-1] ** -0.5 if scale is None else scale
    score_TS = scale * q_TK @ k_SK.T
    seen_TS = jnp.tril(jnp.ones(score_TS.shape, bool), before)
    score_TS = jnp.where(seen_TS | (not masked), score_TS, -1e30)
    return jax.nn.softmax(score_TS, axis=axis) @ v_SK


@attention.mistake("there is no 1 / sqrt(K): scores grow with the size of a head")
def _(q_TK, k_SK, v_SK):
    return _attended(q_TK, k_SK, v_SK, scale=1.0)


@attention.mistake("scores are divided by K, not by sqrt(K)")
def _(q_TK, k_SK, v_SK):
    return _attended(q_TK, k_SK, v_SK, scale=1 / q_TK.shape[-1])


@attention.mistake("the mask is off by one: a token sees the next one")
def _(q_TK, k_SK, v_SK):
    return _attended(q_TK, k_SK, v_SK, before=1)


@attention.mistake("the mask is off by one: a token does not see itself")
def _(q_TK, k_SK, v_SK):
    return _attended(q_TK, k_SK, v_SK, before=-1)


@attention.mistake("the softmax is over the wrong axis: over keys, the last one")
def _(q_TK, k_SK, v_SK):
    return _attended(q_TK, k_SK, v_SK, axis=0)


@attention.mistake("there is no mask: a token sees those behind it")
def _(q_TK, k_SK, v_SK):
    return _attended(q_TK, k_SK, v_SK, masked=False)


@attention.mistake(
    "later tokens are hidden after the softmax: weights no longer add up to 1"
)
def _(q_TK, k_SK, v_SK):
    weight_TS = jax.nn.softmax(q_TK @ k_SK.T * q_TK.shape[-1] ** -0.5)
    return jnp.tril(weight_TS) @ v_SK


def _grouped():
    return [(normal(0, 5, 6, 4), normal(1, 5, 2, 4), normal(2, 5, 2, 4))]


@hole(3, _grouped, grads=(0, 1, 2))
def gqa(q_THK, k_SGK, v_SGK):
    """Returns what grouped-query attention reads, [T, H, K]; causal.

    Query heads 0 to R - 1 share key and value head 0, the next R head 1, and so on,
    with R = H / G. With G = H this is multi-head attention.

    Args:
      q_THK: queries of H heads.
      k_SGK: keys of G heads.
      v_SGK: values of G heads.
    """
    q, k, v = (x[None] for x in (q_THK, k_SGK, v_SGK))
    how = {"scale": q_THK.shape[-1] ** -0.5, "softcap": 0.0, "dropout": None}
    return real_attention.plain(q, k, v, EYE, **how)[0]


def _heads(q_THK, k_SHK, v_SHK, **how):
    one = functools.partial(_attended, **how)
    return jax.vmap(one, in_axes=1, out_axes=1)(q_THK, k_SHK, v_SHK)


@gqa.mistake("neighbours share a head, 000111: yours take turns, 010101")
def _(q_THK, k_SGK, v_SGK):
    times = (1, q_THK.shape[1] // k_SGK.shape[1], 1)
    return _heads(q_THK, jnp.tile(k_SGK, times), jnp.tile(v_SGK, times))


@gqa.mistake("there is no 1 / sqrt(K)")
def _(q_THK, k_SGK, v_SGK):
    times = q_THK.shape[1] // k_SGK.shape[1]
    k_SHK, v_SHK = (jnp.repeat(x, times, 1) for x in (k_SGK, v_SGK))
    return _heads(q_THK, k_SHK, v_SHK, scale=1.0)


@gqa.mistake("there is no mask: a token sees those behind it")
def _(q_THK, k_SGK, v_SGK):
    times = q_THK.shape[1] // k_SGK.shape[1]
    k_SHK, v_SHK = (jnp.repeat(x, times, 1) for x in (k_SGK, v_SGK))
    return _heads(q_THK, k_SHK, v_SHK, masked=False)


def _caches():
    keys, values = normal(0, 6, 4), normal(1, 6, 4)
    new = tuple(normal(2, 3, 4))
    return [(keys, values, jnp.int32(n), *new) for n in (0, 3)]


@hole(3, _caches)
def kv_cache(keys_SK, values_SK, length, q_K, k_K, v_K):
    """Returns (what one new token reads [K], the keys, the values) of one head.

    The first `length` places of the cache hold earlier tokens; what lies behind them is
    anything. The new token is written behind them, and sees them and itself.

    Args:
      keys_SK: the cache, with room for S tokens.
      values_SK: the cache.
      length: int32, how many it holds; traced.
      q_K: the query of the new token.
      k_K: its key.
      v_K: its value.
    """
    at_BT = jnp.reshape(length, (1, 1))
    pairs = ((keys_SK, k_K), (values_SK, v_K))
    keys, values = (
        real_attention.extend(old[None, None], new[None, None, None], at_BT)
        for old, new in pairs
    )
    sight = Sight(True, 0, at_BT, None)
    how = {"scale": q_K.shape[-1] ** -0.5, "softcap": 0.0, "dropout": None}
    rows = (q_K[None, None, None], keys.swapaxes(1, 2), values.swapaxes(1, 2))
    y_BTHK = real_attention.plain(*rows, sight, **how)
    return y_BTHK[0, 0, 0], keys[0, 0], values[0, 0]


def _cached(keys_SK, values_SK, length, q_K, k_K, v_K, *, at=0, sees=0):
    keys_SK = keys_SK.at[length + at].set(k_K)
    values_SK = values_SK.at[length + at].set(v_K)
    score_S = keys_SK @ q_K * q_K.shape[-1] ** -0.5
    score_S = jnp.where(jnp.arange(len(keys_SK)) <= length + sees, score_S, -1e30)
    return jax.nn.softmax(score_S) @ values_SK, keys_SK, values_SK


@kv_cache.mistake("the new token does not see itself")
def _(keys_SK, values_SK, length, q_K, k_K, v_K):
    return _cached(keys_SK, values_SK, length, q_K, k_K, v_K, sees=-1)


@kv_cache.mistake("what lies behind the tokens of the cache is seen: mask it")
def _(keys_SK, values_SK, length, q_K, k_K, v_K):
    return _cached(keys_SK, values_SK, length, q_K, k_K, v_K, sees=len(keys_SK))


@kv_cache.mistake("the new token is written one place too far")
def _(keys_SK, values_SK, length, q_K, k_K, v_K):
    return _cached(keys_SK, values_SK, length, q_K, k_K, v_K, at=1, sees=1)


# ---------------------------------------------------------------- layers


def _normed():
    return [(3 + 2 * normal(s, 4, 6), normal(s + 1, 6), normal(s + 2, 6)) for s in (0,)]


@hole(4, _normed, grads=(0, 1, 2))
def layer_norm(x_TD, scale_D, bias_D):
    """Returns each token's numbers with mean 0 and variance 1, scaled and shifted.

    The variance is the mean of squares (not divided by D - 1), plus 1e-5.

    Args:
      x_TD: float32.
      scale_D: weights.
      bias_D: weights.
    """
    cfg = _cfg(norm="layernorm", norm_eps=1e-5, norm_bias=True, norm_scale=True)
    params = {"scale": scale_D, "bias": bias_D}
    made: jax.Array = layers.Norm(("embed",), "layernorm", cfg).apply(  # type: ignore
        {"params": params}, x_TD
    )
    return made


def _layer_normed(x, scale, bias, axis=-1, ddof=0, centred=True, eps=1e-5):
    y = x - x.mean(axis, keepdims=True) * centred
    return y / jnp.sqrt(x.var(axis, keepdims=True, ddof=ddof) + eps) * scale + bias


layer_norm.mistake("the mean is over the tokens: take it over the last axis")(
    lambda x_TD, scale_D, bias_D: _layer_normed(x_TD, scale_D, bias_D, axis=0)
)
layer_norm.mistake("the variance is divided by D - 1: it must be D (ddof=0)")(
    lambda x_TD, scale_D, bias_D: _layer_normed(x_TD, scale_D, bias_D, ddof=1)
)
layer_norm.mistake("the mean is not taken off")(
    lambda x_TD, scale_D, bias_D: _layer_normed(x_TD, scale_D, bias_D, centred=False)
)
layer_norm.mistake("scale and bias are not used")(
    lambda x_TD, scale_D, bias_D: _layer_normed(x_TD, 1, 0)
)


@hole(4, lambda: [(3 + normal(0, 4, 6), normal(1, 6))], grads=(0, 1))
def rms_norm(x_TD, scale_D):
    """Returns each token's numbers divided by the root of their mean square, scaled.

    1e-5 is added to the mean square. Nothing is centred.

    Args:
      x_TD: float32.
      scale_D: weights.
    """
    cfg = _cfg(norm="rmsnorm", norm_eps=1e-5, norm_scale=True, norm_offset=0.0)
    made: jax.Array = layers.Norm(("embed",), "rmsnorm", cfg).apply(  # type: ignore
        {"params": {"scale": scale_D}}, x_TD
    )
    return made


rms_norm.mistake("the mean was taken off: that is LayerNorm")(
    lambda x_TD, scale_D: _layer_normed(x_TD, scale_D, 0)
)
rms_norm.mistake("the mean of the squares is wanted, not their sum")(
    lambda x_TD, scale_D: (
        x_TD * scale_D / jnp.sqrt(jnp.square(x_TD).sum(-1, keepdims=True) + 1e-5)
    )
)
rms_norm.mistake("the square root is missing")(
    lambda x_TD, scale_D: (
        x_TD * scale_D / (jnp.square(x_TD).mean(-1, keepdims=True) + 1e-5)
    )
)


@hole(4, lambda: [(3 * normal(0, 20),)], grads=(0,), batched=False)
def gelu(x):
    """Returns GELU as GPT-2 has it: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

    Args:
      x: any float array.
    """
    return ACTIVATIONS["gelu_tanh"](x)


def _gelu(x, outer=True, cube=0.044715, root=True):
    inside = (2 / jnp.pi) ** (0.5 if root else 1) * (x + cube * x**3)
    return 0.5 * (x if outer else 1) * (1 + jnp.tanh(inside))


gelu.mistake("the root of 2 / pi is wanted")(lambda x: _gelu(x, root=False))
gelu.mistake("the factor x is missing")(lambda x: _gelu(x, outer=False))
gelu.mistake("the cube is missing")(lambda x: _gelu(x, cube=0.0))


def _turned():
    at = jnp.asarray([0, 3, 1, 7], jnp.int32)
    return [(normal(0, 4, 8), at, 10000.0), (normal(1, 4, 8), at + 5, 100.0)]


@hole(4, _turned, grads=(0,))
def rope(x_TK, position_T, base):
    """Returns queries or keys turned by their positions (rotary positions).

    Feature i is turned with feature i + K/2 by the angle position / base^(2i / K):
    (a, b) becomes (a cos - b sin, b cos + a sin).

    Args:
      x_TK: float32; K is even.
      position_T: int.
      base: how slow the slowest turn is.
    """
    turn = real_rope.rotation(position_T[None], x_TK.shape[-1], base=base, scaling=None)
    return real_rope.rotate(x_TK[None, :, None], turn)[0, :, 0]


def _roped(x_TK, position_T, base, *, sign=1, pairs=False, double=2):
    half = x_TK.shape[-1] // 2
    angle = position_T[:, None] / base ** (double * jnp.arange(half) / (2 * half))
    cos, sin = jnp.cos(angle), sign * jnp.sin(angle)
    a, b = (x_TK[:, ::2], x_TK[:, 1::2]) if pairs else jnp.split(x_TK, 2, -1)
    made = (a * cos - b * sin, b * cos + a * sin)
    if pairs:
        return jnp.stack(made, -1).reshape(x_TK.shape)
    return jnp.concatenate(made, -1)


rope.mistake(
    "feature i is paired with i + K/2: yours pairs neighbours, 2i with 2i + 1"
)(lambda x_TK, position_T, base: _roped(x_TK, position_T, base, pairs=True))
rope.mistake("it turns the other way round: check the signs")(
    lambda x_TK, position_T, base: _roped(x_TK, position_T, base, sign=-1)
)
rope.mistake("the power is 2i / K, with i from 0 to K/2: yours is half of it")(
    lambda x_TK, position_T, base: _roped(x_TK, position_T, base, double=1)
)
rope.mistake("every token is turned by its place in the row: use its position")(
    lambda x_TK, position_T, base: _roped(x_TK, np.arange(len(x_TK)), base)
)
