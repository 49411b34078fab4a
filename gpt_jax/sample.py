"""From a prompt to text: filters, prefill, the decode loop, texts and streams.

    state = start(params, tokens_BT, length_B, sampling, key_B, ...)  # the first token
    state = advance(params, state, sampling, key_B, steps, ...)       # a few more
    state = generate(...)                                             # all of them

A row never depends on its neighbours, on padding or on the size of the batch: it has
its own settings and its own key, folded with the position of the token it chooses.

Shapes: B rows  T prompt positions  S cache positions  V vocabulary  D width
N blocks of the vocabulary  M tokens in a block
"""

import math
import re
import zlib
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import commands, mesh, sharding
from gpt_jax.model import (
    GPT,
    Cache,
    declared,
    for_one_row,
    hidden,
    init_cache,
    logits,
    rounded,
    unstack,
)
from gpt_jax.sampling import MOST, SETTINGS, check

RUNNING, STOP, LENGTH = 0, 1, 2  # the reason of a row; the last two end it

ROWS = 32  # rows decoded at once: only bounds memory, since rows are independent
TAIL = 8  # tokens of a prompt that may decide how the next one is spelled
TEXT_STEPS, STREAM_STEPS = 16, 4  # tokens between two looks at the text: latency only


class Sampling(NamedTuple):
    """How each row chooses its tokens: traced [B] arrays, so nothing recompiles.

    `sampling.SETTINGS` says what each is; `max_new` is how many tokens are chosen.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    frequency_penalty: jax.Array
    presence_penalty: jax.Array
    max_new: jax.Array


class Decoding(NamedTuple):
    """Rows on their way; a row ends by getting a reason."""

    cache: Cache  # holds every token but the newest
    tokens_BS: jax.Array  # int32: the prompt, then what was chosen, then zeros
    begin_B: jax.Array  # int32: where what was chosen begins
    length_B: jax.Array  # int32: tokens of the row so far, a stop token included
    limit_B: jax.Array  # int32: the length at which the row ends
    reason_B: jax.Array  # int32: RUNNING, STOP or LENGTH


class Completion(NamedTuple):
    """What became of a prompt."""

    prompt: str | Sequence[int]
    text: str  # after the prompt; cut before a stop string
    ids: list[int]  # the tokens chosen, without an end-of-text or stop token
    reason: str  # "stop" or "length"
    detail: str  # which of the stops or limits it was, in words


# ---------------------------------------------------------------- filters


def penalise(logits_BV, seen_BV, penalty_B):
    """Returns logits with the seen tokens made less likely (CTRL, section 4.1).

    Positive logits are divided by the penalty, negative ones multiplied by it.
    """
    penalty_B1 = penalty_B[:, None]
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, less_BV, logits_BV)


def charge(logits_BV, count_BV, sampling: Sampling):
    """Returns logits less what tokens cost that were written `count` times.

    The formula of OpenAI's API: the frequency penalty for each time, the presence
    penalty once.
    """
    each_BV = count_BV * sampling.frequency_penalty[:, None]
    once_BV = jnp.minimum(count_BV, 1) * sampling.presence_penalty[:, None]
    return logits_BV - each_BV - once_BV


def temper(logits_BV, temperature_B):
    """Returns logits / temperature, shifted so that each row's best is 0."""
    shifted_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    # The shift and the floor keep the smallest temperatures from overflowing.
    return shifted_BV / jnp.maximum(temperature_B, 1e-6)[:, None]


def keep(logits_BV, sampling: Sampling):
    """Returns tempered logits with those left out by top-k, top-p or min-p at -inf.

    Top-p counts within what top-k left (nucleus sampling: Holtzman et al. 2020, section
    3.1); min-p is relative to the best token (Nguyen et al. 2024). Tokens that tie with
    the last one kept are kept too. The best token always stays.
    """
    ranked_B = (sampling.top_k > 0) | (sampling.top_p < 1)
    low_B = jax.lax.cond(
        ranked_B.any(),
        lambda: _lowest_kept(logits_BV, sampling),
        lambda: jnp.zeros(len(logits_BV)),
    )
    low_B = jnp.where(ranked_B, low_B, -jnp.inf)
    low_B = jnp.maximum(low_B, jnp.log(sampling.min_p))
    return jnp.where(logits_BV >= low_B[:, None], logits_BV, -jnp.inf)


