"""Loss, perplexity and bits per byte of running text, with a sliding window."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gpt_jax.corpora import Corpus
from gpt_jax.evaluate import likelihood
from gpt_jax.evaluate.likelihood import Scorer


class Document(NamedTuple):
    """The ids of a text, its first one only read, and the bytes that the rest is."""

    ids: np.ndarray
    bytes: int


def documents(corpus: Corpus, tokenizer) -> Iterator[Document]:
    """Yields the documents of a corpus, each after the token that begins a text.

    Where a tokenizer has no such token, the first token of a document is read and not
    scored, and its bytes do not count.
    """
    parts: list[np.ndarray] = []
    size = 0
    for piece in corpus.pieces():
        parts.append(np.asarray(tokenizer.encode(piece.text), np.int32))
        size += len(piece.text.encode())
        if piece.ends:
            yield document(np.concatenate(parts), size, tokenizer)
            parts, size = [], 0


def document(ids: np.ndarray, size: int, tokenizer) -> Document:
    """Returns a Document of the ids of a text of `size` bytes."""
    before = likelihood.beginning(tokenizer)
    if before is not None:
        return Document(np.concatenate([np.array([before], np.int32), ids]), size)
    return Document(ids, size - int(tokenizer.token_bytes()[ids[:1]].sum()))


def evaluate(
    scorer: Scorer,
    texts: Iterable[Document],
    *,
    length: int,
    stride: int,
    show: Callable[[int], None],
) -> dict[str, float]:
    """Returns how well a model predicts texts, every token once.

    Args:
      scorer: see `likelihood.scorer`.
      texts: the documents; no window reaches over from one to the next.
      length: tokens read at once, at most the model's context.
      stride: tokens that each window but the first scores; see `likelihood.windows`.
      show: is told how many more windows are done.

    Returns:
      loss (nats a token), perplexity, bpb (bits per byte), and what they were taken
      over: documents, tokens, bytes, windows, and context, the least number of tokens
      that one is predicted from beyond a document's first window.

    Raises:
      ValueError: length or stride is out of its range, or there is nothing to predict.
    """
    most = scorer.model.cfg.context_length
    if not 1 <= length <= most:
        raise ValueError(
            f"the window is {length}: from 1 to {most}, the model's context"
        )
    if not 1 <= stride <= length:
        raise ValueError(f"the stride is {stride}: from 1 to the window, {length}")
    counts = {"documents": 0, "tokens": 0, "bytes": 0, "windows": 0}

    def spans():
        for text in texts:
            if len(text.ids) < 2:
                continue
            counts["documents"] += 1
            counts["tokens"] += len(text.ids) - 1
            counts["bytes"] += text.bytes
            for span in likelihood.windows(text.ids, length=length, stride=stride):
                counts["windows"] += 1
                yield span

    nll = -math.fsum(score.logp for score in likelihood.scores(scorer, spans(), show))
    if not counts["tokens"]:
        raise ValueError("the text has no token to predict; give more text")
    loss = nll / counts["tokens"]
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # exp(710) overflows
        "bpb": nll / math.log(2) / max(counts["bytes"], 1),
        **counts,
        "context": length - stride + 1,
    }
