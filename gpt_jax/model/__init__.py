"""The GPT model: its block, the whole of it, its first weights.

GPT-2 by default; RoPE, RMSNorm, gated MLPs, grouped-query attention, windows and the
rest are switches, so Llama, Mistral, Qwen and Gemma are configurations of this file.

Shapes: B batch  T time  D width  H heads  G key/value heads  K head dim  V vocabulary
"""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from gpt_jax import attention, weights
from gpt_jax.attention import KVCache, RopeScaling, Sight, drop, free, insert
from gpt_jax.model import initializers
from gpt_jax.model.architecture import REMAT, GPTConfig, LayerKind
from gpt_jax.model.layers import (
    EXAMPLES,
    MLP,
    Attention,
    Dense,
    Dropout,
    Embed,
    Head,
    Norm,
    by_head,
    constrained,
)
from gpt_jax.model.layouts import for_one_row, stack, unstack
from gpt_jax.weights import Weight

__all__ = [
    "GPT",
    "Dropout",
    "GPTConfig",
    "KVCache",
    "LayerKind",
    "RopeScaling",
    "count",
    "declared",
    "for_one_row",
    "free",
    "init",
    "init_cache",
    "insert",
    "stack",
    "unstack",
]


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    cfg: GPTConfig

    def setup(self):
        cfg = self.cfg
        self.norm1 = Norm("embed", cfg.norm, cfg)
        self.attn = Attention(cfg)
        self.norm2 = Norm("embed", cfg.norm, cfg)
        self.mlp = MLP(cfg)
        if cfg.norm_placement == "both":
            self.post1 = Norm("embed", cfg.norm, cfg)
            self.post2 = Norm("embed", cfg.norm, cfg)

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


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al. 2019, and its descendants)."""

    cfg: GPTConfig

    def setup(self):
        cfg = self.cfg
        self.embed = Embed("vocab", cfg)
        if cfg.position == "learned":
            self.positions = Embed("position", cfg)
        if cfg.embed_norm:
            self.embed_norm = Norm("embed", cfg.norm, cfg)
        if cfg.scan_layers and cfg.n_periods:
            self.blocks = Period(cfg)
        for i in range(cfg.n_scanned if cfg.scan_layers else 0, cfg.n_layers):
            setattr(self, f"block_{i}", Block(cfg))
        self.final_norm = Norm("embed", cfg.norm, cfg)
        if cfg.n_classes:
            self.classifier = Dense(("embed",), ("classes",), True, cfg, draw="head")
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
            first = cfg.n_scanned
        pasts = []
        for i in range(first, cfg.n_layers):
            past = None if cache is None else (cache.keys[i], cache.values[i])

            def run(block, x_BTD, past, i=i):
                return layer(block, x_BTD, i % P, past, i)

            if cfg.remat != "none":
                run = nn.remat(run, policy=REMAT[cfg.remat])
            x_BTD = constrained(x_BTD, EXAMPLES)
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
                x_BTD = constrained(x_BTD, EXAMPLES)
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


class Period(nn.Module):
    """One round of the layer pattern: what `scan_layers` repeats."""

    cfg: GPTConfig

    def setup(self):
        for j in range(len(self.cfg.pattern)):
            setattr(self, f"kind_{j}", Block(self.cfg))


def init_cache(cfg: GPTConfig, batch: int, max_length: int, dtype) -> KVCache:
    """Returns an empty cache of `batch` rows of up to `max_length` tokens."""
    if max_length > cfg.context_length:
        raise ValueError(
            f"a cache of {max_length} tokens is longer than context_length "
            f"{cfg.context_length}"
        )
    shape = (batch, cfg.n_kv_heads, max_length, cfg.head_dim)
    return KVCache(
        keys=tuple(by_head(jnp.zeros(shape, dtype)) for _ in range(cfg.n_layers)),
        values=tuple(by_head(jnp.zeros(shape, dtype)) for _ in range(cfg.n_layers)),
        length_B=jnp.zeros((batch,), jnp.int32),
    )


# ---------------------------------------------------------------- weights


@cache  # tracing a model takes a while, and many runs may share one
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
