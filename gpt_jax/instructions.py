"""Rows of instructions and conversations: from a file to named parts.

A row is what `chat.messages_of` reads: Alpaca's instruction, input and output, or
chat messages. Other columns stay in the row, for those who know them.
"""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gpt_jax import chat, corpora, downloads, names, rows, stores
from gpt_jax.rows import Bad, Row

PARTS = ("train", "test", "val")
SPLITS = ("fraction", "documents")
NAMES = ("instructions", "preferences", "alpaca")


def read(
    source: str, *, cache: str | Path, progress: bool, bad: Bad = None
) -> list[Row]:
    """Returns every row of a file or dataset, each one a conversation.

    Args:
      source: one of NAMES (downloaded once), a file of rows (see `rows`),
        `hf:<dataset>[:<config>][:<split>]`, or "builtin" (what the functions of
        Python's library do, by their docstrings; "builtin:json" is one folder of it).
      cache: the folder where downloads are kept.
      progress: show how far a download is.
      bad: is told why a row cannot be used, which is then left out. None: it is an
        error.

    Raises:
      FileNotFoundError: there is no such file, or it cannot be downloaded.
      ValueError: it is not rows of conversations; names the first row that is not.
    """
    return rows.usable(
        source, lambda bad: _found(source, cache, progress, bad), _conversation, bad
    )


def read_file(path: str | Path, bad: Bad = None) -> list[Row]:
    """Returns the rows of a file, whatever is in them; see `rows.read`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds something else, or nothing; names the line, or the row.
    """
    file = stores.fetched(path)
    return rows.usable(path, lambda bad: rows.read(file, bad=bad), lambda row: row, bad)


def _conversation(row: Row) -> Row:
    try:
        chat.messages_of(row.fields, "plain")
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None
    return row


def _found(source: str, cache: str | Path, progress: bool, bad: Bad) -> Iterator[Row]:
    if source.startswith("hf:"):
        return rows.dataset(source, streaming=False, bad=bad)
    if source.partition(":")[0] == "builtin":
        return _docstrings(source, corpora.open(source, field="", cache=cache))
    if source in NAMES:
        return rows.read(downloads.fetch(source, cache, progress), bad=bad)
    path = stores.fetched(source)
    if not path.is_file():
        what = "is a folder, not" if path.is_dir() else "is not there, as"
        raise FileNotFoundError(
            f"{path} {what} a file of instructions, and none of these is called so: "
            f"{', '.join(NAMES)}{names.did_you_mean(source, NAMES)}"
        )
    return rows.read(path, bad=bad)


def split(
    found: Sequence[Row], *, how: str, val_fraction: float, test_fraction: float
) -> dict[str, list[Row]]:
    """Returns the rows of "train", "test" and "val", in this order of the file.

    1,100 rows with fractions 0.05 and 0.1 become 935, 110 and 55, as in Raschka, Build
    a Large Language Model (From Scratch), section 7.2: train and test are rounded down.

    Args:
      found: all of them.
      how: "fraction" cuts the rows as they stand; "documents" shuffles them first,
        always in the same way.
      val_fraction: the share of "val".
      test_fraction: the share of "test"; may be 0.

    Raises:
      ValueError: a number is out of its range, or train or val would be empty.
    """
    check_split(how=how, val_fraction=val_fraction, test_fraction=test_fraction)
    fractions = f"data.val_fraction {val_fraction} and task.test_fraction"
    order = np.arange(len(found))
    if how == "documents":
        order = np.random.default_rng(0).permutation(order)
    # Shares are decimal fractions, which binary ones miss by less than this.
    train = int(len(found) * (1 - val_fraction - test_fraction) + 1e-6)
    test = int(len(found) * test_fraction + 1e-6)
    if not 0 < train < len(found) - test:
        raise ValueError(
            f"{len(found)} rows are too few for {fractions} {test_fraction}: no row "
            "would be left to train on or to validate with"
        )
    cut = np.split(order, [train, train + test])
    return {name: [found[i] for i in part] for name, part in zip(PARTS, cut)}


def check_split(*, how: str, val_fraction: float, test_fraction: float) -> None:
    """Raises ValueError for numbers by which no rows can be split."""
    names.choose("data.split", how, SPLITS)
    if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 - val_fraction):
        raise ValueError(
            f"data.val_fraction {val_fraction} and task.test_fraction {test_fraction} "
            "must leave rows to train on: the first above 0, the second at least 0, "
            "their sum below 1"
        )


def _docstrings(source: str, corpus: corpora.Corpus) -> Iterator[Row]:
    """Yields a row for every function and class that says what it does."""
    number = 0
    for text in corpus.documents():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                does = (ast.get_docstring(node) or "").partition("\n\n")[0]
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                ask = f"What does this {kind} do?"
                if does:
                    number += 1
                    row = {"instruction": ask, "input": node.name, "output": does}
                    yield Row(f"{source}, row {number}", number, row)