def _lowest_kept(logits_BV, sampling):
    """Returns the smallest logit [B] that top-k and then top-p keep."""
    vocab = logits_BV.shape[-1]
    k_B = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    kth_B = _reaching(logits_BV, jnp.ones_like(logits_BV), k_B)
    kept_BV = logits_BV >= kth_B[:, None]
    chance_BV = jnp.where(kept_BV, jnp.exp(logits_BV), 0)
    wanted_B = sampling.top_p * chance_BV.sum(-1)
    nucleus_B = _reaching(logits_BV, chance_BV, wanted_B)
    # The rounding of a sum must not cut the tail of a row without top-p.
    return jnp.where(sampling.top_p < 1, jnp.maximum(kth_B, nucleus_B), kth_B)


def _reaching(logits_BV, weight_BV, wanted_B):
    """Returns the largest logit [B] such that it and those above weigh `wanted`.

    Halves the range of bit patterns, which order like the numbers 0 - logit, 31 times.
    For 50,257 logits on a CPU that takes 0.5 ms; sorting them takes 14 ms.
    """
    pattern_BV = jax.lax.bitcast_convert_type(0 - logits_BV, jnp.int32)

    def halve(i, short_B):
        tried_B = short_B + (1 << (30 - i))
        inside_BV = pattern_BV <= tried_B[:, None]
        weight_B = jnp.where(inside_BV, weight_BV, 0).sum(-1)
        return jnp.where(weight_B < wanted_B, tried_B, short_B)

    short_B = jnp.full(len(logits_BV), -1, jnp.int32)
    short_B = jax.lax.fori_loop(0, 31, halve, short_B)
    return -jax.lax.bitcast_convert_type(short_B + 1, jnp.float32)


def draw(logits_BV, key_B):
    """Returns a token id [B] for each row, with the probabilities softmax(logits).

    First a block of the vocabulary by its mass, then a token in it, each as the largest
    after adding Gumbel noise (Maddison et al. 2014, section 2). So two times sqrt(V)
    random numbers do: V of them took a tenth of a step at V = 50,257.
    """
    rows, vocab = logits_BV.shape
    width = math.isqrt(vocab - 1) + 1
    shifted_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    shifted_BV = jnp.pad(
        shifted_BV, ((0, 0), (0, -vocab % width)), constant_values=-jnp.inf
    )
    blocks_BNM = shifted_BV.reshape(rows, -1, width)
    mass_BN = jnp.log(jnp.exp(blocks_BNM).sum(-1))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (2, width)))(key_B)
    block_B = (mass_BN + noise[:, 0, : mass_BN.shape[1]]).argmax(-1)
    block_BM = blocks_BNM[jnp.arange(rows), block_B]
    return block_B * width + (block_BM + noise[:, 1]).argmax(-1)


def choose(logits_BV, tokens_BS, begin_B, length_B, sampling: Sampling, key_B):
    """Returns the next token id [B] of rows that hold `length_B` tokens.

    Those from `begin_B` on were chosen before; what is before them is the prompt.
    """
    logits_BV = jax.lax.cond(
        (sampling.repetition_penalty != 1).any(),
        lambda: penalise(
            logits_BV,
            _seen(tokens_BS, length_B, logits_BV.shape[-1]),
            sampling.repetition_penalty,
        ),
        lambda: logits_BV,
    )
    charged_B = (sampling.frequency_penalty != 0) | (sampling.presence_penalty != 0)
    logits_BV = jax.lax.cond(
        charged_B.any(),
        lambda: charge(
            logits_BV,
            _written(tokens_BS, begin_B, length_B, logits_BV.shape[-1]),
            sampling,
        ),
        lambda: logits_BV,
    )
    best_B = jax.lax.top_k(logits_BV, 1)[1][:, 0]  # argmax is ten times slower on CPU

    def drawn_or_best():
        kept_BV = keep(temper(logits_BV, sampling.temperature), sampling)
        drawn_B = draw(kept_BV, jax.vmap(jax.random.fold_in)(key_B, length_B))
        return jnp.where(sampling.temperature > 0, drawn_B, best_B)

    return jax.lax.cond((sampling.temperature > 0).any(), drawn_or_best, lambda: best_B)


