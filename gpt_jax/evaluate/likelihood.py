"""How likely a model finds given tokens: one program for texts, choices, harnesses.

Shapes: B rows  T positions  C positions of a chunk  D width  V vocabulary
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax import sharding
from gpt_jax.model import GPT, hidden, logits

TOKENS = 1 << 13  # of a batch: enough to keep a device busy
LOGITS_BYTES = 1 << 28  # float32 logits of one device that exist at once
ROWS = 64  # of a batch at most; a multiple of any usual number of devices
WAITING = 64  # batches' worth of spans that are sorted by length at a time


class Span(NamedTuple):
    """Ids of which the last `scored` are, each given all ids before it."""

    ids: np.ndarray | Sequence[int]
    scored: int


class Score(NamedTuple):
    """What a model thinks of a span.

    Attributes:
      logp: the sum of the scored tokens' log-probabilities, in nats.
      greedy: whether each of them was the likeliest token.
    """

    logp: float
    greedy: bool


class Scorer(NamedTuple):
    """A model on its devices, ready to score; see `scorer`."""

    model: GPT
    weights: Any
    mesh: Mesh
    sums: Callable  # (weights, tokens_BT, targets_BT, mask_BT) -> (logp_B, greedy_B)


def scorer(model: GPT, params: Any) -> Scorer:
    """Returns what `scores` works with: the weights on all devices of this process."""
    devices = jax.local_devices()
    fits = max(n for n in range(1, len(devices) + 1) if ROWS % n == 0)
    mesh = sharding.make_mesh(ROWS, data=fits, fsdp=1, tensor=1, cpu_devices=0)
    weights = sharding.replicate(params, mesh=mesh)

    def sums(weights, tokens_BT, targets_BT, mask_BT):
        return _sums(model, weights, tokens_BT, targets_BT, mask_BT)

    compiled = jax.jit(sums, out_shardings=NamedSharding(mesh, P()))
    return Scorer(model, weights, mesh, compiled)


def scores(
    scorer: Scorer, spans: Iterable[Span], show: Callable[[int], None]
) -> Iterator[Score]:
    """Yields the score of every span, in their order.

    Args:
      scorer: see `scorer`.
      spans: each at most one id longer than the model's context; taken a few batches
        at a time, so there may be very many.
      show: is told how many more spans are done.

    Raises:
      ValueError: a span does not fit the model.
    """
    cfg = scorer.model.cfg
    held: list[Span] = []
    for span in spans:
        _check(span, cfg)
        held.append(span)
        if len(held) == WAITING * ROWS:
            yield from _scores(scorer, held, show)
            held = []
    yield from _scores(scorer, held, show)


def fit(context: Sequence[int], continuation: Sequence[int], length: int) -> Span:
    """Returns the span that scores a continuation, the oldest context cut off.

    Args:
      context: at least one id.
      continuation: at least one id and at most `length`.
      length: the model's context.

    Raises:
      ValueError: there is no context or continuation, or it does not fit.
    """
    if not len(context) or not len(continuation):
        raise ValueError("a context or a continuation to score has no token")
    if len(continuation) > length:
        raise ValueError(
            f"a text to score has {len(continuation)} tokens but the model's context "
            f"is {length}; score it as running text, or shorten it"
        )
    ids = [*context, *continuation]
    return Span(ids[-(length + 1) :], len(continuation))


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list, list]:
    """Returns the ids of a context and of what follows it, as the whole is encoded.

    Spaces at the context's end go to the continuation: tokens often begin with one.
    An empty context becomes the token that texts begin with.

    Raises:
      ValueError: the context is empty and no token begins a text; or the continuation
        adds no token to the context.
    """
    bare = context.rstrip(" ")
    continuation = context[len(bare) :] + continuation
    opening = list(tokenizer.opening)
    first = beginning(tokenizer)
    if not bare and not opening and first is not None:
        opening = [first]
    before = [*opening, *tokenizer.encode(bare)]
    whole = [*opening, *tokenizer.encode(bare + continuation)]
    if not before or len(whole) <= len(before):
        what = f"{continuation!r}" if before else "an empty context"
        raise ValueError(
            f"{what} cannot be scored: this tokenizer makes no token of it; give a "
            "context, or another text"
        )
    return before, whole[len(before) :]


def beginning(tokenizer) -> int | None:
    """Returns the id that a text is said to begin after: BOS, else end of text."""
    return tokenizer.opening[-1] if tokenizer.opening else tokenizer.eos_id


def windows(ids: np.ndarray, *, length: int, stride: int) -> Iterator[Span]:
    """Yields spans that score every id but the first exactly once.

    The first window scores all it holds. Each later one ends `stride` ids further, and
    the last one at the end of the text; all of them are full. So beyond the first
    window an id is scored given at least `length - stride + 1` ids before it. With
    stride = length these are the rolling windows of EleutherAI's lm-evaluation-harness.

    Args:
      ids: the ids of a text; at least two.
      length: tokens that the model reads at once.
      stride: from 1, one forward pass for every id, to `length`.
    """
    end = min(length + 1, len(ids))
    yield Span(ids[:end], end - 1)
    while end < len(ids):
        more = min(stride, len(ids) - end)
        end += more
        yield Span(ids[end - length - 1 : end], more)


def _check(span: Span, cfg) -> None:
    ids = np.asarray(span.ids)
    if not 1 <= span.scored < len(ids) <= cfg.context_length + 1:
        raise ValueError(
            f"a span of {len(ids)} ids of which {span.scored} are scored does not fit "
            f"a context of {cfg.context_length}"
        )
    if ids.min() < 0 or ids.max() >= cfg.vocab_size:
        raise ValueError(
            f"a text holds the id {ids.max()} but the model knows {cfg.vocab_size} "
            "tokens; use the tokenizer that it was trained with"
        )


def _scores(scorer: Scorer, spans: list[Span], show) -> list[Score]:
    """Returns the scores of spans, batched with others of about their length."""
    cfg = scorer.model.cfg
    order = sorted(range(len(spans)), key=lambda i: len(spans[i].ids))
    found: list[Any] = [None] * len(spans)
    while order:
        width = _bucket(len(spans[order[-1]].ids) - 1, cfg.context_length)
        taken = [order.pop() for _ in range(min(_rows(scorer, width), len(order)))]
        rows = _rows(scorer, width)
        batch = _batch([spans[i] for i in taken], rows, width)
        split = NamedSharding(scorer.mesh, P("data"))
        placed = [jax.device_put(array, split) for array in batch]
        logp_B, greedy_B = jax.device_get(scorer.sums(scorer.weights, *placed))
        for i, logp, greedy in zip(taken, logp_B, greedy_B, strict=False):
            found[i] = Score(float(logp), bool(greedy))
        show(len(taken))
    return found


def _bucket(length: int, most: int) -> int:
    """Returns a power of two that holds `length`, so that shapes stay few."""
    return min(max(16, 1 << (length - 1).bit_length()), most)


def _rows(scorer: Scorer, width: int) -> int:
    """Returns the rows of a batch of that width: a multiple of the devices."""
    devices = scorer.mesh.size
    fit = LOGITS_BYTES // (4 * width * scorer.model.cfg.vocab_rows) * devices
    rows = min(ROWS, TOKENS // width, fit)
    return max(rows // devices, 1) * devices


def _batch(spans: Sequence[Span], rows: int, width: int):
    """Returns tokens, targets (int32) and mask (bool), right-padded: [rows, width]."""
    tokens_BT, targets_BT = np.zeros((2, rows, width), np.int32)
    mask_BT = np.zeros((rows, width), bool)
    for row, (ids, scored) in enumerate(spans):
        end = len(ids) - 1
        tokens_BT[row, :end] = ids[:-1]
        targets_BT[row, :end] = ids[1:]
        mask_BT[row, end - scored : end] = True
    return tokens_BT, targets_BT, mask_BT


def _sums(model: GPT, weights, tokens_BT, targets_BT, mask_BT):
    """Returns (log-probability of the masked targets, whether all are the best)."""
    x_BTD = hidden(model, weights, tokens_BT).x_BTD
    rows, width, _ = x_BTD.shape
    # Only a very long context or vocabulary needs more than one chunk.
    chunks = math.ceil(4 * width * model.cfg.vocab_rows / LOGITS_BYTES)
    size = -(-width // chunks)

    def split(a):  # [B, T, ...] -> [chunks, B, C, ...]; zeros fill up
        fill = [(0, 0), (0, chunks * size - width)] + [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, fill).reshape(rows, chunks, size, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0)

    def part(piece):
        x_BCD, target_BC, mask_BC = piece
        logits_BCV = logits(model, weights, x_BCD)
        right_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], -1)[..., 0]
        logp_BC = right_BC - jax.nn.logsumexp(logits_BCV, -1)
        best_BC = right_BC >= logits_BCV.max(-1)
        return jnp.where(mask_BC, logp_BC, 0).sum(-1), (best_BC | ~mask_BC).all(-1)

    pieces = tuple(map(split, (x_BTD, targets_BT, mask_BT)))
    logp_nB, best_nB = jax.lax.map(part, pieces)
    return logp_nB.sum(0), best_nB.all(0)
