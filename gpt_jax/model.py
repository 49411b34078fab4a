"""The GPT model: its configuration, its modules, its first weights.

GPT-2 by default; RoPE, RMSNorm, gated MLPs, grouped-query attention, windows and the
rest are switches, so Llama, Mistral, Qwen and Gemma are configurations of this file.

Shapes: B batch  T time  D width  H heads  G key/value heads  K head dim  V vocabulary
"""

import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from gpt_jax import attention, names, settings
from gpt_jax.attention import KVCache, RopeScaling, Rotation, Sight, drop, free, insert

__all__ = [
    "GPT",
    "Dropout",
    "GPTConfig",
    "KVCache",
    "LayerKind",
    "RopeScaling",
    "count",
    "for_one_row",
    "free",
    "init",
    "init_cache",
    "insert",
    "stack",
    "unstack",
]


# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class LayerKind:
    """What may differ between layers: attention window and rotary positions."""

    window: int
    rope_base: float
    rope_scaling: RopeScaling | None

    def __post_init__(self):
        settings.fit("", vars(self), settings.declared(LayerKind))
        if self.window < 0:
            raise ValueError(f"window {self.window} is below 0; 0 means all tokens")
        if self.rope_base <= 0:
            raise ValueError(f"rope_base {self.rope_base} must be above 0")


def _layer_kind(kind) -> LayerKind:
    if isinstance(kind, LayerKind):
        return kind
    kind, keys = dict(kind), ("window", "rope_base", "rope_scaling")
    if set(kind) != set(keys):
        raise ValueError(
            f"a layer kind of pattern has the keys {', '.join(keys)}, "
            f"not {', '.join(map(str, kind)) or 'none'}"
        )
    scaling = kind["rope_scaling"]
    if scaling is not None and not isinstance(scaling, RopeScaling):
        if not {"kind", "factor"} <= set(scaling):
            raise ValueError(f"rope_scaling {scaling} needs a kind and a factor")
        kind["rope_scaling"] = RopeScaling(**dict(scaling))
    return LayerKind(**kind)


@dataclass(frozen=True)
class GPTConfig:
    """`config.model` (configs/common.py says what each key means), checked, hashable.

    Zeros that mean "choose for me" are resolved here; vocab_size must be given.

    Raises:
      ValueError: a value, or two together, make no model.
    """

    vocab_size: int
    vocab_multiple: int
    context_length: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    position: str
    pattern: tuple[LayerKind, ...]
    norm: str
    norm_eps: float
    norm_scale: bool
    norm_bias: bool
    norm_offset: float
    norm_placement: str
    embed_norm: bool
    activation: str
    gated: bool
    qkv_bias: bool
    attn_bias: bool
    mlp_bias: bool
    head_bias: bool
    tie_embeddings: bool
    qk_norm: bool
    query_scale: float
    attn_softcap: float
    logit_softcap: float
    embed_scale: float
    init: str
    zero_init: bool
    scan_layers: bool
    remat: str
    dtype: str
    param_dtype: str
    attention: str
    n_classes: int

    def __post_init__(self):
        settle = partial(object.__setattr__, self)
        settings.fit("model", vars(self), settings.declared(GPTConfig))
        settle("pattern", tuple(_layer_kind(kind) for kind in self.pattern))
        for name in _POSITIVE:
            self._at_least(name, 1)
        for name in _NOT_NEGATIVE:
            self._at_least(name, 0)
        if not self.head_dim and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; "
                "change one of them or set head_dim"
            )
        settle("n_kv_heads", self.n_kv_heads or self.n_heads)
        settle("head_dim", self.head_dim or self.d_model // self.n_heads)
        settle("d_ff", self.d_ff or 4 * self.d_model)
        settle("query_scale", self.query_scale or self.head_dim**-0.5)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads "
                f"{self.n_kv_heads}; each key/value head serves equally many queries"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} is odd; rope rotates features in pairs"
            )
        if not self.pattern:
            raise ValueError("pattern is empty; it needs at least one layer kind")
        if self.n_classes == 1:
            raise ValueError(
                "n_classes is 1: a classifier needs at least two, 0 is a language model"
            )
        if self.tie_embeddings and self.head_bias:
            raise ValueError("head_bias needs a head: set tie_embeddings=False")
        for name, choices in _CHOICES.items():
            names.choose(f"model.{name}", getattr(self, name), choices)

    def _at_least(self, name: str, least: int):
        if getattr(self, name) < least:
            hint = "; take it from the tokenizer" if name == "vocab_size" else ""
            raise ValueError(
                f"{name} is {getattr(self, name)}; it must be at least {least}{hint}"
            )

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table: vocab_size padded to vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def n_periods(self) -> int:
        """How often the whole pattern fits into the depth."""
        return self.n_layers // len(self.pattern)

    def kind(self, layer: int) -> LayerKind:
        """Returns what layer number `layer` is."""
        return self.pattern[layer % len(self.pattern)]


