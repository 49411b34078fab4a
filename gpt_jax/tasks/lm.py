"""Language modelling: predict the next token of running text."""

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from gpt_jax import data, losses, words
from gpt_jax.model import GPT, GPTConfig, hidden
from gpt_jax.options import Data
from gpt_jax.prepare import prepare
from gpt_jax.tasks.scores import scores
from gpt_jax.tasks.task import (
    OF_ROWS,
    OF_THE_LOSS,
    OF_THE_MODEL,
    Kind,
    Task,
    dropout_of,
    with_own,
)

PART, MOST_PARTS = 1 << 14, 1 << 9  # 8M tokens tell what a byte of text costs


@dataclass(frozen=True)
class Options:
    """The keys of `config.task`: see configs/common.py."""

    loss_chunk: int


def make(
    options: Options,
    *,
    model: GPTConfig,
    text: Data,
    dropout: Collection[str],
    progress: bool,
) -> Task:
    """Prepares the text (or finds it prepared) and returns the task.

    Args:
      options: loss_chunk, the positions of a window whose logits exist at once; 0 =
        choose.
      model: the architecture; vocab_size 0 takes the tokenizer's.
      text: where it comes from, and how it is cut.
      dropout: which of DROPOUTS may be above zero.
      progress: show a bar while text is prepared.

    Raises:
      ValueError: the text is too short for one window, or the model and the text do
        not fit each other.
    """
    seq_len = text.seq_len or model.context_length
    stride = text.stride or seq_len
    check_window(seq_len, model.context_length)
    cut = ("seq_len", "stride")
    source = {key: value for key, value in vars(text).items() if key not in cut}
    prepared = prepare(**source, progress=progress)
    tokenizer = prepared.tokenizer
    gpt = make_model(model, tokenizer)
    return Task(
        model=gpt,
        tokenizer=tokenizer,
        loss=make_loss(
            gpt,
            tokenizer.token_bytes(),
            loss_chunk=options.loss_chunk,
            dropout=dropout,
        ),
        train=data.Windows(prepared.train, seq_len=seq_len, stride=stride, tail=False),
        evals={
            "val": data.Windows(
                prepared.val, seq_len=seq_len, stride=seq_len, tail=True
            )
        },
        tokens=seq_len,
        fingerprint=prepared.fingerprint,
        bytes_per_token=functools.cache(
            functools.partial(bytes_per_token, prepared.train, tokenizer.token_bytes())
        ),
        known_words=functools.cache(
            functools.partial(words.known, prepared.train, tokenizer)
        ),
    )


def bytes_per_token(tokens: Any, token_bytes_V: np.ndarray) -> float:
    """Returns the mean of the bytes that training tokens stand for.

    Args:
      tokens: a sequence of ids; of a long one, evenly spaced parts are read.
      token_bytes_V: of each id.
    """
    parts = max(1, min(MOST_PARTS, math.ceil(len(tokens) / PART)))
    starts = [i * len(tokens) // parts for i in range(parts)]
    sizes = [token_bytes_V[tokens[start : start + PART]] for start in starts]
    total = sum(int(size.sum(dtype=np.int64)) for size in sizes)
    return total / sum(map(len, sizes))


def check_window(seq_len: int, context_length: int) -> None:
    """Raises ValueError when windows are empty or longer than what the model sees."""
    if seq_len < 1:
        raise ValueError(
            f"data.seq_len is {seq_len}: give a number of tokens, or 0 to take "
            f"model.context_length"
        )
    if seq_len > context_length:
        raise ValueError(
            f"data.seq_len {seq_len} is more than model.context_length "
            f"{context_length}: shorten the windows or enlarge the context"
        )


def make_model(model: GPTConfig, tokenizer) -> GPT:
    """Returns the model of an architecture; vocab_size 0 takes the tokenizer's.

    Raises:
      ValueError: the tokenizer has more tokens than the model.
    """
    size = model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size {size} is less than the tokenizer's "
            f"{tokenizer.vocab_size}: set it to 0 to take the tokenizer's"
        )
    return GPT(replace(model, vocab_size=size))


def check_chunk(loss_chunk: int) -> None:
    """Raises ValueError unless `loss_chunk` is a number of positions, or 0."""
    if loss_chunk < 0:
        raise ValueError(
            f"task.loss_chunk is {loss_chunk}: give a number of positions, or 0 to "
            "have it chosen"
        )


def make_loss(model: GPT, token_bytes_V, *, loss_chunk: int, dropout: Collection[str]):
    """Returns the next-token loss of `model` as `(weights, frozen, ...) -> Sums`.

    Args:
      model: the architecture.
      token_bytes_V: UTF-8 bytes that each token stands for, for bits per byte.
      loss_chunk: positions whose logits exist at once; 0 = as many as fit.
      dropout: which of DROPOUTS may be above zero; the others are left out of the
        compiled program, and with them what keeps attention from being fused.

    The sums are "loss" (smoothed, with z-loss, while training), "nll" (plain, in
    nats), "weight" (targets) and, in evaluation, "bytes".

    Raises:
      ValueError: loss_chunk is negative.
    """
    check_chunk(loss_chunk)

    def loss(weights, frozen, batch, key, hyper):
        del frozen  # nothing but the weights decides this loss
        training = key is not None
        found = hidden(
            model,
            weights,
            batch["tokens"],
            batch.get("positions"),
            batch.get("segments"),
            dropout=dropout_of(key, hyper, dropout),
        )
        wanted = (batch["targets"], batch["mask"])
        sums = losses.cross_entropy(
            scores(model, weights, found.x_BTD, *wanted, loss_chunk=loss_chunk),
            batch["mask"],
            label_smoothing=hyper.label_smoothing if training else 0.0,
            z_loss=hyper.z_loss if training else 0.0,
        )
        if training:
            return with_own(sums, found.sums)
        bytes_BT = jnp.asarray(token_bytes_V, jnp.float32)[batch["targets"]]
        return {**sums, "bytes": (bytes_BT * batch["mask"]).sum()}

    return loss


KIND = Kind(
    make=make,
    options=Options,
    check=lambda options, text: check_chunk(options.loss_chunk),
    reads=lambda options: (
        *(*OF_THE_MODEL, *OF_THE_LOSS, *OF_ROWS),
        *("data.field", "data.stride", "data.skip_bad_docs", "max_bytes"),
    ),
    config="configs/quickstart.py",
)
