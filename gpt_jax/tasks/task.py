"""What a run optimises: the words that every task is described with."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from gpt_jax.data import Examples
from gpt_jax.model import Dropout
from gpt_jax.runs import Classes

Batch = Mapping[str, Any]  # arrays [A, B, ...]: A micro-batches of B examples
Sums = Mapping[str, Any]  # scalars summed over examples, always "loss" and "weight"


# Of Hyper, in the order of model.Dropout.
DROPOUTS = ("dropout_embed", "dropout_attn", "dropout_residual", "dropout_adapter")


def dropout_of(key: Any, hyper: Any, on: Collection[str]) -> Dropout | None:
    """Returns the dropout of one training pass; None in evaluation (no key).

    Args:
      key: of this pass, or None.
      hyper: has the rates.
      on: which of DROPOUTS may be above zero; the others are left out of the compiled
        program, and with them what keeps attention from being fused.
    """
    if key is None or not on:
        return None
    return Dropout(key, *(getattr(hyper, n) if n in on else None for n in DROPOUTS))


class Task(NamedTuple):
    """A model, its examples and a loss.

    Attributes:
      model: the Linen module whose weights train.
      tokenizer: turns text into the model's ids and back.
      loss: (weights, frozen, batch [B, ...], key, hyper) -> Sums. `key=None` is
        evaluation: no dropout, no smoothing.
      train: training examples with random access, each a mapping of arrays.
      evals: named examples for evaluation, seen exactly once each time.
      tokens: tokens in one example, at most.
      fingerprint: what the examples were made of; a resumed run must find the same.
      reference: the loss needs the starting weights as `frozen["reference"]`.
      classes: what a classifier tells apart; else None.
      draws: regexes of weights that `init_from` may lack: they begin at random.
      drops: regexes of weights of `init_from` that the model may lack: they are left.
      test: rows of data that nothing here reads; a run keeps them in test.json.
      prompt: a user's text -> the ids that samples continue, or None: as it stands.
      stop: further tokens that end a sample.
      rollout: (weights, batch [A, B, ...], key) -> batch [A, C, ...], run before the
        step over the rows of each device, or None. C is a multiple of B.
      updates: steps that train on one rollout.
      known_words: the words of the training text, in small letters; None where there is
        no running text.
    """

    model: Any
    tokenizer: Any
    loss: Callable[..., Sums]
    train: Examples
    evals: Mapping[str, Examples]
    tokens: int
    fingerprint: str
    reference: bool = False
    classes: Classes | None = None
    draws: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    test: Sequence[Mapping[str, Any]] = ()
    prompt: Callable[[str], Sequence[int]] | None = None
    stop: tuple[int, ...] = ()
    rollout: Callable[..., Batch] | None = None
    updates: int = 1
    known_words: Callable[[], Collection[str]] | None = None
