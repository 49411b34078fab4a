"""The layers that a block is made of.

Shapes: B batch  T time  S key time  D width  H heads  G key/value heads  K head dim
F width inside the MLP  V vocabulary  N rows, of whatever axes
"""

import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gpt_jax import attention, native, quantised, rope, weights
from gpt_jax.attention import Sight
from gpt_jax.dropout import Drop, drop
from gpt_jax.mesh import EXAMPLES, constrained
from gpt_jax.model.architecture import ACTIVATIONS, GPTConfig, LayerKind


class Dropout(NamedTuple):
    """Dropout of one forward pass; rates may be traced, None = off for good."""

    key: jax.Array
    embed: jax.Array | float | None
    attn: jax.Array | float | None
    residual: jax.Array | float | None
    adapter: jax.Array | float | None = None

    def layer(self, layer) -> "Dropout":
        """Returns the dropout of one layer: the same rates, a key of its own."""
        return self._replace(key=jax.random.fold_in(self.key, layer))


def _weight(module, name: str, axes: tuple[str, ...], draw: str, **how) -> Any:
    """Declares a parameter, as long as the config says its axes are; see weights.py."""
    cfg = module.cfg
    shape = tuple(cfg.lengths[axis] for axis in axes)
    dtype = jnp.dtype(cfg.param_dtype)
    return weights.param(module, name, shape, axes, draw=draw, dtype=dtype, **how)


def _along(x, weight):
    """Returns a weight of the last axes of x, with an axis of 1 for each other one."""
    return jnp.expand_dims(weight, tuple(range(x.ndim - weight.ndim)))


class Where(NamedTuple):
    """Where the tokens of a call stand and what they may see: the same for all layers.

    Attributes:
      causal: whether a token sees only itself and what is before it.
      query_BT: each token's place in the cache; None without a cache.
      segment_BT: each token's document; None where there is one.
      turns: the rotation of each (base, scaling) that layers have; none without RoPE.
    """

    causal: bool
    query_BT: jax.Array | None
    segment_BT: jax.Array | None
    turns: Mapping[tuple, rope.Rotation]


def rotations(cfg: GPTConfig, positions_BT) -> dict[tuple, rope.Rotation]:
    """Returns the rotation of each (base, scaling) that the layers have."""
    if cfg.position != "rope":
        return {}
    # In the order of the layers: another order would be another program.
    ropes = dict.fromkeys((kind.rope_base, kind.rope_scaling) for kind in cfg.pattern)
    return {
        (base, scaling): rope.rotation(
            positions_BT, cfg.rotary_dim, base=base, scaling=scaling
        )
        for base, scaling in ropes
        if base  # without one the layers do not rotate
    }


class Past(NamedTuple):
    """Keys and values of earlier tokens.

    What a head reads lies together: of [B, S, G, K] a CPU copies the whole cache for
    every token, half the time of a step of GPT-2 small with 8 rows of 1,024 tokens.
    """

    keys_BGSK: jax.Array
    values_BGSK: jax.Array
    key_scale_BGS1: jax.Array | None = None  # by which they are multiplied: of int8
    value_scale_BGS1: jax.Array | None = None

    def extended(self, k_BTGK, v_BTGK, slot_BT) -> "Past":
        """Returns it with those of new tokens in their places."""
        new = (k_BTGK, v_BTGK)
        if self.key_scale_BGS1 is not None:
            codes, scales = zip(*map(_as_bytes, new), strict=True)
            new = (*codes, *scales)
        kept = zip(self, new, strict=False)
        return Past(*(_by_head(attention.extend(x, y, slot_BT)) for x, y in kept))

    def read(self, dtype) -> tuple[jax.Array, jax.Array]:
        """Returns the keys and the values as numbers of `dtype` [B, S, G, K]."""
        pairs = ((self.keys_BGSK, self.key_scale_BGS1),
                 (self.values_BGSK, self.value_scale_BGS1))  # fmt: skip
        found = (x if by is None else x.astype(by.dtype) * by for x, by in pairs)
        keys, values = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in found)
        return keys, values


