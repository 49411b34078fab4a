"""Sorting texts into classes: how one is read, what a model says, how good that is.

Shapes: B batch  N texts  T time  D width  C classes
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import names
from gpt_jax.model import GPT, Dropout, hidden
from gpt_jax.model import logits as head

ROWS = 32  # texts at once


class Encoded(NamedTuple):
    """Texts as ids: tokens int32 [N, T], padded at the right, and their lengths [N].

    `cut` counts the texts that were longer than T and lost their end.
    """

    tokens_NT: np.ndarray
    length_N: np.ndarray
    cut: int


class Labelled(NamedTuple):
    """A text with the class that the model gives it, and how likely each class is."""

    text: str
    label: str
    probability: float
    probabilities: dict[str, float]


def encode(tokenizer, texts: Sequence[str], *, length: int) -> Encoded:
    """Returns the first `length` tokens of each text; 0 = as many as the longest has.

    Raises:
      ValueError: the tokenizer has no token for something in a text.
    """
    rows = [[*tokenizer.opening, *ids] for ids in tokenizer.encode_batch(texts)]
    longest = max(map(len, rows), default=1)
    width = length or longest
    padding = 0 if tokenizer.eos_id is None else tokenizer.eos_id
    tokens_NT = np.full((len(rows), width), padding, np.int32)
    for i, ids in enumerate(rows):
        tokens_NT[i, : len(ids)] = ids[:width]
    length_N = np.array([min(len(ids), width) for ids in rows], np.int32)
    return Encoded(tokens_NT, length_N, sum(len(ids) > width for ids in rows))


# --- from a text to logits ------------------------------------------------------------

# Which position speaks for the text. Only `end` may stand on padding: the last position
# of the row, whatever is there.
POOLS: dict[str, Callable] = {
    "last": lambda x_BTD, length_B: _at(x_BTD, jnp.maximum(length_B, 1) - 1),
    "first": lambda x_BTD, length_B: x_BTD[:, 0],
    "mean": lambda x_BTD, length_B: _mean(x_BTD, length_B),
    "end": lambda x_BTD, length_B: x_BTD[:, -1],
}


def _at(x_BTD, index_B):
    return jnp.take_along_axis(x_BTD, index_B[:, None, None], axis=1)[:, 0]


def _mean(x_BTD, length_B):
    own_BT1 = _own(x_BTD.shape[1], length_B)[..., None].astype(x_BTD.dtype)
    count_B1 = jnp.maximum(length_B, 1)[:, None].astype(x_BTD.dtype)
    return (x_BTD * own_BT1).sum(1) / count_B1


def _own(width: int, length_B):
    """Returns bool [B, T]: which positions hold the text, not padding."""
    return jnp.arange(width)[None] < length_B[:, None]


def features(
    weights: Any,
    tokens_BT,
    length_B,
    *,
    model: GPT,
    pool: str,
    causal: bool,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Returns what is classified of texts, [B, D], and the model's own losses.

    Nothing of a text sees padding: under a causal mask nothing could (it is at the
    right), without one it is kept apart. With pool="end" the padding is read as well.

    Args:
      weights: of `model`.
      tokens_BT: right-padded ids.
      length_B: how many of them are the text's.
      model: one with `n_classes`.
      pool: one of POOLS.
      causal: whether a token sees only what is before it.
      dropout: while training.
    """
    segments_BT = None
    if not causal and pool != "end":
        segments_BT = _own(tokens_BT.shape[1], length_B).astype(jnp.int32)
    how = {"causal": causal, "dropout": dropout}
    found = hidden(model, weights, tokens_BT, None, segments_BT, **how)
    return POOLS[pool](found.x_BTD, length_B), found.sums


def logits(weights: Any, tokens_BT, length_B, *, model: GPT, **how) -> jax.Array:
    """Returns float32 logits [B, C] of texts; arguments as in `features`."""
    x_BD, _ = features(weights, tokens_BT, length_B, model=model, **how)
    return head(model, weights, x_BD)


