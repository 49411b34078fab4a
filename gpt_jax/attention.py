"""Attention over arrays: rotary positions, who sees whom, implementations.

No parameters live here; `model.Attention` holds them.

Shapes: B batch  T query time  S key time  H query heads  G key/value heads
R query heads per key/value head (H = G R)  K head dim
"""

import functools
import logging
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gpt_jax import mesh, names, settings

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
    `yarn` leaves features alone that turn more than beta_fast times within
    original_context, divides those that turn less than beta_slow times, and goes from
    one to the other evenly over the features between (Peng et al. 2023, section 3.2).
    `longrope` divides each frequency by a number of its own, found by search, which
    holds for texts within original_context (Ding et al. 2024, section 3.2).

    The last two also multiply what is turned by attention_factor; 0 = as the papers
    say, of how many times the context is stretched: `factor`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_context: int = 0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    attention_factor: float = 0.0
    short_factors: tuple[float, ...] = ()

    def __post_init__(self):
        settings.fit("rope_scaling", vars(self), settings.declared(RopeScaling))
        names.choose("rope_scaling kind", self.kind, tuple(SCALING_READS))
        object.__setattr__(self, "short_factors", tuple(self.short_factors))
        if self.factor <= 0:
            raise ValueError(f"rope_scaling factor {self.factor} must be above 0")
        reads = {"kind", "factor", *SCALING_READS[self.kind]}
        if unread := [k for k, x in vars(self).items() if x and k not in reads]:
            raise ValueError(
                f"rope_scaling {self.kind} does not read {unread[0]}: leave it out"
            )
        for low, high in (
            ("low_freq_factor", "high_freq_factor"),
            ("beta_slow", "beta_fast"),
        ):
            if low in reads and not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"rope_scaling {self.kind} needs 0 < {low} < {high}, not "
                    f"{getattr(self, low)} and {getattr(self, high)}"
                )
        least = 2 if self.kind == "longrope" else 1
        if "original_context" in reads and self.original_context < least:
            raise ValueError(
                f"rope_scaling original_context {self.original_context} must be the "
                "context length that the model was first trained on"
            )
        if self.attention_factor < 0:
            raise ValueError(
                f"rope_scaling attention_factor {self.attention_factor} is below 0; 0 "
                "means as the paper says"
            )
        if self.kind == "longrope" and not all(x > 0 for x in self.short_factors):
            raise ValueError("rope_scaling short_factors must be numbers above 0")

    @property
    def size(self) -> float:
        """What features that are turned are multiplied by."""
        if self.attention_factor or self.factor <= 1:
            return self.attention_factor or 1.0
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1  # section 3.4
        if self.kind == "longrope":
            longer = math.log(self.factor) / math.log(self.original_context)
            return math.sqrt(1 + longer)
        return 1.0


# What each kind reads beside its factor.
SCALING_READS = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_context"),
    "yarn": ("original_context", "beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("original_context", "short_factors", "attention_factor"),
}


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
    if scaling.kind == "longrope":
        return frequency / jnp.asarray(scaling.short_factors, jnp.float32)
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "yarn":
        slow_share = _yarn_ramp(head_dim, base, scaling)
        return slow_share * slow + (1 - slow_share) * frequency
    turns = scaling.original_context * frequency / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    fast_share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return fast_share * frequency + (1 - fast_share) * slow