def _as_bytes(x_BTGK):
    """Returns numbers as int8 and what they are to be multiplied by [B, T, G, 1]."""
    x_BTGK = x_BTGK.astype(jnp.float32)
    scale_BTG1 = jnp.abs(x_BTGK).max(-1, keepdims=True) / 127
    codes_BTGK = jnp.round(x_BTGK / jnp.where(scale_BTG1 > 0, scale_BTG1, 1))
    return codes_BTGK.astype(jnp.int8), scale_BTG1


def _by_head(x_BGSK):
    """Returns keys or values of a cache, their heads split over the mesh in sight."""
    return constrained(x_BGSK, None, "tensor")


def _kernel(module, reads: tuple[str, ...], gives: tuple[str, ...], **how) -> Any:
    """Declares a kernel [*reads, *gives]; returns it as a matrix [D, F]."""
    fan_in = math.prod(module.cfg.lengths[axis] for axis in reads)
    how |= {"inputs": len(reads), "fan_in": fan_in}
    return _weight(module, "kernel", reads + gives, **how).reshape(fan_in, -1)


def _few_bits(module) -> quantised.Quantised | None:
    """Returns the matrix that stands in the place of a layer's own, where one does."""
    if module.has_variable("params", quantised.LEAF):
        return module.get_variable("params", quantised.LEAF)
    return None


def _product(module, x_ND, kernel: Callable[[], Any], dtype=None):
    """Returns x @ kernel [N, F], as numbers of `dtype`.

    The kernel lies as it is stored, or as [F, D] where `for_one_row` turned it, or has
    few bits.
    """
    if (few := _few_bits(module)) is not None:
        return quantised.product(x_ND, few).astype(dtype or x_ND.dtype)
    if module.has_variable("params", "transposed"):
        kernel_FD = module.get_variable("params", "transposed").astype(x_ND.dtype)
        return jnp.einsum("ND,FD->NF", x_ND, kernel_FD, preferred_element_type=dtype)
    kernel_DF = kernel().astype(x_ND.dtype)
    return jnp.matmul(x_ND, kernel_DF, preferred_element_type=dtype)


