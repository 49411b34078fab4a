"""Rows of instructions and conversations: from a file to named parts.

A row is what `chat.messages_of` reads: Alpaca's instruction, input and output, or
chat messages. Other columns stay in the row, for those who know them.
"""

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax import chat, corpora, names

Row = dict[str, Any]
PARTS = ("train", "test", "val")
SPLITS = ("fraction", "documents")
NAMES = ("instructions", "preferences", "alpaca")


def read(source: str, *, cache: str | Path, progress: bool) -> list[Row]:
    """Returns every row of a file or dataset, each one a conversation.

    Args:
      source: one of NAMES (downloaded once), a .json file (a list of rows), a .jsonl
        file (a row a line), hf:<dataset>[:<config>][:<split>], or "builtin" (what the
        functions of Python's library do, by their docstrings; "builtin:json" is one
        folder of it).
      cache: the folder where downloads are kept.
      progress: show how far a download is.

    Raises:
      FileNotFoundError: there is no such file, or it cannot be downloaded.
      ValueError: it is not rows of conversations; names the first row that is not.
    """
    if source.startswith("hf:"):
        rows = list(corpora.dataset(source, streaming=False))
    elif source.partition(":")[0] == "builtin":
        rows = _docstrings(corpora.open(source, field="", cache=cache))
    elif source in NAMES:
        rows = read_file(corpora.fetch(source, cache, progress))
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no file {path} of instructions, and none of these is called "
                f"so: {', '.join(NAMES)}"
            )
        rows = read_file(path)
    if not rows:
        raise ValueError(f"{source} has no rows; give a file of instructions")
    for number, row in enumerate(rows, start=1):
        try:
            chat.messages_of(row, "plain")
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from None
    return rows


def read_file(path: str | Path) -> list[Row]:
    """Returns the objects of a JSON list, or of a file with one object a line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds something else, or nothing; names the line, or the row.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: the byte at offset {error.start} is invalid"
        ) from None
    if text.lstrip().startswith("["):
        rows = _parsed(text, str(path))
    else:
        # Not splitlines: JSON text may hold U+2028 and the like as they are.
        lines = enumerate(text.split("\n"), start=1)
        rows = [_parsed(t, f"{path}, line {n}") for n, t in lines if t.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: {row!r:.40} is not an object")
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def split(
    rows: Sequence[Row], *, how: str, val_fraction: float, test_fraction: float
) -> dict[str, list[Row]]:
    """Returns the rows of "train", "test" and "val", in this order of the file.

    1,100 rows with fractions 0.05 and 0.1 become 935, 110 and 55, as in Raschka, Build
    a Large Language Model (From Scratch), section 7.2: train and test are rounded down.

    Args:
      rows: all of them.
      how: "fraction" cuts the rows as they stand; "documents" shuffles them first,
        always in the same way.
      val_fraction: the share of "val".
      test_fraction: the share of "test"; may be 0.

    Raises:
      ValueError: a number is out of its range, or train or val would be empty.
    """
    check_split(how=how, val_fraction=val_fraction, test_fraction=test_fraction)
    fractions = f"data.val_fraction {val_fraction} and task.test_fraction"
    order = np.arange(len(rows))
    if how == "documents":
        order = np.random.default_rng(0).permutation(order)
    # Shares are decimal fractions, which binary ones miss by less than this.
    train = int(len(rows) * (1 - val_fraction - test_fraction) + 1e-6)
    test = int(len(rows) * test_fraction + 1e-6)
    if not 0 < train < len(rows) - test:
        raise ValueError(
            f"{len(rows)} rows are too few for {fractions} {test_fraction}: no row "
            "would be left to train on or to validate with"
        )
    cut = np.split(order, [train, train + test])
    return {name: [rows[i] for i in part] for name, part in zip(PARTS, cut)}


def check_split(*, how: str, val_fraction: float, test_fraction: float) -> None:
    """Raises ValueError for numbers by which no rows can be split."""
    names.choose("data.split", how, SPLITS)
    if not (0 < val_fraction < 1 and 0 <= test_fraction < 1 - val_fraction):
        raise ValueError(
            f"data.val_fraction {val_fraction} and task.test_fraction {test_fraction} "
            "must leave rows to train on: the first above 0, the second at least 0, "
            "their sum below 1"
        )


def _docstrings(corpus: corpora.Corpus) -> list[Any]:
    """Returns a row for every function and class that says what it does."""
    rows = []
    for text in corpus.documents():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                does = (ast.get_docstring(node) or "").partition("\n\n")[0]
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                ask = f"What does this {kind} do?"
                row = {"instruction": ask, "input": node.name, "output": does}
                rows += [row] if does else []
    return rows


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON, of which a file holds a list of rows, or a row a "
            f"line: {error}"
        ) from None
