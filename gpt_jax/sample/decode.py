"""Prefill and the decode loop: rows on their way, until each has a reason to end.

    state = start(params, tokens_BT, length_B, sampling, key_B, ...)  # the first token
    state = advance(params, state, sampling, key_B, steps, ...)       # a few more
    state = generate(...)                                             # all of them

A row never depends on its neighbours, on padding or on the size of the batch.

Shapes: B rows  T prompt positions  S cache positions  V vocabulary  D width
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from gpt_jax import mesh, native, quantised
from gpt_jax.attention import NATIVE
from gpt_jax.model import (
    GPT,
    Cache,
    GPTConfig,
    declared,
    for_one_row,
    hidden,
    init_cache,
    logits,
    rounded,
    unstack,
)
from gpt_jax.sample.filters import Sampling, choose

RUNNING, STOP, LENGTH = 0, 1, 2  # the reason of a row; the last two end it
LONG = 1024  # contexts that a kernel of ours reads, where there is one
NGRAM = 2  # newest tokens that are looked up for a guess at the next ones


class Decoding(NamedTuple):
    """Rows on their way; a row ends by getting a reason."""

    cache: Cache  # holds every token but the newest
    tokens_BS: jax.Array  # int32: the prompt, then what was chosen, then zeros
    begin_B: jax.Array  # int32: where what was chosen begins
    length_B: jax.Array  # int32: tokens of the row so far, a stop token included
    limit_B: jax.Array  # int32: the length at which the row ends
    reason_B: jax.Array  # int32: RUNNING, STOP or LENGTH
    drafts: Cache | None = None  # of the same tokens, by the model that guesses ahead


def prefill(params, tokens_BT, length_B, *, model: GPT, max_length: int):
    """Runs right-padded prompts: (logits [B, V] at each last token, cache).

    Every length is at least 1. Pads are written to the cache beyond its length, where
    nothing sees them and the next tokens overwrite them.
    """
    rows = len(tokens_BT)
    cache = init_cache(model.cfg, rows, max_length, jnp.dtype(model.cfg.dtype))
    found = hidden(model, params, tokens_BT, cache=cache)
    last_BD = found.x_BTD[jnp.arange(rows), length_B - 1]
    return logits(model, params, last_BD), found.cache._replace(length_B=length_B)


def start(
    params,
    tokens_BT,
    length_B,
    sampling: Sampling,
    key_B,
    *,
    model: GPT,
    max_length: int,
    stop_id: int | None,
    begin_B=None,
    draft: GPT | None = None,
    draft_params=None,
) -> Decoding:
    """Runs the prompts and chooses each row's first token.

    Args:
      params: weights of unrolled layers (see `laid_out`).
      tokens_BT: prompts, right-padded; ids inside the vocabulary.
      length_B: tokens in each prompt, 1 to max_length.
      sampling: the settings of each row.
      key_B: a PRNG key for each row.
      model: the model.
      max_length: the size of the cache, at most the model's context; a row that
        reaches it ends with LENGTH. A prompt of that length gets no new token.
      stop_id: the token that ends a row with STOP (may be traced), or None.
      begin_B: where in a prompt what was chosen earlier begins; None = behind it.
      draft, draft_params: a model that is to guess ahead, laid out as well.
    """
    # Of a buffer of its own: `advance` is given the state to use up.
    begin_B = (length_B if begin_B is None else begin_B) + 0
    logits_BV, cache = prefill(
        params, tokens_BT, length_B, model=model, max_length=max_length
    )
    width = tokens_BT.shape[1]
    valid_BT = jnp.arange(width)[None] < length_B[:, None]
    tokens_BS = jnp.pad(
        jnp.where(valid_BT, tokens_BT, 0), ((0, 0), (0, max_length - width))
    )
    limit_B = jnp.minimum(length_B + sampling.max_new, max_length)
    reason_B = jnp.where(length_B < limit_B, RUNNING, LENGTH)
    state = Decoding(cache, tokens_BS, begin_B, length_B, limit_B, reason_B)
    if draft is not None:
        given = (draft_params, tokens_BT, length_B)
        _, drafts = prefill(*given, model=draft, max_length=max_length)
        state = state._replace(drafts=drafts)
    return _append(state, logits_BV, sampling, key_B, stop_id)


def step(
    params, state: Decoding, sampling, key_B, *, model: GPT, stop_id: int | None
) -> Decoding:
    """Gives one more token to every row that still runs."""
    rows = jnp.arange(len(state.length_B))
    newest_B1 = state.tokens_BS[rows, state.length_B - 1][:, None]
    x_BTD, cache, _ = hidden(model, params, newest_B1, cache=state.cache)
    logits_BV = logits(model, params, x_BTD[:, 0])
    running_B = state.reason_B == RUNNING
    held_B = jnp.where(running_B, cache.length_B, state.cache.length_B)
    state = state._replace(cache=cache._replace(length_B=held_B))
    return _append(state, logits_BV, sampling, key_B, stop_id)


def guess(tokens_BS, length_B, count: int):
    """Returns what stood behind the newest tokens where they stood before.

    Prompt lookup (Saxena 2023): texts repeat names, phrases and code of their prompts.

    Args:
      tokens_BS: the texts, S at least `count`.
      length_B: how many tokens each has.
      count: how many tokens are guessed.

    Returns:
      (tokens [B, count], whether the newest NGRAM tokens of a row stood before [B]).
    """
    place_1S, last_B1 = jnp.arange(tokens_BS.shape[1])[None], length_B[:, None] - 1
    same_BS = (place_1S >= NGRAM - 1) & (place_1S < last_B1)
    for back in range(NGRAM):
        newest_B1 = jnp.take_along_axis(tokens_BS, last_B1 - back, axis=1, mode="clip")
        same_BS &= jnp.roll(tokens_BS, back, axis=1) == newest_B1
    end_B = jnp.where(same_BS, place_1S, -1).max(1)
    behind_BM = end_B[:, None] + 1 + jnp.arange(count)[None]
    found_BM = jnp.take_along_axis(tokens_BS, behind_BM, axis=1, mode="clip")
    return found_BM, end_B >= 0


def guess_ahead(
    params, state: Decoding, sampling, key_B, count: int, *, model: GPT, stop_id
):
    """Returns what a smaller model would write next.

    It draws with the row's own key, so it draws the token of the larger one wherever
    the two agree well enough, at any temperature.

    Args:
      params, model: of the smaller model, whose cache is `state.drafts`.
      state: the rows.
      sampling, key_B: as for `step`.
      count: how many tokens are guessed.
      stop_id: the token that ends a row.

    Returns:
      (tokens [B, count], zeros where it ends a row; its cache with them in it).
    """
    assert state.drafts is not None
    ahead = state._replace(cache=state.drafts)
    for _ in range(count + 1):  # the last one only reads the last guess
        ahead = step(params, ahead, sampling, key_B, model=model, stop_id=stop_id)
    place_BM = state.length_B[:, None] + jnp.arange(count)[None]
    guess_BM = jnp.take_along_axis(ahead.tokens_BS, place_BM, axis=1, mode="clip")
    return guess_BM, ahead.cache


def try_out(
    params, state: Decoding, guess_BM, sampling, key_B, *, model: GPT, stop_id
) -> Decoding:
    """Reads guesses in one pass and gives every running row the tokens of `step`.

    A token is a function of its logits, its place and the row's key. So the text is
    the one that is written token by token: where a guess is right the logits behind it
    are, too; the first that is not ends the row's turn (Leviathan et al. 2023).
    """
    rows, count = jnp.arange(len(state.length_B)), guess_BM.shape[1]
    newest_B1 = state.tokens_BS[rows, state.length_B - 1][:, None]
    read_BT = jnp.concatenate([newest_B1, guess_BM], axis=1)
    x_BTD, cache, _ = hidden(model, params, read_BT, cache=state.cache)
    logits_BTV = logits(model, params, x_BTD)
    ran_B = on_B = state.reason_B == RUNNING
    for i in range(count + 1):
        state = _append(state, logits_BTV[:, i], sampling, key_B, stop_id, on_B)
        if i < count:
            wrote_B = state.tokens_BS[rows, state.length_B - 1]
            on_B &= (wrote_B == guess_BM[:, i]) & (state.reason_B == RUNNING)
    # What is behind it in the cache is overwritten before anything sees it.
    held_B = jnp.where(ran_B, state.length_B - 1, state.cache.length_B)
    return state._replace(cache=cache._replace(length_B=held_B))


def _append(state, logits_BV, sampling, key_B, stop_id, on_B=None):
    """Chooses a token for every running row (that is on), and ends the rows it ends."""
    begin_B, length_B = state.begin_B, state.length_B
    token_B = choose(logits_BV, state.tokens_BS, begin_B, length_B, sampling, key_B)
    running_B = state.reason_B == RUNNING
    if on_B is not None:
        running_B &= on_B
    rows, width = state.tokens_BS.shape
    place_B = jnp.where(running_B, state.length_B, width)  # width: dropped
    tokens_BS = state.tokens_BS.at[jnp.arange(rows), place_B].set(token_B, mode="drop")
    length_B = state.length_B + running_B.astype(jnp.int32)
    ended_B = jnp.where(length_B < state.limit_B, RUNNING, LENGTH)
    if stop_id is not None:
        ended_B = jnp.where(token_B == stop_id, STOP, ended_B)
    reason_B = jnp.where(running_B, ended_B, state.reason_B)
    return state._replace(tokens_BS=tokens_BS, length_B=length_B, reason_B=reason_B)


def advance(
    params,
    state: Decoding,
    sampling,
    key_B,
    steps,
    draft_params=None,
    *,
    model: GPT,
    stop_id: int | None,
    lookup: int = 0,
    draft: GPT | None = None,
) -> Decoding:
    """Takes up to `steps` (traced) steps; fewer when every row has ended.

    With `lookup` a step also tries out so many guesses: those of the model `draft`, or
    of the text itself, where it has some.
    """
    fixed = {"model": model, "stop_id": stop_id}

    def going(carry):
        taken, state = carry
        return (taken < steps) & (state.reason_B == RUNNING).any()

    def body(carry):
        taken, state = carry
        return taken + 1, once(state)

    def once(state):
        if not lookup:
            return step(params, state, sampling, key_B, **fixed)
        if draft is not None:
            drawn = (draft_params, state, sampling, key_B, lookup)
            guess_BM, drafts = guess_ahead(*drawn, model=draft, stop_id=stop_id)
            state = try_out(params, state, guess_BM, sampling, key_B, **fixed)
            held_B = state.cache.length_B
            return state._replace(drafts=drafts._replace(length_B=held_B))
        guess_BM, found_B = guess(state.tokens_BS, state.length_B, lookup)
        return jax.lax.cond(
            (found_B & (state.reason_B == RUNNING)).any(),
            lambda state: try_out(params, state, guess_BM, sampling, key_B, **fixed),
            lambda state: step(params, state, sampling, key_B, **fixed),
            state,
        )

    return jax.lax.while_loop(going, body, (0, state))[1]


def generate(
    params,
    tokens_BT,
    length_B,
    sampling: Sampling,
    key_B,
    *,
    model: GPT,
    max_length: int,
    stop_id: int | None,
):
    """Prefill and the whole loop: one program under jit, model and max_length static.

    Takes what `start` takes; returns (tokens_BS with S = max_length, zero beyond the
    row's length; length_B, the stop token included; reason_B: STOP or LENGTH).
    """
    fixed = {"model": model, "stop_id": stop_id}
    state = start(
        params, tokens_BT, length_B, sampling, key_B, max_length=max_length, **fixed
    )
    state = advance(params, state, sampling, key_B, max_length, **fixed)
    return state.tokens_BS, state.length_B, state.reason_B


def laid_out(model: GPT, params, *, rows: int):
    """Returns (model, params) with the weights as decoding so many rows reads them.

    One array per layer: slices of stacked weights would be copied for every token,
    three times slower. For one row on a CPU, kernels transposed (`model.for_one_row`),
    which are a second copy. Weights wider than the activations are rounded, once. A
    long cache is read by a kernel of ours, where one can be had. What is laid out
    already is returned as is.
    """
    if model.cfg.scan_layers:
        params = unstack(params, model.cfg)
        model = GPT(replace(model.cfg, scan_layers=False))
    if model.cfg.dtype != model.cfg.param_dtype:
        params = rounded(params, declared(model.cfg), model.cfg.dtype)
    if rows == 1 and mesh.platform() == "cpu":
        params = for_one_row(params, declared(model.cfg))
    if model.cfg.attention == "auto" and _natively(model.cfg, params):
        model = GPT(replace(model.cfg, attention=NATIVE))
    return model, params


def _natively(cfg: GPTConfig, params) -> bool:
    """Whether a kernel of ours is to read the cache.

    On one CPU, outside of a larger program, and where that pays for its compiling: with
    long contexts, and with weights or a cache of few bits.
    """
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, Tracer) or len(getattr(leaf, "devices", set)()) > 1:
        return False
    few = quantised.are(params) or cfg.cache_dtype
    return bool(cfg.context_length >= LONG or few) and native.attends(cfg)
