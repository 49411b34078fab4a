"""What a run optimises: the words that every task is described with."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from gpt_jax.data import Examples
from gpt_jax.model import Dropout
from gpt_jax.options import Data
from gpt_jax.runs import Classes

Batch = Mapping[str, Any]  # arrays [A, B, ...]: A micro-batches of B examples
Sums = Mapping[str, Any]  # scalars summed over examples, always "loss" and "weight"


# Of Hyper, in the order of model.Dropout.
DROPOUTS = ("dropout_embed", "dropout_attn", "dropout_residual", "dropout_adapter")

# Keys outside config.task that some tasks read and others do not; see Kind.reads.
OF_THE_MODEL = tuple(
    f"hyper.{name}" for name in DROPOUTS[:-1]
)  # adapters read the last
OF_THE_LOSS = ("hyper.label_smoothing", "hyper.z_loss")
OF_ROWS = (
    *("data.source", "data.tokenizer", "data.val_fraction", "data.split"),
    "data.seq_len",
)
SHARED = (
    *(*OF_THE_MODEL, *OF_THE_LOSS, *OF_ROWS),
    *("data.field", "data.stride", "data.skip_bad_docs", "model.n_classes"),
    "max_bytes",
)


class Kind(NamedTuple):
    """A sort of task, as `tasks.TABLE` knows it before there is any text.

    Attributes:
      make: returns the Task; see `tasks.make`.
      options: a frozen dataclass: the keys of config.task besides its name.
      check: (options, text) -> None; raises ValueError for what cannot be.
      reads: options -> the keys of SHARED that this task reads.
      config: the config file that makes such a run.
      tuned: it goes on from the weights of a run; random ones learn nothing by it.
      idle: options -> its own keys that do nothing beside the others.
    """

    make: Callable[..., "Task"]
    options: type
    check: Callable[[Any, Data], None]
    reads: Callable[[Any], Collection[str]]
    config: str
    tuned: bool = False
    idle: Callable[[Any], Collection[str]] = lambda options: ()


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


def with_own(sums: Sums, own: Mapping[str, Any]) -> Sums:
    """Returns the sums of a training pass with a model's own losses in the loss.

    Args:
      sums: of the task.
      own: `model.Hidden.sums`: what layers have sown.
    """
    return {**sums, **own, "loss": sums["loss"] + sum(own.values())} if own else sums


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
      bytes_per_token: the UTF-8 bytes of training text that a token stands for, on
        average; None where there is no running text.
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
    bytes_per_token: Callable[[], float] | None = None
    known_words: Callable[[], Collection[str]] | None = None
