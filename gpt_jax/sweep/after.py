"""What may be measured of a trial after its training: functions of its run folder.

from gpt_jax.sweep.after import bits_per_byte, test_accuracy

after = {"test_accuracy": test_accuracy, "novel_bpb": bits_per_byte("novel.txt")}
"""

from collections.abc import Callable
from pathlib import Path

from gpt_jax import corpora, runs
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
