"""The rows of a server: their state on the device and the programs that change it.

    logits, row, x = prefill(params, row, tokens, ...)   # a piece of one prompt
    batch, chosen = admit(batch, row, logits, ...)       # the row joins, first token
    batch, chosen = step(params, batch, running, ...)    # one token for every row

All are plain functions of fixed shapes; the engine compiles them before its first
request. A row never depends on its neighbours (see sample/).

Shapes: B rows  T tokens of a piece  S room of a row  V vocabulary  D width
K alternatives  N biases  E ends  W words of 32 tokens
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.model import GPT, Cache, GPTConfig, hidden, init_cache, insert, logits
from gpt_jax.model import stretch as stretch_cache
from gpt_jax.sample import Sampling, choose, rows_of
from gpt_jax.sampling import settings

TOP = 20  # alternatives told with a token; OpenAI's most, so shapes stay few
BIASED = 300  # tokens of a row whose logits may be biased; so shapes stay few
ENDING = 32  # tokens that may end a row
NO_TOKEN = 2**31 - 1  # fills the places of biases and ends that there are not
BITS = 32  # tokens in a word of a mask
SCORED = 16  # positions whose logits are held at once: bounds memory only

# What costs least, for idle rows.
GREEDY = settings(0, temperature=0.0)


class Rules(NamedTuple):
    """What a row's logits are changed by before a token is chosen."""

    bias_id_BN: Any  # int32: NO_TOKEN where there is no more
    bias_BN: Any  # float32: added to the logits of these
    end_BE: Any  # int32: tokens that end the row, NO_TOKEN where there is no more
    begin_B: Any  # int32: where what is written begins: the prompt's length
    least_B: Any  # int32: so many tokens are written before one of the ends may come


class Allowed(NamedTuple):
    """Which tokens may come next; what a grammar allows changes with every token."""

    masked_B: Any  # bool: whether a row has a mask; without one every token may come
    words_BW: Any  # uint32: a bit for each token, the lowest first


class Batch(NamedTuple):
    """Rows on their way; every leaf has B in front."""

    cache: Cache  # holds every token but the newest
    tokens_BS: jax.Array  # int32: the prompt, then what was chosen
    sampling: Sampling
    rules: Rules
    key_B: jax.Array
    wants_B: jax.Array  # bool: log-probabilities too

    @property
    def reach(self) -> int:
        """How many tokens the caches hold."""
        return self.cache.reach


class Entry(NamedTuple):
    """What a row brings along when it joins, but for its cache."""

    tokens_S: Any  # int32: the prompt, right-padded to the room of a row
    sampling: Sampling  # this and the rest: [1]
    rules: Rules
    key_1: jax.Array
    wants_1: Any


class Chosen(NamedTuple):
    """What a step brought; log-probabilities are 0 unless a row wants them."""

    token_B: jax.Array
    logprob_B: jax.Array  # of the token, before rules, penalties and filters
    top_BK: jax.Array  # the likeliest tokens
    top_logprob_BK: jax.Array


def empty(cfg: GPTConfig, rows: int, reach: int) -> Batch:
    """Returns rows in which nothing runs; their caches hold `reach` tokens."""
    return Batch(
        cache=init_cache(cfg, rows, reach, jnp.dtype(cfg.dtype)),
        tokens_BS=jnp.zeros((rows, cfg.context_length), jnp.int32),
        sampling=rows_of([GREEDY] * rows),
        rules=jax.tree.map(jnp.asarray, rules(rows)),
        key_B=jax.random.split(jax.random.key(0), rows),
        wants_B=jnp.zeros(rows, bool),
    )


def rules(
    rows: int,
    *,
    begin: int = 0,
    bias: Mapping[int, float] | None = None,
    ends: Sequence[int] = (),
    least: int = 0,
) -> Rules:
    """Returns the same rules for so many rows; by default they change nothing."""
    ids_N, bias_N = np.full(BIASED, NO_TOKEN, np.int32), np.zeros(BIASED, np.float32)
    for i, (token, number) in enumerate((bias or {}).items()):
        ids_N[i], bias_N[i] = token, number
    end_E = np.full(ENDING, NO_TOKEN, np.int32)
    end_E[: len(ends)] = ends
    one = (ids_N, bias_N, end_E, np.array(begin, np.int32), np.array(least, np.int32))
    return Rules(*(np.repeat(x[None], rows, axis=0) for x in one))


