"""Classification: one label for a whole text."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from gpt_jax import (
    classify,
    files,
    labelled,
    losses,
    names,
    prepare,
    runs,
    screen,
    tokenizers,
)
from gpt_jax.classify import POOLS
from gpt_jax.model import GPT, GPTConfig, logits
from gpt_jax.options import Data
from gpt_jax.runs import Classes
from gpt_jax.tasks import lm
from gpt_jax.tasks.task import (
    OF_THE_LOSS,
    OF_THE_MODEL,
    Kind,
    Task,
    dropout_of,
    with_own,
)

HEAD, LM_HEAD = "^classifier/", "^head/"


@dataclass(frozen=True)
class Options:
    """The keys of `config.task`: see configs/common.py."""

    text_column: str
    label_column: str
    columns: Sequence[str]
    labels: Sequence[str | float]
    skip: bool
    balance: bool
    split_column: str
    val: str
    test: str
    fractions: tuple[float, float, float]
    split_seed: int
    pool: str
    causal: bool
    buckets: Sequence[int]


class Texts:
    """Encoded texts and their classes as examples.

    `tokens` int32 [T], `length` and `label` int32 [], `mask` float32 [], which is 1.
    Together (`take`), texts are padded to the first of `widths` that holds them all.
    """

    def __init__(
        self, encoded: classify.Encoded, label_N: np.ndarray, widths: Sequence[int]
    ):
        self.encoded, self.label_N = encoded, label_N
        self.widths = widths

    def __len__(self) -> int:
        return len(self.label_N)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {key: x[0] for key, x in self.take([index]).items()}

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns many examples, stacked."""
        length_B = self.encoded.length_N[indices]
        width = next(width for width in self.widths if width >= length_B.max())
        return {
            "tokens": self.encoded.tokens_NT[indices, :width],
            "length": length_B,
            "label": self.label_N[indices],
            "mask": np.ones(len(indices), np.float32),
        }


def make(
    options: Options,
    *,
    model: GPTConfig,
    text: Data,
    dropout: Collection[str],
    progress: bool,
) -> Task:
    """Reads the labelled texts and returns the task.

    Args:
      options: the table, and how its texts are read; see configs/common.py.
      model: the architecture; vocab_size 0 takes the tokenizer's, n_classes 0
        as many as there are labels.
      text: the keys of `config.data`: the table, the tokenizer, the folder of
        downloads; seq_len is how many tokens of a text are read, 0 = as many as the
        longest to learn from has, and at most the context.
      dropout: which of task.DROPOUTS may be above zero.
      progress: say what was found.

    Raises:
      ValueError: an option, the table, or the model and the texts do not fit.
    """
    if options.buckets and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes would pad a batch to different widths: "
            "leave task.buckets empty"
        )
    found = labelled.load(source_of(options, text))
    tokenizer = _tokenizer(text, found.parts, progress)
    gpt = _model(model, tokenizer, found.labels)
    limit = text.seq_len or gpt.cfg.context_length
    lm.check_window(limit, gpt.cfg.context_length)
    texts = [[row.text for row in rows] for rows in found.parts]
    train = classify.encode(tokenizer, texts[0], length=limit)
    width = text.seq_len or int(train.length_N.max())
    train = train._replace(tokens_NT=train.tokens_NT[:, :width])
    val = classify.encode(tokenizer, texts[1], length=width)
    cut = [f"{n.cut} {part}" for n, part in ((train, "train"), (val, "val")) if n.cut]
    show = screen.Show(progress)
    show.say(f"{text.source}: {found.summary()}")
    if cut:
        show.say(f"cut after {width} tokens: {' and '.join(cut)} texts")
    widths = sorted({min(size, width) for size in options.buckets} | {width})
    sides = ((train, found.parts.train), (val, found.parts.val))
    examples = [
        Texts(encoded, _numbers(rows, found.labels), widths) for encoded, rows in sides
    ]
    return Task(
        model=gpt,
        tokenizer=tokenizer,
        loss=make_loss(gpt, pool=options.pool, causal=options.causal, dropout=dropout),
        train=examples[0],
        evals={"val": examples[1]},
        tokens=width,
        fingerprint=fingerprint(found, tokenizer, width),
        classes=Classes(found.labels, width),
        draws=(HEAD,),
        drops=(LM_HEAD,),
    )


def make_loss(model: GPT, *, pool: str, causal: bool, dropout: Collection[str]):
    """Returns the loss of `model` as `(weights, frozen, ...) -> Sums`.

    The sums are "loss", "accuracy" (texts whose class is right) and "weight" (texts).
    """

    def loss(weights, frozen, batch, key, hyper):
        del frozen  # nothing but the weights decides this loss
        training = key is not None
        x_BD, own = classify.features(
            weights,
            batch["tokens"],
            batch["length"],
            model=model,
            pool=pool,
            causal=causal,
            dropout=dropout_of(key, hyper, dropout),
        )
        sums = losses.classification(
            logits(model, weights, x_BD),
            batch["label"],
            batch["mask"],
            label_smoothing=hyper.label_smoothing if training else 0.0,
            z_loss=hyper.z_loss if training else 0.0,
        )
        return with_own(sums, own) if training else sums

    return loss


