"""What may be measured of a trial after its training: functions of its run folder.

from gpt_jax.sweep.after import bits_per_byte, test_accuracy

after = {"test_accuracy": test_accuracy, "novel_bpb": bits_per_byte("novel.txt")}
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import corpora, model, runs
from gpt_jax.evaluate import likelihood, text
from gpt_jax.tasks import classify


def test_accuracy(folder: Path) -> float:
    """Returns the share of the test part of its table that a classifier gets right.

    To look at, not to choose by: choose by val_accuracy.

    Raises:
      ValueError: the run is no classifier, or has no test part.
    """
    run = runs.open(folder)
    return classify.report(run, classify.test_rows(run)).accuracy


def logit_size(folder: Path) -> float:
    """Returns the root mean square of a run's last logits, over windows of its text.

    For coordinate checks: where rates fit every width, logits grow alike.
    """
    run = runs.open(folder, step="latest")
    data, length = run.config.data, run.model.cfg.context_length
    corpus = corpora.open(data.source, field=data.field, cache=data.cache)
    ids = itertools.chain.from_iterable(
        document.ids for document in text.documents(corpus, run.tokenizer)
    )
    tokens_BT = np.fromiter(ids, np.int32, 4 * length).reshape(4, length)

    @jax.jit
    def size(params):
        x_BTD = model.hidden(run.model, params, tokens_BT).x_BTD
        return jnp.sqrt(jnp.square(model.logits(run.model, params, x_BTD)).mean())

    return float(size(run.params))


def bits_per_byte(source: str, field: str = "text") -> Callable[[Path], float]:
    """Returns what measures how well a run predicts a text that it has not seen.

    Args:
      source: a text, as `config.data.source` takes it.
      field: of a .jsonl row that holds its text.
    """

    def measure(folder: Path) -> float:
        run = runs.open(folder)
        corpus = corpora.open(source, field=field, cache=run.config.data.cache)
        length = run.model.cfg.context_length
        return text.evaluate(
            likelihood.scorer(run.model, run.params),
            text.documents(corpus, run.tokenizer),
            length=length,
            stride=length,
            show=lambda more: None,
        )["bpb"]

    return measure