def _seen(tokens_BS, length_B, vocab):
    """Returns bool [B, V]: whether the row's first `length` tokens hold the token."""
    rows, width = tokens_BS.shape
    valid_BS = jnp.arange(width) < length_B[:, None]
    token_BS = jnp.where(valid_BS, tokens_BS, vocab)
    seen_BV = jnp.zeros((rows, vocab), bool)
    return seen_BV.at[jnp.arange(rows)[:, None], token_BS].set(True, mode="drop")


def _written(tokens_BS, begin_B, length_B, vocab):
    """Returns float32 [B, V]: how often each token stands from `begin` to `length`."""
    rows, width = tokens_BS.shape
    place_S = jnp.arange(width)
    chosen_BS = (place_S >= begin_B[:, None]) & (place_S < length_B[:, None])
    token_BS = jnp.where(chosen_BS, tokens_BS, vocab)
    count_BV = jnp.zeros((rows, vocab), jnp.float32)
    return count_BV.at[jnp.arange(rows)[:, None], token_BS].add(1.0, mode="drop")


# ---------------------------------------------------------------- the decode loop


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
    """
    # Of a buffer of its own: `advance` is given the state to use up.
    begin_B = (length_B if begin_B is None else begin_B) + 0
    logits_BV, cache = prefill(
        params, tokens_BT, length_B, model=model, max_length=max_length
    )
    width = tokens_BT.shape[1]
    valid_BT = jnp.arange(width) < length_B[:, None]
    tokens_BS = jnp.pad(
        jnp.where(valid_BT, tokens_BT, 0), ((0, 0), (0, max_length - width))
    )
    limit_B = jnp.minimum(length_B + sampling.max_new, max_length)
    reason_B = jnp.where(length_B < limit_B, RUNNING, LENGTH)
    state = Decoding(cache, tokens_BS, begin_B, length_B, limit_B, reason_B)
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


def _append(state, logits_BV, sampling, key_B, stop_id):
    """Chooses a token for every running row, and ends the rows it ends."""
    begin_B, length_B = state.begin_B, state.length_B
    token_B = choose(logits_BV, state.tokens_BS, begin_B, length_B, sampling, key_B)
    running_B = state.reason_B == RUNNING
    rows, width = state.tokens_BS.shape
    place_B = jnp.where(running_B, state.length_B, width)  # width: dropped
    tokens_BS = state.tokens_BS.at[jnp.arange(rows), place_B].set(token_B, mode="drop")
    length_B = state.length_B + running_B
    ended_B = jnp.where(length_B < state.limit_B, RUNNING, LENGTH)
    if stop_id is not None:
        ended_B = jnp.where(token_B == stop_id, STOP, ended_B)
    reason_B = jnp.where(running_B, ended_B, state.reason_B)
    return state._replace(tokens_BS=tokens_BS, length_B=length_B, reason_B=reason_B)


def advance(
    params, state: Decoding, sampling, key_B, steps, *, model: GPT, stop_id: int | None
) -> Decoding:
    """Takes up to `steps` (traced) steps; fewer when every row has ended."""

    def going(carry):
        taken, state = carry
        return (taken < steps) & (state.reason_B == RUNNING).any()

    def body(carry):
        taken, state = carry
        state = step(params, state, sampling, key_B, model=model, stop_id=stop_id)
        return taken + 1, state

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
    which are a second copy. Weights wider than the activations are rounded, once. What
    is laid out already is returned as is.
    """
    if model.cfg.scan_layers:
        params = unstack(params, model.cfg)
        model = GPT(replace(model.cfg, scan_layers=False))
    if model.cfg.dtype != model.cfg.param_dtype:
        params = rounded(params, declared(model.cfg), model.cfg.dtype)
    if rows == 1 and mesh.platform() == "cpu":
        params = for_one_row(params, declared(model.cfg))
    return model, params


_start = jax.jit(start, static_argnames=("model", "max_length"))
_advance = jax.jit(advance, static_argnames="model", donate_argnums=1)


# ---------------------------------------------------------------- texts