class Dense(nn.Module):
    """x @ kernel + bias over the last len(reads) axes of x.

    Where an adapter has put leaves beside the kernel (adapters.py), also
    + (drop(x) @ lora_a) @ lora_b * lora_scale: LoRA (Hu et al. 2021, section 4.1).
    With a `kernel_scale` the kernel is int8, and its outputs are multiplied by that.
    A layer whose outputs are added to the residual stream multiplies them by
    `residual_scale` (Bordelon et al. 2023, "Depthwise hyperparameter transfer").

    Attributes:
      reads, gives: the axes of the kernel by name, as long as the config says.
      use_bias: whether there is one.
      cfg: the config.
      draw: how the kernel is first drawn.
      clip: outputs beyond it, on either side, are set to it; 0 = none.
    """

    reads: tuple[str, ...]
    gives: tuple[str, ...]
    use_bias: bool
    cfg: GPTConfig
    draw: str = "kernel"
    clip: float = 0.0

    @nn.compact
    def __call__(self, x, dropout: Dropout | None = None):
        lengths, dtype = self.cfg.lengths, self.cfg.dtype
        inputs, outputs = (
            tuple(lengths[axis] for axis in axes) for axes in (self.reads, self.gives)
        )
        fan_in = math.prod(inputs)
        # Two plain matrices: on a CPU a tenth faster than contracting [B, T, ...].
        x_ND = x.reshape(-1, fan_in)
        how = {"draw": self.draw, "linear": True}
        y = _product(self, x_ND, lambda: _kernel(self, self.reads, self.gives, **how))
        if self.has_variable("params", "kernel_scale"):
            scale_F = self.get_variable("params", "kernel_scale")
            y = y * scale_F[None].astype(dtype)
        if self.use_bias:
            draw = "residual_bias" if self.draw == "residual" else "bias"
            bias = _weight(self, "bias", self.gives, draw, fan_in=fan_in)
            y = y + bias.astype(dtype).reshape(1, -1)
        if self.has_variable("params", "lora_a"):
            y = y + self._low_rank(x_ND, dropout)
        if self.draw == "residual" and self.cfg.residual_scale != 1.0:
            y = y * jnp.asarray(self.cfg.residual_scale, y.dtype)
        if self.clip:
            y = jnp.clip(y, -self.clip, self.clip)
        return y.reshape(*x.shape[: x.ndim - len(inputs)], *outputs)

    def _low_rank(self, x_ND, dropout: Dropout | None):
        a_DR, b_RF, scale = (
            self.get_variable("params", name).astype(self.cfg.dtype)
            for name in ("lora_a", "lora_b", "lora_scale")
        )
        if dropout is not None:  # each kernel of a layer draws a mask of its own
            number = zlib.crc32(str(self.name).encode())
            key = jax.random.fold_in(dropout.key, np.uint32(number))
            x_ND = drop(x_ND, dropout.adapter, key)
        return (x_ND @ a_DR) @ b_RF * scale


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019), in float32."""

    axes: tuple[str, ...]  # the last of x, as one vector
    kind: str
    cfg: GPTConfig
    divisor: float = 1.0  # of what comes out; the last norm has that of the logits

    @nn.compact
    def __call__(self, x):
        cfg, over = self.cfg, tuple(range(-len(self.axes), 0))
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(over, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(over, keepdims=True) + cfg.norm_eps)
        if cfg.norm_scale:
            scale = _weight(self, "scale", self.axes, "scale")
            # In float32: 1 + a small scale has too few digits in bfloat16.
            y = y * (cfg.norm_offset + _along(y, scale.astype(jnp.float32)))
        if cfg.norm_bias and self.kind == "layernorm":
            bias = _weight(self, "bias", self.axes, "shift")
            y = y + _along(y, bias.astype(jnp.float32))
        if self.divisor != 1.0:
            y = y / self.divisor
        return y.astype(cfg.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with everything optional."""

    cfg: GPTConfig
    kind: LayerKind

    def setup(self):
        cfg = self.cfg
        own = partial(Dense, use_bias=cfg.qkv_bias, cfg=cfg, clip=cfg.qkv_clip)
        self.query = own(("embed",), ("heads", "head"))
        self.key = own(("embed",), ("kv_heads", "head"))
        self.value = own(("embed",), ("kv_heads", "head"))
        self.out = Dense(
            ("heads", "head"), ("embed",), cfg.attn_bias, cfg, draw="residual"
        )
        if cfg.qk_norm:
            whole = cfg.qk_norm_over == "heads"
            query, key = (("heads",), ("kv_heads",)) if whole else ((), ())
            self.query_norm = Norm((*query, "head"), "rmsnorm", cfg)
            self.key_norm = Norm((*key, "head"), "rmsnorm", cfg)

    @staticmethod
    def empty(cfg: GPTConfig, rows: int, length: int, dtype) -> Past:
        """Returns what a layer remembers of no tokens, with room for `length`."""
        shape = (rows, cfg.n_kv_heads, length, cfg.head_dim)
        # An array each, since a program that is given them cannot be given one twice.
        codes = [(shape, dtype)] * 2
        scaled = jnp.issubdtype(dtype, jnp.integer)
        scales = [((*shape[:3], 1), jnp.float32)] * 2 if scaled else []
        return Past(*(_by_head(jnp.zeros(*each)) for each in (*codes, *scales)))

    def __call__(self, x_BTD, past: Past | None, where: Where, dropout):
        cfg, kind = self.cfg, self.kind
        sight = Sight(where.causal, kind.window, where.query_BT, where.segment_BT)
        turn = where.turns.get((kind.rope_base, kind.rope_scaling))
        q_BTHK = self.query(x_BTD, dropout)
        k_BTGK, v_BTGK = self.key(x_BTD, dropout), self.value(x_BTD, dropout)
        if cfg.qk_norm:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        if turn is not None:
            q_BTHK = rope.rotate(q_BTHK, turn)
            k_BTGK = rope.rotate(k_BTGK, turn)
        if past is not None:
            past = past.extended(k_BTGK, v_BTGK, sight.query_BT)
            if attention.natively(cfg):
                how = {"window": kind.window, "scale": cfg.query_scale}
                y_BTHK = native.attention(
                    q_BTHK, past, sight.query_BT, **how, softcap=cfg.attn_softcap
                )
                return self.out(y_BTHK, dropout), past
            k_BTGK, v_BTGK = past.read(cfg.dtype)
        own = None
        if dropout is not None and dropout.attn is not None:
            own = Drop(dropout.attn, jax.random.fold_in(dropout.key, 0))
        attend = attention.choose(
            cfg.attention,
            q_BTHK,
            k_BTGK,
            sight,
            cached=past is not None,
            softcap=cfg.attn_softcap,
            dropout=own is not None,
        )
        y_BTHK = attend(
            q_BTHK,
            k_BTGK.astype(cfg.dtype),
            v_BTGK.astype(cfg.dtype),
            sight,
            scale=cfg.query_scale,
            softcap=cfg.attn_softcap,
            dropout=own,
        )
        return self.out(checkpoint_name(y_BTHK, "attn_out"), dropout), past


