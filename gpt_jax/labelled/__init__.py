"""Labelled texts: read from a table, cleaned, balanced and split.

A table is a file of rows (see `rows`), a named download, a Hugging Face dataset
(`hf:<name>[:<config>][:<split>]`), or `builtin:<folder>`: every line of a folder of
Python's own library, labelled with the file that it stands in. Which rows are left, and
in which part they are, depends on the rows and the settings alone.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpt_jax.files import digest
from gpt_jax.labelled.files import PARTS, Columns, LabelledText, plain, read
from gpt_jax.plaintext import kind

__all__ = ["Columns", "LabelledText", "Parts", "Source", "Table", "balanced"]
__all__ += ["clean", "cut", "load", "plain", "read"]


class Parts(NamedTuple):
    """The rows to learn from, to choose by, and to be judged with once."""

    train: list[LabelledText]
    val: list[LabelledText]
    test: list[LabelledText]


@dataclass(frozen=True)
class Source:
    """Which rows, and how they are divided.

    Attributes:
      source: the table; see the head of this file.
      cache: the folder of downloads.
      columns: see `Columns`.
      val, test: tables of their own for these parts; "" = rows of `source`.
      fractions: of train, val and test, where no column divides the rows; the share of
        a part that has its own table goes to train.
      seed: of the choice of rows.
      balance: keep as many rows of each class as the rarest has: of all rows where
        they are cut by `fractions`, else of those to learn from.
      labels: the classes; () = those that `source` has, sorted.
      skip: leave out rows that cannot be used, and count them, instead of refusing.
    """

    source: str
    cache: str
    columns: Columns
    val: str
    test: str
    fractions: tuple[float, float, float]
    seed: int
    balance: bool
    labels: tuple[str, ...]
    skip: bool

    def __post_init__(self):
        shares = self.fractions
        for share in shares:
            if isinstance(share, bool) or not isinstance(share, int | float):
                raise ValueError(
                    f"task.fractions holds {kind(share)} ({share!r}): give three "
                    "numbers, the shares of train, val and test"
                )
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"task.fractions is {shares}: give the shares of train, val and test, "
                "which add up to 1"
            )
        if self.columns.part and (self.val or self.test):
            raise ValueError(
                "task.split_column and task.val or task.test both say which rows are "
                "in which part; give one of them"
            )
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"task.labels {self.labels} names a class twice")
        if len(self.labels) == 1:
            raise ValueError(
                f"task.labels names one class, {self.labels[0]!r}: a classifier needs "
                "at least two, as in --config.task.labels=ham,spam"
            )


@dataclass(frozen=True)
class Table:
    """What `load` found.

    Attributes:
      parts: the rows.
      labels: the classes, in the order of their numbers.
      skipped: how many rows were left out, by reason.
      fingerprint: sha256 over the parts and the labels.
    """

    parts: Parts
    labels: tuple[str, ...]
    skipped: Mapping[str, int]
    fingerprint: str

    def summary(self) -> str:
        """Returns a sentence: how many rows of which class, what was left out."""
        sizes = ", ".join(
            f"{len(rows):,} {name}" for name, rows in self.parts._asdict().items()
        )
        classes = Counter(row.label for row in self.parts.train)
        named = ", ".join(f"{label} {classes[label]:,}" for label in self.labels)
        left = ", ".join(f"{count:,} {why}" for why, count in self.skipped.items())
        return f"{sizes} texts; to learn from: {named}" + (
            f"; left out: {left}" if left else ""
        )


def load(wanted: Source) -> Table:
    """Reads, cleans, balances and splits labelled texts.

    Raises:
      ValueError: the table cannot be read, has no such column, holds a row that cannot
        be used (unless `skip`), has fewer than two classes, or leaves a class without
        a row to learn from or to choose by.
      FileNotFoundError: there is no such table.
    """
    unread: list[str] = []
    bad = unread.append if wanted.skip else None
    rows = read(wanted.source, wanted.columns, wanted.cache, bad)
    labels = wanted.labels or tuple(sorted({row.label for row in rows} - {""}))
    refuse_one_number_twice(labels, wanted.source)
    if len(labels) < 2:
        raise ValueError(
            f"{wanted.source} has {len(labels)} class ({', '.join(labels) or 'none'}): "
            "a classifier needs at least two"
        )
    skipped: Counter[str] = Counter()

    def usable(rows: Sequence[LabelledText]) -> list[LabelledText]:
        kept, left = clean(rows, labels, skip=wanted.skip)
        skipped.update(left)
        return kept

    rows, generator = usable(rows), np.random.default_rng(wanted.seed)
    if wanted.columns.part:
        parts = _by_column(rows)
    elif wanted.val or wanted.test:
        own = {
            name: usable(read(source, wanted.columns, wanted.cache, bad))
            for name, source in (("val", wanted.val), ("test", wanted.test))
            if source
        }
        if len(own) < 2:
            share = wanted.fractions[1 if wanted.test else 2]
            rows, _, rest = cut(rows, (1 - share, 0.0), generator)
            own = {"val": rest, "test": rest, **own}
        parts = Parts(train=rows, **own)
    else:
        rows = balanced(rows, generator) if wanted.balance else rows
        parts = cut(rows, wanted.fractions, generator)
    if wanted.balance and (wanted.columns.part or wanted.val or wanted.test):
        parts = parts._replace(train=balanced(parts.train, generator))
    _refuse_empty_classes(parts, labels)
    content = [labels, [[row[:2] for row in rows] for rows in parts]]
    if unread:
        skipped[f"that cannot be read (the first: {unread[0]})"] = len(unread)
    return Table(parts, labels, dict(skipped), digest(json.dumps(content)))


def refuse_one_number_twice(labels: Sequence[str], source: str) -> None:
    """Raises ValueError where two classes are one number, as the texts 1 and 1.0."""
    seen: dict[float, str] = {}
    for label in labels:
        if not re.fullmatch(r"[+-]?(0|[1-9]\d*)(\.\d*)?", label):
            continue  # a word; or a code as 007, which another one than 7 may be
        if (other := seen.setdefault(float(label), label)) != label:
            raise ValueError(
                f"{source} has the classes {other!r} and {label!r}, which are one "
                "number: write them alike"
            )


def clean(
    rows: Sequence[LabelledText], labels: Sequence[str], *, skip: bool
) -> tuple[list[LabelledText], Counter[str]]:
    """Returns the rows that can be used, and how many others there are, by reason.

    Raises:
      ValueError: one cannot be used and `skip` is off; the sentence says where it is.
    """
    known, kept, left = set(labels), [], Counter()
    for row in rows:
        why = ""
        if not row.text.strip():
            why = "without a text"
        elif not row.label:
            why = "without a label"
        elif row.label not in known:
            why = f"with the unknown label {row.label!r}"
        if why and not skip:
            raise ValueError(
                f"{row.where} is a row {why} (the classes are {', '.join(labels)}); "
                "mend it, or set skip to leave such rows out"
            )
        left.update([why] if why else [])
        kept += [] if why else [row]
    return kept, left


def balanced(
    rows: Sequence[LabelledText], generator: np.random.Generator
) -> list[LabelledText]:
    """Returns as many rows of each class as the rarest has, drawn at random."""
    places = defaultdict(list)
    for i, row in enumerate(rows):
        places[row.label].append(i)
    count = min(map(len, places.values()), default=0)
    kept = [generator.permutation(places[label])[:count] for label in sorted(places)]
    return [rows[i] for i in sorted(int(i) for part in kept for i in part)]


def cut(
    rows: Sequence[LabelledText],
    fractions: Sequence[float],
    generator: np.random.Generator,
) -> Parts:
    """Returns the rows in a random order: shares of train and val, the rest is test."""
    mixed = [rows[i] for i in generator.permutation(len(rows))]
    # Shares are decimal fractions, which binary ones miss by less than this.
    first = int(len(rows) * fractions[0] + 1e-6)
    second = first + int(len(rows) * fractions[1] + 1e-6)
    return Parts(mixed[:first], mixed[first:second], mixed[second:])


def _by_column(rows: Sequence[LabelledText]) -> Parts:
    parts: dict[str, list[LabelledText]] = {name: [] for name in PARTS}
    for row in rows:
        parts[row.part].append(row)
    return Parts(**parts)


def _refuse_empty_classes(parts: Parts, labels: Sequence[str]) -> None:
    for name in ("train", "val"):
        found = {row.label for row in getattr(parts, name)}
        absent = [label for label in labels if label not in found]
        if absent:
            raise ValueError(
                f"the {name} part has no row of the class {absent[0]}: give more rows, "
                "another task.split_seed or task.fractions, or fewer task.labels"
            )
