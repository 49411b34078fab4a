"""What a run optimises: the words that every task is described with."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gpt_jax.data import Examples

Batch = Mapping[str, Any]  # arrays [A, B, ...]: A micro-batches of B examples
Sums = Mapping[str, Any]  # scalars summed over examples, always "loss" and "weight"


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
      rollout: (weights, batch, key) -> batch, run before the step, or None.
    """

    model: Any
    tokenizer: Any
    loss: Callable[..., Sums]
    train: Examples
    evals: Mapping[str, Examples]
    tokens: int
    fingerprint: str
    reference: bool = False
    rollout: Callable[..., Batch] | None = None
