"""The GPT model: its block, the whole of it, its first weights.

GPT-2 by default; RoPE, RMSNorm, gated MLPs, grouped-query attention, windows and the
rest are switches, so Llama, Mistral, Qwen and Gemma are configurations of this file.

Shapes: B batch  T time  D width  H heads  G key/value heads  K head dim  V vocabulary
"""

import functools
import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from gpt_jax import weights
from gpt_jax.dropout import drop
from gpt_jax.mesh import EXAMPLES, constrained
from gpt_jax.model import initializers
from gpt_jax.model.architecture import REMAT, GPTConfig, LayerKind
from gpt_jax.model.cache import Cache, free, insert, stretch
from gpt_jax.model.layers import (
    MLP,
    Attention,
    Dense,
    Dropout,
    Embed,
    Head,
    Norm,
    Where,
    rotations,
)
from gpt_jax.model.layouts import for_one_row, rounded, stack, unstack
from gpt_jax.rope import RopeScaling
from gpt_jax.weights import Weight

__all__ = [
    "GPT",
    "Cache",
    "Dropout",
    "GPTConfig",
    "Hidden",
    "LayerKind",
    "RopeScaling",
    "count",
    "declared",
    "for_one_row",
    "free",
    "hidden",
    "init",
    "init_cache",
    "insert",
    "logits",
    "rounded",
    "stack",
    "stretch",
    "unstack",
]


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream.

    Or both at once, of the same stream (Wang and Komatsuzaki 2021, GPT-J).
    """

    cfg: GPTConfig
    kind: LayerKind  # what differs between layers

    def setup(self):
        cfg = self.cfg
        self.attn = Attention(cfg, self.kind)
        self.mlp = MLP(cfg)
        if cfg.norm_placement != "post":
            self.norm1 = Norm(("embed",), cfg.norm, cfg)
        if cfg.norm_placement != "post" and cfg.parallel != "shared":
            self.norm2 = Norm(("embed",), cfg.norm, cfg)
        if cfg.norm_placement != "pre":
            self.post1 = Norm(("embed",), cfg.norm, cfg)
            self.post2 = Norm(("embed",), cfg.norm, cfg)

    def __call__(self, x_BTD, past, where: Where, dropout: Dropout | None):
        read_BTD = self._begin(x_BTD, 1)
        y_BTD, past = self.attn(read_BTD, past, where, dropout)
        if self.cfg.parallel == "own":
            read_BTD = self._begin(x_BTD, 2)
        x_BTD += self._finish(y_BTD, 1, dropout)
        if self.cfg.parallel == "no":
            read_BTD = self._begin(x_BTD, 2)
        x_BTD += self._finish(self.mlp(read_BTD, dropout), 2, dropout)
        return x_BTD, past

    def _begin(self, x_BTD, sublayer: int):
        if self.cfg.norm_placement == "post":
            return x_BTD
        return (self.norm1 if sublayer == 1 else self.norm2)(x_BTD)

    def _finish(self, y_BTD, sublayer: int, dropout):
        if self.cfg.norm_placement != "pre":
            y_BTD = (self.post1 if sublayer == 1 else self.post2)(y_BTD)
        if dropout is None:
            return y_BTD
        return drop(y_BTD, dropout.residual, jax.random.fold_in(dropout.key, sublayer))


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al. 2019, and its descendants).

    `hidden` and `logits` below apply it to weights.
    """

    cfg: GPTConfig

    def setup(self):
        cfg = self.cfg
        self.table = Embed("vocab", cfg, name="embed")
        if cfg.position == "learned":
            self.positions = Embed("position", cfg)
        if cfg.embed_norm:
            self.embed_norm = Norm(("embed",), cfg.norm, cfg)
        if cfg.scan_layers and cfg.n_periods:
            self.blocks = Period(cfg)
        for i in range(cfg.n_scanned if cfg.scan_layers else 0, cfg.n_layers):
            setattr(self, f"block_{i}", Block(cfg, cfg.kind(i)))
        # The head is linear, so what it reads may be divided in place of the logits;
        # under mup they shrink as the width grows, whatever head reads the stream.
        self.final_norm = Norm(("embed",), cfg.norm, cfg, cfg.logits_over)
        if cfg.n_classes:
            self.classifier = Dense(("embed",), ("classes",), True, cfg, draw="head")
        elif not cfg.tie_embeddings:
            self.head = Head(cfg)

    def __call__(
        self,
        tokens_BT,
        positions_BT=None,
        segments_BT=None,
        cache: Cache | None = None,
        *,
        causal: bool = True,
        dropout: Dropout | None = None,
    ):
        """Returns float32 logits [B, T, V] and the cache; arguments as in `hidden`."""
        how = {"causal": causal, "dropout": dropout}
        x_BTD, cache = self.features(tokens_BT, positions_BT, segments_BT, cache, **how)
        return self.logits(x_BTD), cache

    def features(
        self,
        tokens_BT,
        positions_BT=None,
        segments_BT=None,
        cache: Cache | None = None,
        *,
        causal: bool = True,
        dropout: Dropout | None = None,
    ):
        """Returns the normed residual stream [B, T, D] and the cache; see `hidden`."""
        if positions_BT is None and cache is not None:
            place_1T = jnp.arange(tokens_BT.shape[1])[None]
            positions_BT = cache.length_B[:, None] + place_1T
        x_BTD = self.embed(tokens_BT, positions_BT, dropout=dropout)
        how = {"causal": causal, "dropout": dropout}
        return self.layers(x_BTD, positions_BT, segments_BT, cache, **how)

    def embed(self, tokens_BT, positions_BT=None, *, dropout: Dropout | None = None):
        """Returns the residual stream [B, T, D] before the first layer."""
        cfg, length = self.cfg, tokens_BT.shape[1]
        if length > cfg.context_length:
            raise ValueError(
                f"{length} tokens are more than context_length {cfg.context_length}; "
                "pass fewer or build the model with a longer context"
            )
        x_BTD = self.table(tokens_BT)
        if cfg.embed_scale != 1.0:
            x_BTD = x_BTD * jnp.asarray(cfg.embed_scale, x_BTD.dtype)
        if cfg.position == "learned":
            if positions_BT is None:
                x_BTD = x_BTD + self.positions(slice(0, length))[None]
            else:
                x_BTD = x_BTD + self.positions(positions_BT)
        if cfg.embed_norm:
            x_BTD = self.embed_norm(x_BTD)
        if dropout is None:
            return x_BTD
        # Layers use 0, 1, ...; the embedding takes the number after the last one.
        return drop(x_BTD, dropout.embed, dropout.layer(cfg.n_layers).key)

    def layers(
        self,
        x_BTD,
        positions_BT=None,
        segments_BT=None,
        cache: Cache | None = None,
        *,
        causal: bool = True,
        dropout: Dropout | None = None,
    ):
        """Returns the stream after all layers and the last norm, and the cache."""
        cfg, T = self.cfg, x_BTD.shape[1]
        if cache is not None and cfg.scan_layers:
            raise ValueError(
                "a cache needs scan_layers=False: unstack the weights first"
            )
        if cache is not None and (segments_BT is not None or not causal):
            raise ValueError("a cache works with causal=True and without segments")
        query_BT = None
        if cache is not None:
            query_BT = cache.length_B[:, None] + jnp.arange(T)[None]
        if positions_BT is None:
            positions_BT = jnp.arange(T)[None] if query_BT is None else query_BT
        turns = rotations(cfg, positions_BT)
        where = Where(causal, query_BT, segments_BT, turns)

        def layer(block, x_BTD, past, number):
            own = dropout and dropout.layer(number)
            return block(x_BTD, past, where, own)

        first, pasts = 0, []
        if cfg.scan_layers and cfg.n_periods:
            x_BTD, first = self._scan(layer, x_BTD), cfg.n_scanned
        for i in range(first, cfg.n_layers):
            run = partial(layer, number=i)
            if cfg.remat != "none":
                run = nn.remat(run, policy=REMAT[cfg.remat])
            past = None if cache is None else cache.layers[i]
            x_BTD = constrained(x_BTD, EXAMPLES)
            x_BTD, past = run(getattr(self, f"block_{i}"), x_BTD, past)
            pasts.append(past)
        if cache is not None:
            cache = Cache(tuple(pasts), cache.length_B + T)
        return self.final_norm(x_BTD), cache

    def logits(self, x):
        """Returns float32 logits [..., V] of the true vocabulary.

        Of a classifier they are [..., C], of its classes.
        """
        cfg = self.cfg
        if cfg.n_classes:
            return self.classifier(x).astype(jnp.float32)
        y = self.table.attend(x) if cfg.tie_embeddings else self.head(x)
        y = y[..., : cfg.vocab_size]
        if cfg.logit_softcap:
            y = cfg.logit_softcap * jnp.tanh(y / cfg.logit_softcap)
        return y

    def _scan(self, layer, x_BTD):
        cfg, P = self.cfg, len(self.cfg.pattern)

        def period(blocks, x_BTD, first):
            for j in range(P):

                def run(block, x_BTD, number):
                    return layer(block, x_BTD, None, number)[0]

                if cfg.remat != "none":  # the scan prevents the cse
                    run = nn.remat(run, policy=REMAT[cfg.remat], prevent_cse=False)
                x_BTD = constrained(x_BTD, EXAMPLES)
                x_BTD = run(getattr(blocks, f"kind_{j}"), x_BTD, first + j)
            return x_BTD, None

        scan = nn.scan(
            period,
            variable_axes={"params": 0, SUMS: 0},
            split_rngs={"params": True},
            length=cfg.n_periods,
        )
        x_BTD, _ = scan(self.blocks, x_BTD, P * jnp.arange(cfg.n_periods))
        return x_BTD


