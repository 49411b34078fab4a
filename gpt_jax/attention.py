"""Attention over arrays: rotary positions, who sees whom, implementations.

No parameters live here; `model.Attention` holds them.

Shapes: B batch  T query time  S key time  H query heads  G key/value heads
R query heads per key/value head (H = G R)  K head dim
"""

import functools
import logging
import operator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import names, settings

log = logging.getLogger(__name__)

HIDDEN = -1e30  # the score of a key that may not be seen; finite, so no NaN


# ---------------------------------------------------------------- rotary positions


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than trained on.

    `linear` divides every frequency by `factor` (Chen et al. 2023, section 3.2).
    `llama3` divides the slow ones only: wavelengths above original_context /
    low_freq_factor fully, below original_context / high_freq_factor not at all,
    in between gradually (Llama 3.1's rule).
    """

    kind: str
    factor: float
    low_freq_factor: float = 0.0  # this and the rest: llama3 only
    high_freq_factor: float = 0.0
    original_context: int = 0

    def __post_init__(self):
        settings.fit("rope_scaling", vars(self), settings.declared(RopeScaling))
        names.choose("rope_scaling kind", self.kind, ("linear", "llama3"))
        if self.factor <= 0:
            raise ValueError(f"rope_scaling factor {self.factor} must be above 0")
        if self.kind == "linear":
            if self.low_freq_factor or self.high_freq_factor or self.original_context:
                raise ValueError(
                    "rope_scaling linear reads its factor alone: leave "
                    "low_freq_factor, high_freq_factor and original_context out"
                )
            return
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling llama3 needs 0 < low_freq_factor < high_freq_factor, "
                f"not {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.original_context < 1:
            raise ValueError(
                f"rope_scaling original_context {self.original_context} must be the "
                "context length that the model was first trained on"
            )


class Rotation(NamedTuple):
    """The angles of rotary positions, [B or 1, T, 1, K/2]."""

    cos: jax.Array
    sin: jax.Array


def rope_frequencies(
    head_dim: int, *, base: float, scaling: RopeScaling | None
) -> jax.Array:
    """Returns the angle per position of each pair of features, [K/2] float32."""
    power = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / base**power
    if scaling is None:
        return frequency
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_context * frequency / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    fast_share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return fast_share * frequency + (1 - fast_share) * slow


def rotation(
    position_BT, head_dim: int, *, base: float, scaling: RopeScaling | None
) -> Rotation:
    """Returns the rotation of each position (RoFormer, Su et al. 2021, section 3.2)."""
    frequency = rope_frequencies(head_dim, base=base, scaling=scaling)
    angle = position_BT.astype(jnp.float32)[..., None, None] * frequency
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x_BTHK, turn: Rotation):
    """Rotates feature i with feature i + K/2 by its position's angle, in float32."""
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = (a * turn.cos - b * turn.sin, b * turn.cos + a * turn.sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BTHK.dtype)


# ---------------------------------------------------------------- dropout


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


# ---------------------------------------------------------------- who sees whom


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


class Drop(NamedTuple):
    """Dropout of attention weights: a traced rate and its key."""

    rate: jax.Array | float
    key: jax.Array


# ---------------------------------------------------------------- implementations
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


def _fused(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, implementation):
    window = None
    if sight.window:
        window = (sight.window - 1, 0 if sight.causal else sight.window - 1)
    mask_B1TS = None
    if sight.segment_BT is not None:
        segment_BT = sight.segment_BT
        mask_B1TS = (segment_BT[:, :, None] == segment_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        mask=mask_B1TS,
        scale=scale,
        is_causal=sight.causal,
        local_window_size=window,
        implementation=implementation,
    )


def xla(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout):
    """JAX's own attention."""
    assert not softcap and dropout is None and sight.query_BT is None
    return _fused(q_BTHK, k_BSGK, v_BSGK, sight, scale=scale, implementation="xla")


def cudnn(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout):
    """Flash attention by cuDNN; NVIDIA GPUs and 16-bit floats only."""
    assert not softcap and dropout is None and sight.query_BT is None
    return _fused(q_BTHK, k_BSGK, v_BSGK, sight, scale=scale, implementation="cudnn")


IMPLEMENTATIONS = {"plain": plain, "blocked": blocked, "xla": xla, "cudnn": cudnn}


def choose(
    name: str, q_BTHK, sight: Sight, *, cached: bool, softcap: float, dropout: bool
):
    """Returns the implementation for `name`; "auto" looks at platform and queries.

    A cache needs `plain` (its queries stand anywhere among the keys); JAX's fused
    attention knows neither soft-caps nor dropout; JAX's cuDNN one looks ahead where a
    window is not causal, without an error (jax issue 39576).
    """
    if cached:
        return plain
    if name == "auto":
        name = _best(q_BTHK, sight)
    if name in ("xla", "cudnn") and (softcap or dropout):
        return plain
    if name == "cudnn" and sight.window and not sight.causal:
        return xla
    return IMPLEMENTATIONS[name]


def _best(q_BTHK, sight: Sight) -> str:
    platform = jax.default_backend()
    if platform == "cpu":
        return "blocked" if q_BTHK.shape[1] >= 128 else "plain"
    # Documents would be a mask as large as all the scores, which cuDNN is to avoid.
    if platform != "gpu" or q_BTHK.dtype.itemsize != 2 or sight.segment_BT is not None:
        return "xla"
    works = cudnn_works(str(q_BTHK.dtype), q_BTHK.shape[3], sight.causal, sight.window)
    return "cudnn" if works else "xla"


@functools.cache
def cudnn_works(dtype: str, head_dim: int, causal: bool, window: int) -> bool:
    """Tries cuDNN's attention on this GPU, forward and backward; a warning if not.

    Which shapes it takes depends on the GPU and on the versions of cuDNN and JAX, so
    it is asked for what the model needs, once for each.
    """
    if window and not causal:
        return False
    sight = Sight(causal, window, None, None)
    x_BTHK = np.ones((1, 128, 2, head_dim), dtype)

    def total(x_BTHK):
        how = {"scale": 1.0, "softcap": 0.0, "dropout": None}
        return cudnn(x_BTHK, x_BTHK, x_BTHK, sight, **how).astype(jnp.float32).sum()

    try:  # compiled by hand, since the caller is being traced
        jax.block_until_ready(jax.jit(jax.grad(total)).lower(x_BTHK).compile()(x_BTHK))
    except Exception as error:  # XLA raises whatever cuDNN tells it
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        log.warning(
            "cuDNN attention does not run here (%s head_dim %d: %s); JAX's own is "
            "used, which model.attention=xla asks for",
            *(dtype, head_dim, reason),
        )
        return False
    return True


# ---------------------------------------------------------------- earlier keys, values


def extend(old_BGSK, new_BTGK, slot_BT):
    """Writes new entries into their slots; what falls behind the end is dropped."""
    B, G = old_BGSK.shape[:2]
    # With an index for every head XLA:CPU writes in place also when there is one row.
    where = (jnp.arange(B)[:, None, None], jnp.arange(G), slot_BT[:, :, None])
    return old_BGSK.at[where].set(new_BTGK.astype(old_BGSK.dtype), mode="drop")