class MLP(nn.Module):
    """Two layers round an activation, or three with a gate (Shazeer 2020)."""

    cfg: GPTConfig

    def setup(self):
        cfg = self.cfg
        self.up = Dense(("embed",), ("mlp",), cfg.mlp_bias, cfg)
        if cfg.gated:
            self.gate = Dense(("embed",), ("mlp",), cfg.mlp_bias, cfg)
        self.down = Dense(("mlp",), ("embed",), cfg.mlp_bias, cfg, draw="residual")

    def __call__(self, x_BTD, dropout):
        act = ACTIVATIONS[self.cfg.activation]
        if self.cfg.gated:
            gate_BTF = act(self.gate(x_BTD, dropout))
            return self.down(gate_BTF * self.up(x_BTD, dropout), dropout)
        return self.down(act(self.up(x_BTD, dropout)), dropout)


class Embed(nn.Module):
    """A table of vectors: the tokens' or the positions'."""

    rows: str  # the axis that is looked up: vocab, position
    cfg: GPTConfig

    def setup(self):
        self.few = _few_bits(self)
        if self.few is None:
            self.embedding = _weight(
                self, "embedding", (self.rows, "embed"), draw="embedding"
            )

    def __call__(self, index):
        if self.few is not None:
            return quantised.rows(self.few, index).astype(self.cfg.dtype)
        # Cast after the look-up: gradients of one row then add up in float32.
        # Gathered over its width: the rows that are looked up come whole.
        split = "tensor" if self.rows == "vocab" else None
        table = constrained(self.embedding, split, None)
        return constrained(table[index].astype(self.cfg.dtype), EXAMPLES)

    def attend(self, x):
        """Returns float32 x @ embedding.T."""
        if self.few is not None:
            y = quantised.product(x.reshape(-1, x.shape[-1]), self.few)
            return y.reshape(*x.shape[:-1], -1)
        table_VD = self.embedding.astype(self.cfg.dtype)
        return jnp.einsum(
            "...D,VD->...V", x, table_VD, preferred_element_type=jnp.float32
        )


class Head(nn.Module):
    """float32 logits from an own kernel."""

    cfg: GPTConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg

        def kernel():
            return _kernel(self, ("embed",), ("vocab",), draw="head")

        y = _product(self, x.reshape(-1, cfg.d_model), kernel, jnp.float32)
        y = y.reshape(*x.shape[:-1], cfg.vocab_rows)
        if cfg.head_bias:
            bias = _weight(self, "bias", ("vocab",), "bias", fan_in=cfg.d_model)
            y = y + _along(y, bias.astype(jnp.float32))
        return y