class Period(nn.Module):
    """One round of the layer pattern: what `scan_layers` repeats."""

    cfg: GPTConfig

    def setup(self):
        for j, kind in enumerate(self.cfg.pattern):
            setattr(self, f"kind_{j}", Block(self.cfg, kind))


# ---------------------------------------------------------------- applied to weights

SUMS = "sums"  # the collection into which a layer may sow a loss of its own


class Hidden(NamedTuple):
    """What a model makes of tokens, before its head.

    Attributes:
      x_BTD: the normed residual stream.
      cache: the cache with these tokens, None without one.
      sums: what layers have sown, `self.sow("sums", name, value)`, added up by name: a
        loss of their own, summed over the tokens as a loss is.
    """

    x_BTD: jax.Array
    cache: Any
    sums: dict[str, jax.Array]


def hidden(
    model: GPT,
    params,
    tokens_BT,
    positions_BT=None,
    segments_BT=None,
    cache: Cache | None = None,
    *,
    causal: bool = True,
    dropout: Dropout | None = None,
) -> Hidden:
    """Applies a model with its weights to tokens.

    Args:
      model: the model.
      params: its weights.
      tokens_BT: int token ids.
      positions_BT: where each token stands; by default 0, 1, ... after what the cache
        holds.
      segments_BT: int; tokens see only tokens of their own segment (packing).
      cache: what it remembers of earlier tokens. The new ones are written behind each
        row's length_B, and length_B grows by T.
      causal: whether a token sees only itself and what is before it.
      dropout: rates and key, or None for none.

    Raises:
      ValueError: more tokens than context_length, or a cache together with segments,
        causal=False or scan_layers.
    """
    found: Any = model.apply(
        {"params": params},
        tokens_BT,
        positions_BT,
        segments_BT,
        cache,
        causal=causal,
        dropout=dropout,
        method="features",
        mutable=[SUMS],
    )
    (x_BTD, cache), sown = found
    sums: dict[str, Any] = {}
    for path, values in jax.tree_util.tree_leaves_with_path(sown.get(SUMS, {})):
        name = path[-2].key  # the last is the place in the tuple that flax makes
        sums[name] = sums.get(name, 0.0) + values.sum()
    return Hidden(x_BTD, cache, sums)


