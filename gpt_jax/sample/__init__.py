"""From a prompt to text: whole texts, and streams of them.

How a token is chosen is in filters.py, the loop in decode.py, stop strings in
transcript.py.
"""

import re
import zlib
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import commands, sharding
from gpt_jax.model import GPT
from gpt_jax.sample.decode import (
    LENGTH,
    RUNNING,
    STOP,
    advance,
    generate,
    guess,
    laid_out,
    prefill,
    start,
)
from gpt_jax.sample.filters import (
    Sampling,
    choose,
    keep,
    penalise,
    rows_of,
    temper,
)
from gpt_jax.sample.transcript import Transcript
from gpt_jax.sampling import check

__all__ = [
    "LENGTH",
    "RUNNING",
    "STOP",
    "Completion",
    "Draft",
    "Sampling",
    "Transcript",
    "advice",
    "check",
    "choose",
    "generate",
    "guess",
    "keep",
    "laid_out",
    "penalise",
    "prefill",
    "prompt_ids",
    "row_keys",
    "rows_of",
    "start",
    "stream",
    "temper",
    "texts",
]

ROWS = 32  # rows decoded at once: only bounds memory, since rows are independent
MOST_GUESSED = 15  # tokens: more are hardly ever right, and a pass reads them all
DRAFTED = 4  # tokens that a draft guesses, where nobody says how many
TEXT_STEPS, STREAM_STEPS = 16, 4  # tokens between two looks at the text: latency only


class Completion(NamedTuple):
    """What became of a prompt."""

    prompt: str | Sequence[int]
    text: str  # after the prompt; cut before a stop string
    ids: list[int]  # the tokens chosen, without an end-of-text or stop token
    reason: str  # "stop" or "length"
    detail: str  # which of the stops or limits it was, in words


class Draft(NamedTuple):
    """A smaller model that guesses what another writes next."""

    model: GPT
    params: Any


_start = jax.jit(start, static_argnames=("model", "max_length", "draft"))
_STATIC = ("model", "lookup", "draft")
_advance = jax.jit(advance, static_argnames=_STATIC, donate_argnums=1)


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
    lookup: int = 0,
    draft: Draft | None = None,
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
      lookup: tokens that are guessed from the text so far and tried out in one pass
        (see `guess`); the text is the same, and comes faster where it repeats itself.
      draft: a smaller model of the same tokens that guesses instead, DRAFTED of them
        unless `lookup` says how many (speculative decoding; Leviathan et al. 2023).
      **settings: all of `sampling.SETTINGS`, and max_new; see `sampling.settings`.

    Raises:
      ValueError: a setting is out of range; a prompt is longer than the context, holds
        an id outside the vocabulary, or is empty and the tokenizer has no newline; a
        draft has another vocabulary, or a shorter context.
    """
    check(**settings)
    _check_stop(stop)
    guesses = _guesses(lookup, draft, model, rows=len(prompts) * count)
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
            guesses,
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
    lookup: int = 0,
    draft: Draft | None = None,
    **settings,
) -> Generator[str, None, Completion]:
    """Yields the text of one completion piece by piece, whole characters only.

    Takes what `texts` takes and raises what it raises, at once. The pieces together are
    the text that `texts(count=1)` returns; the generator's return value is the whole
    Completion (`result = yield from stream(...)`).
    """
    check(**settings)
    _check_stop(stop)
    guesses = _guesses(lookup, draft, model, rows=1)
    row = _Row(prompt, prompt_ids(prompt, tokenizer, model.cfg), 0)
    model, params = laid_out(model, params, rows=1)
    chunks = _decode(
        *(model, params, tokenizer, [row], seed, stop, settings, STREAM_STEPS),
        0,
        beyond_context,
        guesses,
    )
    return _pieces(chunks)


def _guesses(
    lookup: int, draft: Draft | None, model: GPT, *, rows: int
) -> Mapping[str, Any]:
    """Returns who guesses how many tokens ahead, as `advance` takes it."""
    if not 0 <= lookup <= MOST_GUESSED:
        raise ValueError(f"lookup is {lookup}; it must be 0 to {MOST_GUESSED}")
    if draft is None:
        return {"lookup": lookup}
    small, large = draft.model.cfg, model.cfg
    if small.vocab_size != large.vocab_size:
        raise ValueError(
            f"the draft has {small.vocab_size} tokens, but the model has "
            f"{large.vocab_size}: take one with the same tokenizer"
        )
    if small.context_length < large.context_length:
        raise ValueError(
            f"the draft has a context of {small.context_length}, shorter than the "
            f"model's {large.context_length}"
        )
    draft = Draft(*laid_out(*draft, rows=rows))
    count = lookup or DRAFTED
    return {"lookup": count, "draft": draft.model, "draft_params": draft.params}


def _check_stop(stop) -> None:
    if isinstance(stop, str):
        raise ValueError(f"stop is the string {stop!r} but must be a list of strings")
    if "" in stop:
        raise ValueError("a stop string is empty; leave it out")


@jax.jit
def row_keys(seed, prompt_B, number_B):
    """Returns a key for each row from the seed, a hash of its prompt and its number.

    The hash keeps equal numbers of different prompts from sharing their luck.
    """
    fold = jax.random.fold_in
    root = jax.random.key(seed)
    return jax.vmap(lambda p, n: fold(fold(root, p), n))(prompt_B, number_B)


_next_keys = jax.jit(jax.vmap(partial(jax.random.fold_in, data=1)))


class _Row(NamedTuple):
    prompt: str | Sequence[int]
    ids: list[int]
    number: int  # among the samples of its prompt


def _decode(
    model, params, words, rows, seed, stop, settings, steps, padding, beyond, guesses
):
    """Yields each row's new text after every few steps; returns the Completions.

    With `beyond`, rows whose context is full go on from the last half of it.
    """
    context, eos_id = model.cfg.context_length, words.eos_id
    stop = [*stop, *words.ends]
    scribes = [Transcript(words, row.ids, stop) for row in rows]
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
        decoding = _window(
            params, windows, begins, left, settings, key_B, steps, fixed, guesses
        )
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
        _completion(row, scribe, settings["max_new"], context, words.ends, beyond)
        for row, scribe in zip(rows, scribes, strict=True)
    ]


def _window(params, windows, begins, left, settings, key_B, steps, fixed, guesses):
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
    draft = {key: value for key, value in guesses.items() if key != "lookup"}
    sampling = rows_of([{**settings, "max_new": max_new} for max_new in left])
    with sharding.in_sight(params):
        state = _start(
            *(params, tokens_BT, lengths, sampling, key_B),
            **{**fixed, "max_length": max_length, **draft},
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
            state = _advance(params, state, sampling, key_B, steps, **fixed, **guesses)


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