def _relu2(x):
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable] = {
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu2": _relu2,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}

# What the backward pass finds ready of a layer, besides its input; the rest is computed
# again. All matrix products; the output of attention, the costliest part; nothing.
REMAT: dict[str, Callable | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_attn_out": jax.checkpoint_policies.save_only_these_names("attn_out"),
    "full": None,
}

_POSITIVE = ("vocab_size", "vocab_multiple", "context_length", "n_layers")
_POSITIVE += ("d_model", "n_heads")
_NOT_NEGATIVE = ("n_kv_heads", "head_dim", "d_ff", "query_scale")
_NOT_NEGATIVE += ("attn_softcap", "logit_softcap", "norm_eps", "n_classes")
_CHOICES = {
    "position": ("learned", "rope", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_placement": ("pre", "both"),
    "activation": tuple(ACTIVATIONS),
    "init": ("gpt2", "torch_default", "modern"),
    "remat": ("none", *REMAT),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "attention": ("auto", *attention.IMPLEMENTATIONS),
}


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


# ---------------------------------------------------------------- modules


def _weight(module, name: str, shape: tuple[int, ...]):
    """Returns a parameter as it is stored; `init` below draws its first value."""
    dtype = jnp.dtype(module.cfg.param_dtype)
    return module.param(name, nn.initializers.zeros, shape, dtype)


EXAMPLES = ("data", "fsdp")  # axes of the mesh that examples are split over


def _constrained(x, *axes):
    """Returns x split so over the mesh in sight, if one is (`sharding.within`).

    Left to itself, XLA may split the residual stream over its width, as the weights
    are, and move activations instead of weights. What does not divide is not split: a
    few rows of text that is written, few key and value heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Auto not in mesh.axis_types:  # none, or each device for itself
        return x

    def fitting(length, axis):
        names = (axis,) if isinstance(axis, str) else axis or ()
        return None if length % math.prod(mesh.shape[n] for n in names) else axis

    axes = [fitting(length, axis) for length, axis in zip(x.shape, axes, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def _by_head(x_BGSK):
    """Returns keys or values of a cache, their heads split over the mesh in sight."""
    return _constrained(x_BGSK, None, "tensor")


def _product(module, x_ND, shape: tuple[int, ...], dtype=None):
    """Returns x @ kernel [N, F], as numbers of `dtype`; kernel is [*inputs, *outputs].

    The kernel lies as it is stored, or as [F, D] where `for_one_row` turned it.
    """
    if module.has_variable("params", "transposed"):
        kernel_FD = module.get_variable("params", "transposed").astype(x_ND.dtype)
        return jnp.einsum("ND,FD->NF", x_ND, kernel_FD, preferred_element_type=dtype)
    kernel_DF = _weight(module, "kernel", shape).astype(x_ND.dtype)
    kernel_DF = kernel_DF.reshape(x_ND.shape[-1], -1)
    return jnp.matmul(x_ND, kernel_DF, preferred_element_type=dtype)


class Dense(nn.Module):
    """x @ kernel + bias over the last len(inputs) axes of x.

    Where an adapter has put leaves beside the kernel (adapters.py), also
    + (drop(x) @ lora_a) @ lora_b * lora_scale: LoRA (Hu et al. 2021, section 4.1).
    With a `kernel_scale` the kernel is int8, and its outputs are multiplied by that.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    use_bias: bool
    cfg: GPTConfig

    @nn.compact
    def __call__(self, x, dropout: Dropout | None = None):
        dtype = self.cfg.dtype
        n_in, n_out = math.prod(self.inputs), math.prod(self.outputs)
        # Two plain matrices: on a CPU a tenth faster than contracting [B, T, ...].
        x_ND = x.reshape(-1, n_in)
        y = _product(self, x_ND, self.inputs + self.outputs)
        if self.has_variable("params", "kernel_scale"):
            y = y * self.get_variable("params", "kernel_scale").astype(dtype)
        if self.use_bias:
            y = y + _weight(self, "bias", self.outputs).astype(dtype).reshape(n_out)
        if self.has_variable("params", "lora_a"):
            y = y + self._low_rank(x_ND, dropout)
        return y.reshape(*x.shape[: x.ndim - len(self.inputs)], *self.outputs)

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

    width: int
    kind: str
    cfg: GPTConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.cfg
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + cfg.norm_eps)
        if cfg.norm_scale:
            y = y * (cfg.norm_offset + _weight(self, "scale", (self.width,)))
        if cfg.norm_bias and self.kind == "layernorm":
            y = y + _weight(self, "bias", (self.width,))
        return y.astype(cfg.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with everything optional."""

    cfg: GPTConfig

    def setup(self):
        cfg = self.cfg
        D, K = (cfg.d_model,), cfg.head_dim
        self.query = Dense(D, (cfg.n_heads, K), cfg.qkv_bias, cfg)
        self.key = Dense(D, (cfg.n_kv_heads, K), cfg.qkv_bias, cfg)
        self.value = Dense(D, (cfg.n_kv_heads, K), cfg.qkv_bias, cfg)
        self.out = Dense((cfg.n_heads, K), D, cfg.attn_bias, cfg)
        if cfg.qk_norm:
            self.query_norm = Norm(K, "rmsnorm", cfg)
            self.key_norm = Norm(K, "rmsnorm", cfg)

    def __call__(self, x_BTD, sight: Sight, turn: Rotation | None, past, dropout):
        cfg = self.cfg
        q_BTHK = self.query(x_BTD, dropout)
        k_BTGK, v_BTGK = self.key(x_BTD, dropout), self.value(x_BTD, dropout)
        if cfg.qk_norm:
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        if turn is not None:
            q_BTHK = attention.rotate(q_BTHK, turn)
            k_BTGK = attention.rotate(k_BTGK, turn)
        if past is not None:
            keys_BGSK = attention.extend(past[0], k_BTGK, sight.query_BT)
            values_BGSK = attention.extend(past[1], v_BTGK, sight.query_BT)
            past = (_by_head(keys_BGSK), _by_head(values_BGSK))
            k_BTGK, v_BTGK = (jnp.swapaxes(x, 1, 2) for x in past)
        own = None
        if dropout is not None and dropout.attn is not None:
            own = attention.Drop(dropout.attn, jax.random.fold_in(dropout.key, 0))
        attend = attention.choose(
            cfg.attention,
            q_BTHK,
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
        D, F = (cfg.d_model,), (cfg.d_ff,)
        self.up = Dense(D, F, cfg.mlp_bias, cfg)
        if cfg.gated:
            self.gate = Dense(D, F, cfg.mlp_bias, cfg)
        self.down = Dense(F, D, cfg.mlp_bias, cfg)

    def __call__(self, x_BTD, dropout):
        act = ACTIVATIONS[self.cfg.activation]
        if self.cfg.gated:
            gate_BTF = act(self.gate(x_BTD, dropout))
            return self.down(gate_BTF * self.up(x_BTD, dropout), dropout)
        return self.down(act(self.up(x_BTD, dropout)), dropout)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    cfg: GPTConfig

    def setup(self):
        cfg = self.cfg
        self.norm1 = Norm(cfg.d_model, cfg.norm, cfg)
        self.attn = Attention(cfg)
        self.norm2 = Norm(cfg.d_model, cfg.norm, cfg)
        self.mlp = MLP(cfg)
        if cfg.norm_placement == "both":
            self.post1 = Norm(cfg.d_model, cfg.norm, cfg)
            self.post2 = Norm(cfg.d_model, cfg.norm, cfg)

    def __call__(self, x_BTD, sight, turn, past, dropout):
        y_BTD, past = self.attn(self.norm1(x_BTD), sight, turn, past, dropout)
        x_BTD += self._finish(y_BTD, 1, dropout)
        x_BTD += self._finish(self.mlp(self.norm2(x_BTD), dropout), 2, dropout)
        return x_BTD, past

    def _finish(self, y_BTD, sublayer: int, dropout):
        if self.cfg.norm_placement == "both":
            y_BTD = (self.post1 if sublayer == 1 else self.post2)(y_BTD)
        if dropout is None:
            return y_BTD
        return drop(y_BTD, dropout.residual, jax.random.fold_in(dropout.key, sublayer))


class Period(nn.Module):
    """One round of the layer pattern: what `scan_layers` repeats."""

    cfg: GPTConfig

    def setup(self):
        for j in range(len(self.cfg.pattern)):
            setattr(self, f"kind_{j}", Block(self.cfg))


class Embed(nn.Module):
    """A table of vectors: the tokens' or the positions'."""

    rows: int
    split: str | None  # the axis of the mesh that its rows are split over
    cfg: GPTConfig

    def setup(self):
        self.embedding = _weight(self, "embedding", (self.rows, self.cfg.d_model))

    def __call__(self, index):
        # Cast after the look-up: gradients of one row then add up in float32.
        # Gathered over its width: the rows that are looked up come whole.
        table = _constrained(self.embedding, self.split, None)
        return _constrained(table[index].astype(self.cfg.dtype), EXAMPLES)

    def attend(self, x):
        """Returns float32 x @ embedding.T."""
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
        shape = (cfg.d_model, cfg.vocab_rows)
        y = _product(self, x.reshape(-1, cfg.d_model), shape, jnp.float32)
        y = y.reshape(*x.shape[:-1], cfg.vocab_rows)
        if cfg.head_bias:
            y = y + _weight(self, "bias", (cfg.vocab_rows,))
        return y


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al. 2019, and its descendants)."""

    cfg: GPTConfig

    def setup(self):
        cfg = self.cfg
        self.embed = Embed(cfg.vocab_rows, "tensor", cfg)
        if cfg.position == "learned":
            self.positions = Embed(cfg.context_length, None, cfg)
        if cfg.embed_norm:
            self.embed_norm = Norm(cfg.d_model, cfg.norm, cfg)
        if cfg.scan_layers and cfg.n_periods:
            self.blocks = Period(cfg)
        for i in range(_n_scanned(cfg) if cfg.scan_layers else 0, cfg.n_layers):
            setattr(self, f"block_{i}", Block(cfg))
        self.final_norm = Norm(cfg.d_model, cfg.norm, cfg)
        if cfg.n_classes:
            self.classifier = Dense((cfg.d_model,), (cfg.n_classes,), True, cfg)
        elif not cfg.tie_embeddings:
            self.head = Head(cfg)

    def __call__(
        self,
        tokens_BT,
        positions_BT=None,
        segments_BT=None,
        cache: KVCache | None = None,
        *,
        causal: bool = True,
        dropout: Dropout | None = None,
    ):
        """Returns float32 logits [B, T, V] and the cache; arguments as in `hidden`."""
        x_BTD, cache = self.hidden(
            tokens_BT, positions_BT, segments_BT, cache, causal=causal, dropout=dropout
        )
        return self.logits(x_BTD), cache

    def hidden(
        self,
        tokens_BT,
        positions_BT=None,
        segments_BT=None,
        cache: KVCache | None = None,
        *,
        causal: bool = True,
        dropout: Dropout | None = None,
    ):
        """Returns the normed residual stream [B, T, D] and the cache.

        Args:
          tokens_BT: int token ids.
          positions_BT: where each token stands; by default 0, 1, ... after what the
            cache holds.
          segments_BT: int; tokens see only tokens of their own segment (packing).
          cache: earlier keys and values. The new ones are written behind each row's
            length_B, and length_B grows by T.
          causal: whether a token sees only itself and what is before it.
          dropout: rates and key, or None for none.

        Raises:
          ValueError: more tokens than context_length, or a cache together with
            segments, causal=False or scan_layers.
        """
        cfg = self.cfg
        T = tokens_BT.shape[1]
        self._check(T, segments_BT, cache, causal)
        query_BT = None
        if cache is not None:
            query_BT = cache.length_B[:, None] + jnp.arange(T)
        if positions_BT is None:
            positions_BT = query_BT
        x_BTD = self._embed(tokens_BT, positions_BT, dropout)
        turns = self._rotations(T, positions_BT)

        def layer(block, x_BTD, i, past, number):
            kind = cfg.pattern[i]
            sight = Sight(causal, kind.window, query_BT, segments_BT)
            own = dropout and dropout.layer(number)
            return block(x_BTD, sight, turns[i], past, own)

        x_BTD, pasts = self._layers(layer, x_BTD, cache)
        if cache is not None:
            keys, values = zip(*pasts, strict=True)
            cache = KVCache(keys, values, cache.length_B + T)
        return self.final_norm(x_BTD), cache

    def logits(self, x):
        """Returns float32 logits [..., V] of the true vocabulary.

        Of a classifier they are [..., C], of its classes.
        """
        cfg = self.cfg
        if cfg.n_classes:
            return self.classifier(x).astype(jnp.float32)
        y = self.embed.attend(x) if cfg.tie_embeddings else self.head(x)
        y = y[..., : cfg.vocab_size]
        if cfg.logit_softcap:
            y = cfg.logit_softcap * jnp.tanh(y / cfg.logit_softcap)
        return y

    def _check(self, length, segments_BT, cache, causal):
        cfg = self.cfg
        if length > cfg.context_length:
            raise ValueError(
                f"{length} tokens are more than context_length {cfg.context_length}; "
                "pass fewer or build the model with a longer context"
            )
        if cache is None:
            return
        if cfg.scan_layers:
            raise ValueError(
                "a cache needs scan_layers=False: unstack the weights first"
            )
        if segments_BT is not None or not causal:
            raise ValueError("a cache works with causal=True and without segments")

    def _embed(self, tokens_BT, positions_BT, dropout):
        cfg = self.cfg
        x_BTD = self.embed(tokens_BT)
        if cfg.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, x_BTD.dtype)
        if cfg.position == "learned":
            if positions_BT is None:
                x_BTD = x_BTD + self.positions(slice(0, tokens_BT.shape[1]))
            else:
                x_BTD = x_BTD + self.positions(positions_BT)
        if cfg.embed_norm:
            x_BTD = self.embed_norm(x_BTD)
        if dropout is None:
            return x_BTD
        # Layers use 0, 1, ...; the embedding takes the number after the last one.
        return drop(x_BTD, dropout.embed, dropout.layer(cfg.n_layers).key)

    def _rotations(self, T, positions_BT):
        """Returns the rotation of each layer kind of the pattern."""
        cfg = self.cfg
        if cfg.position != "rope":
            return [None] * len(cfg.pattern)
        if positions_BT is None:
            positions_BT = jnp.arange(T)[None]
        made = {}
        for kind in cfg.pattern:
            which = (kind.rope_base, kind.rope_scaling)
            if which not in made:
                made[which] = attention.rotation(
                    positions_BT, cfg.head_dim, base=which[0], scaling=which[1]
                )
        return [made[kind.rope_base, kind.rope_scaling] for kind in cfg.pattern]

    def _layers(self, layer, x_BTD, cache):
        """Applies all layers; returns the stream and each layer's keys and values."""
        cfg, P = self.cfg, len(self.cfg.pattern)
        first = 0
        if cfg.scan_layers and cfg.n_periods:
            x_BTD = self._scan(layer, x_BTD)
            first = _n_scanned(cfg)
        pasts = []
        for i in range(first, cfg.n_layers):
            past = None if cache is None else (cache.keys[i], cache.values[i])

            def run(block, x_BTD, past, i=i):
                return layer(block, x_BTD, i % P, past, i)

            if cfg.remat != "none":
                run = nn.remat(run, policy=REMAT[cfg.remat])
            x_BTD = _constrained(x_BTD, EXAMPLES)
            x_BTD, past = run(getattr(self, f"block_{i}"), x_BTD, past)
            pasts.append(past)
        return x_BTD, pasts

    def _scan(self, layer, x_BTD):
        cfg, P = self.cfg, len(self.cfg.pattern)

        def period(blocks, x_BTD, first):
            for j in range(P):

                def run(block, x_BTD, number, j=j):
                    return layer(block, x_BTD, j, None, number)[0]

                if cfg.remat != "none":  # the scan prevents the cse
                    run = nn.remat(run, policy=REMAT[cfg.remat], prevent_cse=False)
                x_BTD = _constrained(x_BTD, EXAMPLES)
                x_BTD = run(getattr(blocks, f"kind_{j}"), x_BTD, first + j)
            return x_BTD, None

        scan = nn.scan(
            period,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.n_periods,
        )
        x_BTD, _ = scan(self.blocks, x_BTD, P * jnp.arange(cfg.n_periods))
        return x_BTD


def _n_scanned(cfg: GPTConfig) -> int:
    return cfg.n_periods * len(cfg.pattern)


def init_cache(cfg: GPTConfig, batch: int, max_length: int, dtype) -> KVCache:
    """Returns an empty cache of `batch` rows of up to `max_length` tokens."""
    if max_length > cfg.context_length:
        raise ValueError(
            f"a cache of {max_length} tokens is longer than context_length "
            f"{cfg.context_length}"
        )
    shape = (batch, cfg.n_kv_heads, max_length, cfg.head_dim)
    return KVCache(
        keys=tuple(_by_head(jnp.zeros(shape, dtype)) for _ in range(cfg.n_layers)),
        values=tuple(_by_head(jnp.zeros(shape, dtype)) for _ in range(cfg.n_layers)),
        length_B=jnp.zeros((batch,), jnp.int32),
    )


# ---------------------------------------------------------------- first weights


def _normal(std):
    return lambda key, shape, fan_in: std * jax.random.normal(key, shape)


def _uniform(gain):
    """U(-a, a) with a = gain / sqrt(fan_in)."""

    def draw(key, shape, fan_in):
        edge = gain / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, minval=-edge, maxval=edge)

    return draw