def logits(model: GPT, params, x) -> jax.Array:
    """Returns float32 logits [..., V] of a residual stream, or of classes [..., C]."""
    made: Any = model.apply({"params": params}, x, method="logits")
    return made


def init_cache(cfg: GPTConfig, batch: int, max_length: int, dtype) -> Cache:
    """Returns an empty cache of `batch` rows of up to `max_length` tokens.

    Its numbers are of `dtype`, unless the config says otherwise (`cache_dtype`).
    """
    if max_length > cfg.context_length:
        raise ValueError(
            f"a cache of {max_length} tokens is longer than context_length "
            f"{cfg.context_length}"
        )
    dtype = cfg.cache_dtype or dtype
    past = partial(Attention.empty, cfg, batch, max_length, dtype)
    return Cache(
        layers=tuple(past() for _ in range(cfg.n_layers)),
        length_B=jnp.zeros((batch,), jnp.int32),
    )


# ---------------------------------------------------------------- weights


@functools.cache  # tracing a model takes a while, and many runs may share one
def declared(cfg: GPTConfig) -> dict[str, Weight]:
    """Returns what each weight of the model is, by path, in the layout of the config.

    One period of the layers is traced: all others are like it.
    """
    true = replace(cfg, n_layers=min(cfg.n_layers, len(cfg.pattern)), scan_layers=False)
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    one = weights.declared(GPT(true).init, jax.random.key(0), tokens_BT)
    first = 0
    found = {path: weight for path, weight in one.items() if "block_" not in path}
    if cfg.scan_layers and cfg.n_periods:
        first = cfg.n_scanned
        for path, weight in one.items():
            if path.startswith("block_"):
                scanned = path.replace("block_", "blocks/kind_", 1)
                found[scanned] = weight.stacked(cfg.n_periods)
    for layer in range(first, cfg.n_layers):
        prefix = f"block_{layer % len(cfg.pattern)}/"
        for path, weight in one.items():
            if path.startswith(prefix):
                found[f"block_{layer}/{path.removeprefix(prefix)}"] = weight
    return found