def texts(
    *,
    model: GPT,
    params,
    tokenizer,
    prompts: Sequence[str | Sequence[int]],
    count: int,
    seed: int,
    stop: Sequence[str | int],
    beyond_context: bool = False,
    **settings,
) -> list[Completion]:
    """Continues every prompt `count` times; all samples of a prompt stand together.

    A completion is a function of the weights, its prompt, the seed, its number among
    the prompt's samples and the settings, and of nothing else.

    Args:
      model: the model; scanned layers are unrolled first.
      params: its weights, on one device or split over a mesh.
      tokenizer: makes ids of texts and texts of ids; its `ends` end a completion.
      prompts: texts, or token ids (which may hold special tokens). An empty one
        becomes the end-of-text token or, without one, a newline.
      count: samples of each prompt.
      seed: any integer.
      stop: strings that end a completion and are cut off, or ids of tokens that do.
      beyond_context: a row whose context is full goes on, and sees from there on the
        last half of it, again and again; else it ends. (nanoGPT drops the first token
        for every new one, and reads the whole context again each time.)
      **settings: temperature, top_k, top_p, min_p, repetition_penalty and max_new,
        all of them; see `sampling.settings`.

    Raises:
      ValueError: a setting is out of range; a prompt is longer than the context, holds
        an id outside the vocabulary, or is empty and the tokenizer has no newline.
    """
    check(**settings)
    _check_stop(stop)
    if count < 1:
        raise ValueError(f"count {count} must be at least 1")
    jobs = [
        _Row(prompt, prompt_ids(prompt, tokenizer, model.cfg), number)
        for prompt in prompts
        for number in range(count)
    ]
    model, params = laid_out(model, params, rows=len(jobs))
    done = []
    for first in range(0, len(jobs), ROWS):
        group = jobs[first : first + ROWS]
        padding = 0 if len(jobs) <= ROWS else ROWS - len(group)
        chunks = _decode(
            *(model, params, tokenizer, group, seed, stop, settings, TEXT_STEPS),
            padding,
            beyond_context,
        )
        done += _last(chunks)
    return done


def stream(
    *,
    model: GPT,
    params,
    tokenizer,
    prompt: str | Sequence[int],
    seed: int,
    stop: Sequence[str | int],
    beyond_context: bool = False,
    **settings,
) -> Generator[str, None, Completion]:
    """Yields the text of one completion piece by piece, whole characters only.

    Takes what `texts` takes and raises what it raises, at once. The pieces together are
    the text that `texts(count=1)` returns; the generator's return value is the whole
    Completion (`result = yield from stream(...)`).
    """
    check(**settings)
    _check_stop(stop)
    row = _Row(prompt, prompt_ids(prompt, tokenizer, model.cfg), 0)
    model, params = laid_out(model, params, rows=1)
    chunks = _decode(
        *(model, params, tokenizer, [row], seed, stop, settings, STREAM_STEPS),
        0,
        beyond_context,
    )
    return _pieces(chunks)


def _check_stop(stop) -> None:
    if isinstance(stop, str):
        raise ValueError(f"stop is the string {stop!r} but must be a list of strings")
    if "" in stop:
        raise ValueError("a stop string is empty; leave it out")


def rows_of(settings: Sequence[dict]) -> Sampling:
    """Returns the Sampling of rows given as dicts of its fields (checked before)."""
    whole = {"max_new", *(k for k, x in SETTINGS.items() if x.kind is int)}
    columns = {
        name: [min(row[name], MOST) for row in settings] for name in Sampling._fields
    }
    return Sampling(
        **{
            name: jnp.asarray(column, jnp.int32 if name in whole else jnp.float32)
            for name, column in columns.items()
        }
    )


@jax.jit
def row_keys(seed, prompt_B, number_B):
    """Returns a key for each row from the seed, a hash of its prompt and its number.

    The hash keeps equal numbers of different prompts from sharing their luck.
    """
    fold = jax.random.fold_in
    root = jax.random.key(seed)
    return jax.vmap(lambda p, n: fold(fold(root, p), n))(prompt_B, number_B)


_next_keys = jax.jit(jax.vmap(partial(jax.random.fold_in, data=1)))