def probabilities(
    texts: Sequence[str],
    *,
    model: GPT,
    params: Any,
    tokenizer,
    length: int,
    pool: str,
    causal: bool,
) -> np.ndarray:
    """Returns float32 [N, C]: how likely each class is for each text.

    Args:
      texts: at least one, none empty.
      model: one with `n_classes`.
      params: its weights.
      tokenizer: the one that it learnt with.
      length: tokens of a text that it reads; the rest is cut off.
      pool: one of POOLS.
      causal: as it was trained.

    Raises:
      ValueError: there is no text, or one is empty.
    """
    if not texts:
        raise ValueError("there is no text to classify")
    if blank := [i for i, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"text {blank[0] + 1} of {len(texts)} is empty")
    tokens_NT, length_N, _ = encode(tokenizer, texts, length=length)
    run = jax.jit(partial(logits, model=model, pool=pool, causal=causal))
    rows = min(ROWS, len(texts))
    found = []
    for first in range(0, len(texts), rows):
        chosen = np.arange(first, first + rows) % len(texts)  # the last batch is filled
        found.append(run(params, tokens_NT[chosen], length_N[chosen]))
    logits_NC = np.concatenate([np.asarray(part) for part in found])[: len(texts)]
    return np.asarray(jax.nn.softmax(logits_NC))


def labelled(
    texts: Sequence[str], probability_NC: np.ndarray, labels: Sequence[str]
) -> list[Labelled]:
    """Returns each text with its likeliest class."""
    done = []
    for text, chances in zip(texts, probability_NC, strict=True):
        best = int(chances.argmax())
        named = dict(zip(labels, map(float, chances), strict=True))
        done.append(Labelled(text, labels[best], float(chances[best]), named))
    return done


# --- how good that is -----------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """How the classes given compare with the right ones.

    Attributes:
      labels: the classes.
      count: how many texts.
      accuracy: the share of texts whose class is right.
      macro_f1: the mean of F1 over the classes that occur, right or given.
      precision, recall, f1: of each class; 0 where there is nothing to divide by.
      confusion: texts by right class (rows) and given class (columns).
    """

    labels: tuple[str, ...]
    count: int
    accuracy: float
    macro_f1: float
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    confusion: tuple[tuple[int, ...], ...]

    def numbers(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return asdict(self)

    def text(self) -> str:
        """Returns the numbers and the confusion matrix as lines of text."""
        width = max(9, *map(len, self.labels))
        lines = [
            f"{self.count:,} texts, accuracy {self.accuracy:.2%}, "
            f"macro F1 {self.macro_f1:.4f}",
            f"{'class':>{width}}  precision  recall      F1   texts",
        ]
        for i, label in enumerate(self.labels):
            lines.append(
                f"{label:>{width}}  {self.precision[i]:9.4f}  {self.recall[i]:6.4f}  "
                f"{self.f1[i]:6.4f}  {sum(self.confusion[i]):6,}"
            )
        lines.append("right class in rows, given class in columns:")
        heads = [" " * width, *(f"{label:>{width}}" for label in self.labels)]
        lines.append("  ".join(heads))
        for label, row in zip(self.labels, self.confusion, strict=True):
            cells = [f"{label:>{width}}", *(f"{count:>{width},}" for count in row)]
            lines.append("  ".join(cells))
        return "\n".join(lines)


def report(right: Sequence[str], given: Sequence[str], labels: Sequence[str]) -> Report:
    """Compares the classes given to texts with the right ones.

    Raises:
      ValueError: there is no text, or a class is not one of `labels`.
    """
    if not right:
        raise ValueError("there is no text to report on")
    number: Mapping[str, int] = {label: i for i, label in enumerate(labels)}
    for label in sorted({*right, *given}):
        names.choose("the class", label, labels)
    table_CC = np.zeros((len(labels), len(labels)), int)
    for truth, answer in zip(right, given, strict=True):
        table_CC[number[truth], number[answer]] += 1
    hits_C, given_C, right_C = table_CC.diagonal(), table_CC.sum(0), table_CC.sum(1)
    f1_C = _share(2 * hits_C, given_C + right_C)
    occurs_C = given_C + right_C > 0
    return Report(
        labels=tuple(labels),
        count=len(right),
        accuracy=float(hits_C.sum() / len(right)),
        macro_f1=float(f1_C[occurs_C].mean()),
        precision=tuple(map(float, _share(hits_C, given_C))),
        recall=tuple(map(float, _share(hits_C, right_C))),
        f1=tuple(map(float, f1_C)),
        confusion=tuple(tuple(map(int, row)) for row in table_CC),
    )


def _share(part_C: np.ndarray, whole_C: np.ndarray) -> np.ndarray:
    return np.where(whole_C > 0, part_C / np.maximum(whole_C, 1), 0.0)