def rates(cfg: GPTConfig) -> dict[str, float]:
    """Returns the factors of Adam's rate that a width asks for, by path.

    Under param mup kernels inside the model learn slower the more numbers they read;
    tables, norms, biases and the head do not (Yang et al. 2022, "Tensor Programs V",
    table 8). Otherwise there are none.
    """
    if cfg.width_ratio == 1:
        return {}
    inner = ("kernel", "residual")
    return {
        path: 1 / cfg.width_ratio
        for path, weight in declared(cfg).items()
        if weight.inputs and weight.draw in inner
    }


def init(cfg: GPTConfig, key) -> dict:
    """Returns the first weights; each depends on the key and its own path only.

    So scanned and unrolled models start equal, and so do padded vocabularies (the
    padding is 0).
    """
    table = declared(replace(cfg, scan_layers=False, vocab_multiple=1))
    drawn = initializers.draw(table, cfg, key)
    padding = cfg.vocab_rows - cfg.vocab_size
    for path, weight in table.items():
        if padding and "vocab" in weight.axes:
            widths = [(0, padding * (axis == "vocab")) for axis in weight.axes]
            drawn[path] = jnp.pad(drawn[path], widths)
    params = unflatten_dict(drawn, sep="/")
    return stack(params, cfg) if cfg.scan_layers else params


def count(tree: Any) -> int:
    """Returns how many numbers the weights are.

    Args:
      tree: a tree of arrays; or a GPTConfig, which is counted without building it and
        without the padding of its vocabulary.
    """
    if isinstance(tree, GPTConfig):
        tree = declared(replace(tree, vocab_multiple=1))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