def _constant(value):
    return lambda key, shape, fan_in: jnp.full(shape, value)


def _presets(cfg: GPTConfig) -> list[tuple[str, Callable]]:
    """Returns (regex of a parameter's path, how it is drawn); the first match wins."""
    norms = [
        (r"scale$", _constant(1.0 - cfg.norm_offset)),
        (r"norm\d?/bias$|post\d/bias$", _constant(0.0)),
    ]
    zeroed = [(r"(attn/out|mlp/down)/", _constant(0.0))] if cfg.zero_init else []
    presets = {
        # Radford et al. 2019, section 2.3: residual projections shrink with depth.
        "gpt2": [
            (r"bias$", _constant(0.0)),
            (r"(attn/out|mlp/down)/", _normal(0.02 / math.sqrt(2 * cfg.n_layers))),
            (r".*", _normal(0.02)),
        ],
        # What torch.nn.Linear and torch.nn.Embedding draw.
        "torch_default": [
            (r"embedding$", _normal(1.0)),
            (r".*", _uniform(1.0)),
        ],
        # Unit variance through every kernel; an untied head starts nearly uniform.
        "modern": [
            (r"bias$", _constant(0.0)),
            (r"embedding$", _normal(0.02 if cfg.tie_embeddings else 1.0)),
            (r"(head|classifier)/kernel$", _normal(0.001)),
            (r".*", _uniform(math.sqrt(3.0))),
        ],
    }
    return norms + zeroed + presets[cfg.init]