def _yarn_ramp(head_dim: int, base: float, scaling: RopeScaling) -> jax.Array:
    """Returns how much of each pair's frequency is divided, from 0 to 1, [K/2]."""

    def pair(turns: float) -> float:
        """Returns which pair of features turns so often within the first context."""
        length = scaling.original_context / (2 * math.pi * turns)
        return head_dim * math.log(length) / (2 * math.log(base))

    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), head_dim - 1)
    width = last - first or 0.001  # then it is a step
    pairs_P = jnp.arange(head_dim // 2, dtype=jnp.float32)
    return jnp.clip((pairs_P - first) / width, 0.0, 1.0)


def rotation(
    position_BT, features: int, *, base: float, scaling: RopeScaling | None
) -> Rotation:
    """Returns the rotation of each position (RoFormer, Su et al. 2021, section 3.2).

    Of the first `features` of every head: all, or some (Black et al. 2022, section
    2.2.1, "GPT-NeoX-20B").
    """
    frequency_F = rope_frequencies(features, base=base, scaling=scaling)
    position_BT11 = position_BT.astype(jnp.float32)[..., None, None]
    angle_BT1F = position_BT11 * frequency_F[None, None, None]
    turn = Rotation(jnp.cos(angle_BT1F), jnp.sin(angle_BT1F))
    if scaling is None or scaling.size == 1.0:
        return turn
    return Rotation(*(scaling.size * x for x in turn))


def rotate(x_BTHK, turn: Rotation):
    """Rotates feature i with feature i + R/2 by its position's angle, in float32.

    R is how many features the rotation is of; those behind them stay as they are.
    """
    half = turn.cos.shape[-1]
    cuts = 2 if 2 * half == x_BTHK.shape[-1] else (half, 2 * half)
    a, b, *rest = jnp.split(x_BTHK.astype(jnp.float32), cuts, axis=-1)
    turned = (a * turn.cos - b * turn.sin, b * turn.cos + a * turn.sin, *rest)
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


def xla(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout):
    """JAX's own attention."""
    assert not softcap and dropout is None and sight.query_BT is None
    return _fused(q_BTHK, k_BSGK, v_BSGK, sight, scale=scale, implementation="xla")


def cudnn(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout):
    """Flash attention by cuDNN; NVIDIA GPUs and 16-bit floats only.

    Its backward pass refuses an odd number of tokens: one more is put behind the last,
    which no other sees.
    """
    assert not softcap and dropout is None and sight.query_BT is None
    T = q_BTHK.shape[1]
    rows, sight = _filled((q_BTHK, k_BSGK, v_BSGK), sight, to=2)
    q_BTHK, k_BSGK, v_BSGK = _split_heads(*rows)
    how = {"scale": scale, "implementation": "cudnn"}
    return _fused(q_BTHK, k_BSGK, v_BSGK, sight, **how)[:, :T]


def _fused(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, implementation):
    window = None
    if sight.window:
        window = (sight.window - 1, 0 if sight.causal else sight.window - 1)
    mask_B1TS = None
    if sight.segment_BT is not None:
        segment_BT = sight.segment_BT
        mask_B1TS = (segment_BT[:, :, None] == segment_BT[:, None, :])[:, None]
    # JAX asks the rules of promotion for the type of its scores.
    with jax.numpy_dtype_promotion("standard"):
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


def splash(
    q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout, interpret=False
):
    """Flash attention by JAX's kernel for TPUs (Pallas); no scores in memory.

    Args: as of all; interpret runs the kernel's steps one by one, on any device.
    """
    assert dropout is None and sight.query_BT is None
    # Imported late: it takes a second, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    T = q_BTHK.shape[1]
    rows, sight = _filled((q_BTHK, k_BSGK, v_BSGK), sight, to=TILE)
    rows = _split_heads(rows[0] * jnp.asarray(scale, q_BTHK.dtype), *rows[1:])
    length = rows[0].shape[1]
    size = next(n for n in (512, 384, 256, TILE) if length % n == 0)
    near = sight.window - 1 if sight.window else None
    mask = masks.LocalMask(
        (length, length), (near, 0 if sight.causal else near), offset=0
    )

    def local(q_BTHK, k_BSGK, v_BSGK, *segments):
        kernel = kernels.make_splash_mha(
            mask=masks.MultiHeadMask([mask] * q_BTHK.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=kernels.BlockSizes(
                **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), size),
                **dict.fromkeys(("block_q_dkv", "block_kv_dkv"), size),
                **dict.fromkeys(("block_kv_dkv_compute",), size),
                **dict.fromkeys(("block_q_dq", "block_kv_dq"), size),
            ),
            attn_logits_soft_cap=softcap or None,
            residual_checkpoint_name="attn_out",
            interpret=interpret,
        )
        rows = [x.transpose(0, 2, 1, 3) for x in (q_BTHK, k_BSGK, v_BSGK)]
        ids = [kernels.SegmentIds(segment_BT, segment_BT) for segment_BT in segments]
        y_BHTK: Any = jax.vmap(kernel)(*rows, *ids)
        return y_BHTK.transpose(0, 2, 1, 3)

    documents = () if sight.segment_BT is None else (sight.segment_BT,)
    return mesh.by_heads(local, heads=3, rows=len(documents))(*rows, *documents)[:, :T]