def source_of(task: Options, text: Data) -> labelled.Source:
    """Returns the table that `config.task` and `config.data` name."""
    train, val, test = task.fractions
    return labelled.Source(
        source=text.source,
        cache=text.cache,
        columns=labelled.Columns(
            task.text_column,
            task.label_column,
            task.split_column,
            texts_of("task.columns", task.columns),
        ),
        val=task.val,
        test=task.test,
        fractions=(train, val, test),
        seed=task.split_seed,
        balance=task.balance,
        labels=texts_of("task.labels", task.labels),
        skip=task.skip,
    )


def texts_of(key: str, values: Sequence[Any]) -> tuple[str, ...]:
    """Returns names as texts: numbers too, and those of "a,b", as flags write it.

    Raises:
      ValueError: one is neither a text nor a number; names the key.
    """
    if len(values) == 1 and isinstance(values[0], str):
        values = values[0].split(",")
    return tuple(labelled.plain(value, f"{key}: one of its names") for value in values)


def report(run: runs.Run, rows: Sequence[labelled.LabelledText]) -> classify.Report:
    """Returns how well a run labels the texts of a table."""
    texts, labels = [row.text for row in rows], classes_of(run).labels
    given = classify.labelled(texts, probabilities(run, texts), labels)
    return classify.report(
        [row.label for row in rows], [one.label for one in given], labels
    )


def classes_of(run: runs.Run) -> Classes:
    """Returns the classes of a run; raises ValueError for a language model."""
    if run.classes is None:
        raise ValueError(f"{run.folder} is a language model: it has no classes")
    return run.classes


def probabilities(run: runs.Run, texts: Sequence[str]) -> np.ndarray:
    """Returns how likely a run finds each class [N, C] of texts."""
    return classify.probabilities(
        texts,
        model=run.model,
        params=run.params,
        tokenizer=run.tokenizer,
        length=classes_of(run).length,
        pool=run.config.task.pool,
        causal=run.config.task.causal,
    )


def test_rows(run: runs.Run) -> Sequence[labelled.LabelledText]:
    """Returns the test part of the table that a run learnt from.

    Raises:
      ValueError: there is none, or the table is no longer what it was.
    """
    config, length = run.config, classes_of(run).length
    task = {key: value for key, value in config.task.items() if key != "name"}
    found = labelled.load(source_of(Options(**task), Data(**config.data)))
    told = json.loads((run.folder / "data.json").read_text(encoding="utf-8"))
    if fingerprint(found, run.tokenizer, length) != told["fingerprint"]:
        raise ValueError(
            f"{config.data.source} is no longer what {run.folder} learnt from, so its "
            "test part may hold what the model has seen; put the table back"
        )
    if not found.parts.test:
        raise ValueError(f"{run.folder} was trained without a test part")
    return found.parts.test


def fingerprint(
    found: labelled.Table, tokenizer: tokenizers.Tokenizer, length: int
) -> str:
    """Returns the sha256 of all that a run's examples are made of, its test included.

    Args:
      found: the table.
      tokenizer: what makes ids of it.
      length: tokens of a text that are read.
    """
    words = f"{found.fingerprint} {tokenizer.sha256} {length}"
    return files.digest(words)


def check(options: Options, text: Data) -> None:
    """Raises ValueError for options that cannot be; see `make`."""
    source_of(options, text)
    pool, buckets = options.pool, options.buckets
    names.choose("task.pool", pool, [*POOLS])
    for size in buckets:
        if type(size) is not int or size < 1:
            raise ValueError(
                f"task.buckets holds {size!r}: give whole numbers of tokens, as in "
                '--config.task.buckets="(32, 64)"'
            )
    if buckets and pool == "end":
        raise ValueError(
            "task.pool=end reads the last position of rows that are all of one width: "
            "leave task.buckets empty, or pool the last token of the text"
        )


def idle(options: Options) -> tuple[str, ...]:
    """Returns the keys that do nothing where a column, or tables, make the parts."""
    if options.split_column:
        return ("fractions",) if options.balance else ("fractions", "split_seed")
    return ()


def _tokenizer(
    text: Data, parts: labelled.Parts, progress: bool
) -> tokenizers.Tokenizer:
    """Returns the tokenizer that is named, trained on the texts to learn from."""
    spec = text.tokenizer
    ready = prepare.ready_tokenizer(spec, text.cache, progress)
    texts = (row.text for row in parts.train)
    return ready or prepare.train_tokenizer(spec, texts, screen.Show(progress))


def _model(
    model: GPTConfig, tokenizer: tokenizers.Tokenizer, labels: Sequence[str]
) -> GPT:
    if model.n_classes not in (0, len(labels)):
        raise ValueError(
            f"model.n_classes is {model.n_classes} and the table has {len(labels)} "
            f"classes ({', '.join(labels)}): set it to 0 to take those of the table"
        )
    return lm.make_model(replace(model, n_classes=len(labels)), tokenizer)


def _numbers(
    rows: Sequence[labelled.LabelledText], labels: Sequence[str]
) -> np.ndarray:
    return np.array([labels.index(row.label) for row in rows], np.int32)


KIND = Kind(
    make=make,
    options=Options,
    check=check,
    reads=lambda options: (
        *(*OF_THE_MODEL, *OF_THE_LOSS, "model.n_classes"),
        *("data.source", "data.tokenizer", "data.seq_len"),
    ),
    config="configs/classify.py",
    idle=idle,
)
