"""What happens inside a forward pass: taps on the model's own layers.

Flax lets a function stand before every method of a module (`nn.intercept_methods`).
So the numbers here are those that the model computes with, whatever its switches and
whichever implementation of attention it takes; nothing of it is written a second time.

Shapes: B rows  T time  S key time  L layers  D width  H heads  G key/value heads
K head dim  V vocabulary
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.model import GPT, GPTConfig, hidden, logits


class Row(NamedTuple):
    """Tokens that are looked at: one document, or several that do not see each other.

    Attributes:
      tokens_T: int32 ids.
      positions_T: int32; they begin anew with each document.
      segments_T: int32, the number of each token's document.
    """

    tokens_T: np.ndarray
    positions_T: np.ndarray
    segments_T: np.ndarray

    @property
    def packed(self) -> bool:
        """Whether there is more than one document."""
        return bool(self.segments_T.any())


class Seen(NamedTuple):
    """What one forward pass showed, float32.

    Attributes:
      stream_LTD: the residual stream before the first layer and after each: L + 1.
      attn_LTD, mlp_LTD: what each layer's attention and MLP added to it.
      read_LTHK: what each head read: the weighted mean of its values.
      weight_LHTS: attention weights.
      logits_TV: of the next token.
    """

    stream_LTD: jax.Array
    attn_LTD: jax.Array
    mlp_LTD: jax.Array
    read_LTHK: jax.Array
    weight_LHTS: jax.Array
    logits_TV: jax.Array


def row(documents: list[list[int]]) -> Row:
    """Returns the row of some documents, one after the other."""
    lengths = [len(ids) for ids in documents]
    return Row(
        np.concatenate([np.array(ids, np.int32) for ids in documents]),
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
    )


class Patch(NamedTuple):
    """What takes the place of a residual stream.

    Attributes:
      layer: int32, traced: before which layer; L is behind the last.
      swapped_BT: bool: where.
      stream_LTD: the streams of a row that was seen, L + 1 of them.
    """

    layer: jax.Array
    swapped_BT: jax.Array
    stream_LTD: jax.Array

    def __call__(self, x_BTD, layer: int):
        """Returns the stream before a layer, with the other's put in."""
        here_BT1 = (self.swapped_BT & (self.layer == layer))[..., None]
        other_1TD = self.stream_LTD[layer][None].astype(x_BTD.dtype)
        return jnp.where(here_BT1, other_1TD, x_BTD)


class _Taps:
    """Stands before every call of a layer; keeps what the layers return, by path.

    Attention weights are not what an implementation of attention returns. But what it
    returns is linear in the values: with the value of key s set to the s-th unit vector
    it returns the weights themselves, K of them at a time.
    """

    def __init__(self, cfg: GPTConfig, tokens: int):
        self.cfg, self.tokens = cfg, tokens
        self.found: dict[tuple[str, ...], Any] = {}
        self.read: Any = None  # what the heads read in the last call of attention
        self.units: jax.Array | None = None  # stand for the values

    def __call__(self, call, args, kwargs, context):
        path = context.module.path
        if context.method_name != "__call__" or not path:
            return call(*args, **kwargs)
        part = "/".join(path[1:])
        if part == "attn/value" and self.units is not None:
            return self.units
        if part == "attn/out":
            self.read = args[0]
        made = call(*args, **kwargs)
        if part == "attn":
            self.found[path[0], "read"] = self.read
            self.found[path[0], "weight"] = self._weights(lambda: call(*args, **kwargs))
        if path == ("block_0",):
            self.found["embedded",] = args[0]
        # Blocks and attention also return what they remember.
        of_two = path[0].startswith("block_") and part in ("", "attn")
        self.found[path] = made[0] if of_two else made
        return made

    def _weights(self, attend: Callable[[], Any]) -> jax.Array:
        """Returns the weights of the attention that `attend` calls, [B, T, H, S]."""
        T, G, K = self.tokens, self.cfg.n_kv_heads, self.cfg.head_dim
        columns = []
        for first in range(0, T, K):
            unit_SK = jnp.eye(T, K, -first, dtype=self.cfg.dtype)
            self.units = jnp.broadcast_to(unit_SK[None, :, None], (1, T, G, K))
            attend()
            columns.append(self.read)
        self.units = None
        return jnp.concatenate(columns, -1)[..., :T]


def see(gpt: GPT, params, row: Row) -> Seen:
    """Runs the model over a row, once, and returns what its layers did.

    Raises:
      ValueError: the layers are scanned; `model.unstack` the weights first.
    """
    cfg = gpt.cfg
    if cfg.scan_layers:
        raise ValueError("taps need scan_layers=False: unstack the weights first")
    taps = _Taps(cfg, len(row.tokens_T))
    with nn.intercept_methods(taps):
        x_BTD = _features(gpt, params, row, rows=1)
    names = [f"block_{layer}" for layer in range(cfg.n_layers)]
    # Where a part has a norm behind it, what is added is what that norm returns.
    behind = cfg.norm_placement != "pre"
    added = ("post1", "post2") if behind else ("attn", "mlp")

    def stacked(*part: str):
        found = [taps.found[name, *part] for name in names]
        return jnp.stack([x[0].astype(jnp.float32) for x in found])

    before_TD = taps.found["embedded",][0].astype(jnp.float32)
    return Seen(
        stream_LTD=jnp.concatenate([before_TD[None], stacked()]),
        attn_LTD=stacked(added[0]),
        mlp_LTD=stacked(added[1]),
        read_LTHK=stacked("read"),
        weight_LHTS=stacked("weight").swapaxes(1, 2),
        logits_TV=logits(gpt, params, x_BTD)[0],
    )


def lens(gpt: GPT, params, x_TD) -> jax.Array:
    """Returns the float32 logits [T, V] that a residual stream would give at the end.

    The logit lens (nostalgebraist 2020): the last norm and the head, applied early.
    """

    def end(gpt: GPT, x_BTD):
        return gpt.logits(gpt.final_norm(x_BTD))

    return applied(gpt, params, end, x_TD[None].astype(gpt.cfg.dtype))[0]


def patched(gpt: GPT, params, row: Row, patch: Patch) -> jax.Array:
    """Returns the logits [B, V] at the last token of a row, each with its own patch."""

    def put(call, args, kwargs, context):
        path, cfg = context.module.path, gpt.cfg
        if context.method_name == "__call__" and len(path) == 1:
            layer = cfg.n_layers if path[0] == "final_norm" else -1
            if path[0].startswith("block_"):
                layer = int(path[0].removeprefix("block_"))
            if layer >= 0:
                args = (patch(args[0], layer), *args[1:])
        return call(*args, **kwargs)

    with nn.intercept_methods(put):
        x_BTD = _features(gpt, params, row, rows=len(patch.swapped_BT))
    return logits(gpt, params, x_BTD[:, -1])


def _features(gpt: GPT, params, row: Row, *, rows: int):
    """Returns the normed stream [B, T, D] of a row, so many times over."""
    arrays = (row.tokens_T, row.positions_T, row.segments_T)
    tokens_BT, positions_BT, segments_BT = (
        jnp.broadcast_to(jnp.asarray(x_T), (rows, len(x_T))) for x_T in arrays
    )
    documents = segments_BT if row.packed else None
    return hidden(gpt, params, tokens_BT, positions_BT, documents).x_BTD


def applied(gpt: GPT, params, method: Callable, *args) -> Any:
    """Returns what a function of the module and arrays returns."""
    return gpt.apply({"params": params}, *args, method=method)