TILE = 128  # tokens in a block of splash's, or a multiple of it


def _filled(rows, sight: Sight, *, to: int):
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


def _split_heads(q_BTHK, k_BSGK, v_BSGK):
    """Returns the same with all heads split alike over the mesh in sight.

    Where there are fewer key and value heads than devices to split them over, each
    stands as often as it is needed.
    """
    tensor = mesh.length("tensor")
    times = tensor // math.gcd(k_BSGK.shape[2], tensor)
    if times > 1:
        k_BSGK, v_BSGK = (jnp.repeat(x, times, axis=2) for x in (k_BSGK, v_BSGK))
    rows = (q_BTHK, k_BSGK, v_BSGK)
    return tuple(mesh.constrained(x, mesh.EXAMPLES, None, "tensor") for x in rows)


# ---------------------------------------------------------------- long contexts

BLOCK = 512  # queries, and keys, whose scores exist at once


def streamed(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout):
    """Blocks of keys go by with a running softmax: memory grows with T, not with T^2.

    Forward and backward pass of FlashAttention-2 (Dao 2023, algorithms 1 and 2).
    """
    assert dropout is None and sight.query_BT is None
    T, (B, _, G, K) = q_BTHK.shape[1], k_BSGK.shape
    rows, sight = _filled((q_BTHK, k_BSGK, v_BSGK), sight, to=min(BLOCK, T))
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


# ---------------------------------------------------------------- which one

IMPLEMENTATIONS = {
    **{"plain": plain, "blocked": blocked, "streamed": streamed},
    **{"xla": xla, "cudnn": cudnn, "splash": splash},
}
KNOW_SOFTCAPS = ("plain", "blocked", "streamed", "splash")
KNOW_DROPOUT = ("plain", "blocked")
LONG = 2048  # from more tokens on, scores are not kept for the backward pass


def choose(
    name: str, q_BTHK, k_BSGK, sight: Sight, *, cached: bool, softcap: float, dropout
):
    """Returns the implementation for `name`; "auto" looks at platform and queries.

    A cache needs `plain` (its queries stand anywhere among the keys). What knows no
    soft-caps or no dropout gives way to `plain`, and JAX's cuDNN attention to its own
    where a window is not causal: it would look ahead, without an error (jax issue
    39576).
    """
    if cached:
        return plain
    if name == "auto":
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


@functools.cache
def cudnn_works(
    dtype: str,
    queries: tuple[int, int, int],
    kv_heads: int,
    causal: bool,
    window: int,
    packed: bool,
) -> bool:
    """Tries cuDNN's attention on this GPU, forward and backward; a warning if not.

    Which shapes it takes depends on the GPU and on the versions of cuDNN and JAX, so
    it is asked for what the model needs, once for each. Of a GPU that is not there
    (see `mesh.platform`) JAX's own rules alone are asked.

    Args:
      dtype: of queries, keys and values.
      queries: tokens, heads, features of a head.
      kv_heads: key and value heads.
      causal, window: see Sight.
      packed: rows hold several documents.
    """
    if window and not causal:
        return False
    T, H, K = queries
    documents: Any = np.zeros((1, T), np.int32) if packed else None
    sight = Sight(causal, window, None, documents)
    q_BTHK, k_BSGK = np.ones((1, T, H, K), dtype), np.ones((1, T, kv_heads, K), dtype)

    def total(q_BTHK, k_BSGK):
        how = {"scale": 1.0, "softcap": 0.0, "dropout": None}
        y_BTHK = cudnn(q_BTHK, k_BSGK, k_BSGK, sight, **how)
        return y_BTHK.astype(jnp.float32).sum()

    try:  # compiled by hand, since the caller is being traced; on one device
        with jax.sharding.use_abstract_mesh(mesh.NONE):
            traced = jax.jit(jax.grad(total)).trace(q_BTHK, k_BSGK)
        if jax.default_backend() == "gpu":
            run = traced.lower().compile()
            jax.block_until_ready(run(q_BTHK, k_BSGK))
    except Exception as error:  # XLA raises whatever cuDNN tells it
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        log.warning(
            "cuDNN attention does not run here (%s, tokens x heads x head_dim %s: %s); "
            "JAX's own is used, which model.attention=xla asks for",
            *(dtype, "x".join(map(str, queries)), reason),
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