def init(cfg: GPTConfig, key) -> dict:
    """Returns the first weights; each depends on the key and its own path only.

    So scanned and unrolled models start equal, and so do padded vocabularies (the
    padding is 0).
    """
    true = replace(cfg, scan_layers=False, vocab_multiple=1)
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(GPT(true).init, key, tokens_BT)["params"]
    leaves: dict[str, Any] = flatten_dict(shapes, sep="/")  # type: ignore[assignment]
    rules = _presets(cfg)
    alike = defaultdict(list)  # drawn together, or compiling takes a second a layer
    for path, leaf in leaves.items():
        draw = next(draw for rule, draw in rules if re.search(rule, path))
        alike[draw, leaf.shape, _fan_in(path, leaves)].append(path)

    weights = {}
    for (draw, shape, fan_in), paths in alike.items():
        numbers = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
        keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
        drawn = jax.vmap(partial(draw, shape=shape, fan_in=fan_in))(keys)
        weights |= zip(paths, drawn.astype(cfg.param_dtype), strict=True)

    padding = cfg.vocab_rows - cfg.vocab_size
    for path, axis in _VOCABULARY_AXIS.items():
        if path in weights and padding:
            widths = [(0, 0)] * weights[path].ndim
            widths[axis] = (0, padding)
            weights[path] = jnp.pad(weights[path], widths)
    params = unflatten_dict(weights, sep="/")
    return stack(params, cfg) if cfg.scan_layers else params