def allowed(rows: int, vocabulary: int, masks: Mapping[int, np.ndarray]) -> Allowed:
    """Returns what rows may choose, by the masks of some; of the others everything.

    Args:
      rows: how many.
      vocabulary: how many tokens there are.
      masks: uint32 [W] of a row.
    """
    found = Allowed(
        np.zeros(rows, bool), np.zeros((rows, -(-vocabulary // BITS)), np.uint32)
    )
    for row, words_W in masks.items():
        found.masked_B[row], found.words_BW[row] = True, words_W
    return found


def resize(batch: Batch, row_B) -> Batch:
    """Returns the rows `row_B` of a batch, in that order, as a batch."""
    return jax.tree.map(lambda x: x[row_B], batch)


def stretch(batch: Batch, reach: int) -> Batch:
    """Returns the rows with caches that hold `reach` tokens: more, or fewer."""
    return batch._replace(cache=stretch_cache(batch.cache, reach))


def prefill(params, row: Cache, tokens_1T, start, count, *, model: GPT):
    """Runs the tokens `start` to `start + count` of a prompt.

    Args:
      params: the weights.
      row: a cache of one row that holds the tokens before `start`; what it holds
        beyond is never seen.
      tokens_1T: right-padded.
      start, count: traced; count at least 1.

    Returns:
      logits [1, V] after the last of them; the cache, now with them; the last
      hidden states [T, D], from which `score` reads the prompt's probabilities.
    """
    row = row._replace(length_B=jnp.reshape(start, 1).astype(jnp.int32))
    x_BTD, row, _ = hidden(model, params, tokens_1T, cache=row)
    last_1D = jax.lax.dynamic_slice_in_dim(x_BTD[0], count - 1, 1)
    logits_1V = logits(model, params, last_1D)
    length_B = jnp.reshape(start + count, 1).astype(jnp.int32)
    return logits_1V, row._replace(length_B=length_B), x_BTD[0]


def score(params, x_TD, next_T, *, model: GPT):
    """Returns how likely each next token of a prompt was: fields of Chosen, [T, ...].

    Args:
      params: the weights.
      x_TD: what `prefill` returned.
      next_T: the token that follows each.
    """

    def some(part):
        x_PD, next_P = part
        return _told(logits(model, params, x_PD), next_P)

    size = math.gcd(SCORED, len(next_T))
    parts = (x_TD.reshape(-1, size, x_TD.shape[1]), next_T.reshape(-1, size))
    told = jax.lax.map(some, parts)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), told)


def admit(batch: Batch, row: Cache, logits_1V, entry: Entry, slot, allow: Allowed):
    """Puts a row whose prompt has run into a slot and chooses its first token.

    Args:
      batch: the rows; that in `slot` is gone afterwards.
      row: the prompt's cache, which `prefill` returned with `logits_1V`; the prompt
        fits into the caches of the batch.
      logits_1V: after the prompt's last token.
      entry: what else the row brings.
      slot: traced.
      allow: what its first token may be, of one row.

    Returns:
      the batch and Chosen of one row.
    """
    tokens_S, sampling, ruling, key_1, wants_1 = entry
    chosen = _choose(
        *(logits_1V, tokens_S[None], row.length_B, sampling, ruling, allow),
        *(key_1, wants_1),
    )
    tokens_S = tokens_S.at[row.length_B].set(chosen.token_B, mode="drop")

    def put(old_B, new_1):
        return old_B.at[slot].set(new_1[0])

    batch = Batch(
        cache=insert(batch.cache, row, slot),
        tokens_BS=batch.tokens_BS.at[slot].set(tokens_S),
        sampling=jax.tree.map(put, batch.sampling, sampling),
        rules=jax.tree.map(put, batch.rules, ruling),
        key_B=put(batch.key_B, key_1),
        wants_B=put(batch.wants_B, wants_1),
    )
    return batch, chosen


def step(params, batch: Batch, running_B, allow: Allowed, *, model: GPT):
    """Gives one more token to the rows that run; returns the batch and Chosen."""
    rows, room = batch.tokens_BS.shape
    held_B = batch.cache.length_B
    newest_B = batch.tokens_BS[jnp.arange(rows), jnp.minimum(held_B, room - 1)]
    x_BTD, cache, _ = hidden(model, params, newest_B[:, None], cache=batch.cache)
    logits_BV = logits(model, params, x_BTD[:, 0])
    length_B = held_B + 1
    idle = rows_of([GREEDY])
    sampling = jax.tree.map(partial(jnp.where, running_B), batch.sampling, idle)
    ruling = batch.rules._replace(  # of who has left nothing is to be done
        bias_BN=jnp.where(running_B[:, None], batch.rules.bias_BN, 0),
        least_B=jnp.where(running_B, batch.rules.least_B, 0),
    )
    wants_B = running_B & batch.wants_B
    chosen = _choose(
        *(logits_BV, batch.tokens_BS, length_B, sampling, ruling, allow),
        *(batch.key_B, wants_B),
    )
    place_B = jnp.where(running_B, length_B, room)  # room: dropped
    tokens_BS = batch.tokens_BS.at[jnp.arange(rows), place_B].set(
        chosen.token_B, mode="drop"
    )
    cache = cache._replace(length_B=jnp.where(running_B, length_B, held_B))
    return batch._replace(cache=cache, tokens_BS=tokens_BS), chosen


def ruled(logits_BV, ruling: Rules, allow: Allowed, length_B):
    """Returns the logits of rows of `length_B` tokens as their rules change them."""
    row_B1 = jnp.arange(len(logits_BV))[:, None]
    early_B = length_B - ruling.begin_B < ruling.least_B

    def changed():
        biased_BV = logits_BV.at[row_B1, ruling.bias_id_BN].add(
            ruling.bias_BN, mode="drop"
        )
        barred_BE = jnp.where(early_B[:, None], ruling.end_BE, NO_TOKEN)
        endless_BV = biased_BV.at[row_B1, barred_BE].set(-jnp.inf, mode="drop")
        return jnp.where(_may_come(allow, logits_BV.shape[1]), endless_BV, -jnp.inf)

    # One question for all of them: each would copy the logits to say no.
    any_rule = (ruling.bias_BN != 0).any() | early_B.any() | allow.masked_B.any()
    return jax.lax.cond(any_rule, changed, lambda: logits_BV)


def _may_come(allow: Allowed, vocabulary: int):
    """Returns bool [B, V]: whether a token may come next."""
    place_11b = jnp.arange(BITS, dtype=jnp.uint32)[None, None]
    bit_BWb = (allow.words_BW[:, :, None] >> place_11b) & 1
    found_BV = bit_BWb.reshape(len(allow.words_BW), -1)[:, :vocabulary] == 1
    return found_BV | ~allow.masked_B[:, None]


def _choose(
    logits_BV, tokens_BS, length_B, sampling, ruling, allow: Allowed, key_B, wants_B
) -> Chosen:
    token_B = choose(
        *(ruled(logits_BV, ruling, allow, length_B), tokens_BS),
        *(ruling.begin_B, length_B, sampling, key_B),
    ).astype(jnp.int32)
    like = jax.eval_shape(_told, logits_BV, token_B)
    return jax.lax.cond(
        wants_B.any(),
        lambda: _told(logits_BV, token_B),
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like),
    )._replace(token_B=token_B)


def _told(logits_BV, token_B) -> Chosen:
    logp_BV = jax.nn.log_softmax(logits_BV)
    own_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]
    top_logp_BK, top_BK = jax.lax.top_k(logp_BV, min(TOP, logits_BV.shape[-1]))
    return Chosen(token_B, own_B, top_BK, top_logp_BK)