class Transcript:
    """One row's text as its tokens arrive; knows its stop strings and stop tokens.

    Text that may be the beginning of a stop string is held back until it is not.
    """

    def __init__(
        self,
        tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str | int],
        least: int = 0,
    ):
        """Begins behind a prompt; in the first `least` tokens no stop string counts."""
        self.ids: list[int] = []
        self._least = least
        self.text = ""
        self.stopped_by: str | int | None = None
        self._strings = [s for s in stop if isinstance(s, str)]
        self._tokens = {s for s in stop if not isinstance(s, str)}
        self._stream = tokenizer.decode_stream()
        self._held = ""
        for token in prompt[-TAIL:]:  # so that the first word is spaced as after it
            self._decode(token)

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is now certain."""
        if token in self._tokens:
            self.stopped_by = token
            return ""
        self.ids.append(token)
        return self._release(self._decode(token), last=False)

    def flush(self) -> str:
        """Returns the text still held back; nothing may be pushed afterwards."""
        if isinstance(self.stopped_by, str):
            return ""
        return self._release(self._stream.flush(), last=True)

    def _decode(self, token: int) -> str:
        try:
            return self._stream.push(token)
        except ValueError:  # published models have more ids than their tokenizers
            return ""

    def _release(self, fresh: str, *, last: bool) -> str:
        """Returns what of the held text and the fresh may be shown."""
        text = self._held + fresh
        if len(self.ids) < self._least:
            self.text += text
            return text
        found = [(text.index(s), s) for s in self._strings if s in text]
        if found:
            end, self.stopped_by = min(found)
        else:
            end = len(text) - (0 if last else self._unsure(text))
        self._held = text[end:]
        self.text += text[:end]
        return text[:end]

    def _unsure(self, text: str) -> int:
        """Returns how many last characters may begin a stop string."""
        longest = max(map(len, self._strings), default=1)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._strings):
                return size
        return 0


class _Row(NamedTuple):
    prompt: str | Sequence[int]
    ids: list[int]
    number: int  # among the samples of its prompt


def _decode(
    model, params, tokenizer, rows, seed, stop, settings, steps, padding, beyond
):
    """Yields each row's new text after every few steps; returns the Completions.

    With `beyond`, rows whose context is full go on from the last half of it.
    """
    context, eos_id = model.cfg.context_length, tokenizer.eos_id
    stop = [*stop, *tokenizer.ends]
    scribes = [Transcript(tokenizer, row.ids, stop) for row in rows]
    windows = [row.ids for row in rows] + [[0]] * padding
    left = [settings["max_new"]] * len(rows) + [0] * padding
    hashes = [zlib.crc32(np.asarray(row.ids, "<i4").tobytes()) for row in rows]
    numbers = [row.number for row in rows] + [0] * padding
    key_B = row_keys(
        np.uint32(seed % 2**32),
        np.array(hashes + [0] * padding, np.uint32),
        np.array(numbers, np.uint32),
    )
    while True:
        fixed = {"model": model, "stop_id": -1 if eos_id is None else eos_id}
        written = [len(scribe.ids) for scribe in scribes] + [0] * padding
        begins = [max(0, len(ids) - n) for ids, n in zip(windows, written, strict=True)]
        decoding = _window(params, windows, begins, left, settings, key_B, steps, fixed)
        reason, read = None, np.array([len(ids) for ids in windows])
        while True:
            tokens, length, reason = decoding.send(reason)
            pieces = []
            for i, scribe in enumerate(scribes):
                new, piece = tokens[i, read[i] : length[i]].tolist(), ""
                windows[i], left[i] = windows[i] + new, left[i] - len(new)
                for token in new:
                    if scribe.stopped_by is None:
                        piece += scribe.push(token)
                if scribe.stopped_by is not None:
                    reason[i], left[i] = STOP, 0
                if reason[i] != RUNNING and not (beyond and left[i]):
                    piece += scribe.flush()
                pieces.append(piece)
            yield pieces
            read = length
            if (reason != RUNNING).all():
                break
        if not (beyond and any(left)):
            break
        windows = [ids[-max(1, context // 2) :] for ids in windows]
        key_B = _next_keys(key_B)  # places are counted anew
    return [
        _completion(row, scribe, settings["max_new"], context, tokenizer.ends, beyond)
        for row, scribe in zip(rows, scribes, strict=True)
    ]


def _window(params, windows, begins, left, settings, key_B, steps, fixed):
    """Decodes rows until all have ended or their context is full.

    Yields (tokens, lengths, reasons) after every few steps, and takes the reasons
    back: of a row that is to end one that says so.
    """
    lengths = np.array([len(ids) for ids in windows], np.int32)
    longest, context = int(lengths.max()), fixed["model"].cfg.context_length
    max_length = _bucket(longest + max(left), context)
    tokens_BT = np.zeros((len(windows), _bucket(longest, max_length)), np.int32)
    for tokens_T, ids in zip(tokens_BT, windows, strict=True):
        tokens_T[: len(ids)] = ids
    sampling = rows_of([{**settings, "max_new": max_new} for max_new in left])
    with sharding.in_sight(params):
        state = _start(
            *(params, tokens_BT, lengths, sampling, key_B),
            **{**fixed, "max_length": max_length},
            begin_B=np.array(begins, np.int32),
        )
    while True:
        tokens, length, reason = jax.device_get(
            (state.tokens_BS, state.length_B, state.reason_B)
        )
        state = state._replace(
            reason_B=jnp.asarray((yield tokens, length, reason.copy()))
        )
        with sharding.in_sight(params):
            state = _advance(params, state, sampling, key_B, steps, **fixed)


def _completion(row, scribe, max_new, context, ends, beyond):
    stopped_by = scribe.stopped_by
    if stopped_by is not None:
        reason = "stop"
        what = "stop token" if isinstance(stopped_by, int) else "stop string"
        detail = "end of text" if stopped_by in ends else f"{what} {stopped_by!r}"
    else:
        reason = "length"
        full = not beyond and len(row.ids) + len(scribe.ids) >= context
        detail = f"the context of {context} tokens is full"
        detail = detail if full else f"{max_new} new tokens"
    return Completion(row.prompt, scribe.text, scribe.ids, reason, detail)


def prompt_ids(prompt: str | Sequence[int], tokenizer, cfg) -> list[int]:
    """Returns a prompt's ids: at least one, at most the context, all in the model.

    An empty prompt becomes the end-of-text token or, without one, a newline.

    Raises:
      ValueError: it is too long, has an id that is none, or is empty without a way to
        begin; or the text cannot be tokenized.
    """
    if cfg.n_classes:
        raise ValueError(
            f"this model sorts texts into {cfg.n_classes} classes and writes none; use "
            f"it with {commands.typed('classify')} --run=..."
        )
    text = isinstance(prompt, str)
    ids = [*tokenizer.opening, *tokenizer.encode(prompt)] if text else list(prompt)
    if not ids and tokenizer.eos_id is not None:
        ids = [tokenizer.eos_id]
    if not ids:
        try:
            ids = tokenizer.encode("\n")
        except ValueError:
            ids = []
    if not ids:
        raise ValueError(
            "the prompt is empty and the tokenizer has neither an end-of-text token "
            "nor a newline to begin with; give a prompt"
        )
    wrong = [i for i in ids if not 0 <= i < cfg.vocab_size]
    if wrong:
        raise ValueError(
            f"token id {wrong[0]} of the prompt is not in the model's vocabulary of "
            f"{cfg.vocab_size}; use the tokenizer that the model was trained with"
        )
    if len(ids) > cfg.context_length:
        raise ValueError(
            f"the prompt has {len(ids)} tokens but the model's context is "
            f"{cfg.context_length}; shorten the prompt"
        )
    return ids


def advice(prompt: str, tokenizer) -> str:
    """Returns a sentence on a prompt that ends in a space which ought to begin a token.

    "" where it does not. Where a word and the space before it are one token, a model
    has hardly ever seen a space alone before a word, and writes what does follow one.
    """
    bare = prompt.rstrip(" ")
    if bare == prompt or tokenizer.encode(bare) == tokenizer.encode(prompt):
        return ""
    if not any(re.match(r"[ Ġ▁]\w", token) for token in tokenizer.vocab):
        return ""
    return (
        "the prompt ends in a space, but here a word and the space before it are one "
        "token: leave the space off"
    )


def _bucket(length: int, limit: int) -> int:
    """Returns a power of two that holds `length`, so that shapes stay few."""
    return min(max(16, 1 << (length - 1).bit_length()), limit)


def _pieces(chunks) -> Generator[str, None, Completion]:
    """Yields the first row's pieces that are not empty; returns its Completion."""
    while True:
        try:
            (piece,) = next(chunks)
        except StopIteration as end:
            return end.value[0]
        if piece:
            yield piece


def _last(chunks):
    """Runs a generator to its end and returns its return value."""
    while True:
        try:
            next(chunks)
        except StopIteration as end:
            return end.value