_VOCABULARY_AXIS = {"embed/embedding": 0, "head/kernel": 1, "head/bias": 0}


def _fan_in(path: str, leaves: Mapping[str, Any]) -> int:
    """Returns how many numbers make one output of the layer that a weight is of."""
    layer = path.rpartition("/")[0]
    return _inputs(layer, leaves.get(f"{layer}/kernel", leaves[path]).shape)


def _inputs(layer: str, shape: tuple[int, ...]) -> int:
    """Returns how many numbers go into the kernel of that shape."""
    return math.prod(shape[:2]) if layer.endswith("attn/out") else shape[0]


def count(weights) -> int:
    """Returns how many numbers the weights are.

    Args:
      weights: a tree of arrays; or a GPTConfig, which is counted without building it
        and without the padding of its vocabulary.
    """
    if isinstance(weights, GPTConfig):
        return _count(weights)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights))


@cache  # tracing the model takes a while, and many runs may share one
def _count(cfg: GPTConfig) -> int:
    true = replace(cfg, vocab_multiple=1)
    return count(jax.eval_shape(partial(init, true), jax.random.key(0)))


# ---------------------------------------------------------------- layouts


def stack(params: Mapping[str, Any], cfg: GPTConfig) -> dict:
    """Returns block_0, block_1, ... as blocks/kind_j [n_periods, ...].

    Layer p * P + j of a pattern of P kinds becomes entry p of kind_j; layers after
    the last whole period stay as they are. Lossless; a stacked tree is returned as is.
    """
    P, n = len(cfg.pattern), _n_scanned(cfg)
    if "blocks" in params or not n:
        return dict(params)
    blocks = {}
    for j in range(P):
        layers = [params[f"block_{i}"] for i in range(j, n, P)]
        blocks[f"kind_{j}"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    moved = {f"block_{i}" for i in range(n)}
    return {k: v for k, v in params.items() if k not in moved} | {"blocks": blocks}


def unstack(params: Mapping[str, Any], cfg: GPTConfig) -> dict:
    """Returns blocks/kind_j as block_0, block_1, ...: the inverse of `stack`."""
    if "blocks" not in params:
        return dict(params)
    P = len(cfg.pattern)
    flat = {k: v for k, v in params.items() if k != "blocks"}
    for i in range(_n_scanned(cfg)):
        p, j = divmod(i, P)
        flat[f"block_{i}"] = jax.tree.map(
            lambda x, p=p: x[p], params["blocks"][f"kind_{j}"]
        )
    return flat


def for_one_row(params: Mapping[str, Any]) -> dict:
    """Returns unstacked weights with every kernel as `transposed` [outputs, inputs].

    On a CPU one row times a matrix is a series of dot products along the rows of
    memory: 1.5 times as fast as adding up the rows of `kernel`. With eight rows it is
    the other way round. A tree that is already so is returned as is.
    """
    leaves: dict[str, Any] = flatten_dict(params, sep="/")  # type: ignore[assignment]
    turned = {}
    for path, leaf in leaves.items():
        layer, _, name = path.rpartition("/")
        if name == "kernel":
            kernel_DF = leaf.reshape(_inputs(layer, leaf.shape), -1)
            turned[f"{layer}/transposed"] = kernel_DF.T
        else:
            turned[path] = leaf
    return unflatten_dict(turned, sep="/")
