"""Rows of labelled text, from every kind of table."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import corpora, downloads, names, rows, stores
from gpt_jax.plaintext import kind
from gpt_jax.rows import READERS, Bad

# Columns of downloads whose files have no header.
DOWNLOADS = {"sms_spam": ("label", "text")}

PARTS = ("train", "val", "test")
# What the column that names a row's part may hold.
SPELLINGS = {
    **{name: name for name in PARTS},
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("valid", "validation", "dev"), "val"),
    **dict.fromkeys(("testing",), "test"),
}

CURE = (
    "name the right columns with text_column and label_column, and all of a file "
    "without a header with columns"
)


class LabelledText(NamedTuple):
    """A text, its label as text, its part ("" = none is told), and where it stands."""

    text: str
    label: str
    part: str
    where: str


@dataclass(frozen=True)
class Columns:
    """Where a row has what.

    Attributes:
      text: the column of the text.
      label: that of the label.
      part: that of train, val or test; "" = no column says.
      names: the names of all columns, for a file without a header; () = it has one.
    """

    text: str
    label: str
    part: str
    names: tuple[str, ...]


def read(
    source: str, columns: Columns, cache: str | Path, bad: Bad = None
) -> list[LabelledText]:
    """Returns all rows of a table; see `load` for the errors, `rows.read` for `bad`."""
    used = tuple(filter(None, (columns.text, columns.label, columns.part)))

    def find(bad: Bad) -> Iterator[rows.Row]:
        return _records(source, columns.names, used, cache, bad)

    def make(row: rows.Row) -> LabelledText:
        text = "" if row.value(columns.text, CURE) is None else row.text(columns.text)
        label = plain(row.value(columns.label, CURE), f"{row.where}: {columns.label!r}")
        if not columns.part:
            return LabelledText(text, label, "", row.where)
        what = f"{row.where}, in the column of task.split_column:"
        told = plain(row.value(columns.part, CURE), what).lower()
        return LabelledText(text, label, names.choose(what, told, SPELLINGS), row.where)

    return rows.usable(source, find, make, bad)


def plain(value: Any, where: str) -> str:
    """Returns the text of a label; "" for null, the same for 1 and 1.0.

    Raises:
      ValueError: it is a list or an object; `where` begins the sentence.
    """
    if value is None or value != value:  # NaN, which some write for null
        return ""
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where} is {kind(value)}, not a text or a number")
    return str(value).strip()


def _records(
    source: str, header: tuple[str, ...], used: tuple[str, ...], cache, bad: Bad
) -> Iterator[rows.Row]:
    """Returns the rows of a table of any kind."""
    if source.startswith("hf:"):
        return rows.dataset(source, streaming=False, only=used, bad=bad)
    if source.startswith("builtin:"):
        return _lines_of_code(source)
    if source in DOWNLOADS:
        path, header = downloads.fetch(source, cache), header or DOWNLOADS[source]
    else:
        path = stores.fetched(source)
    if not path.is_file():
        what = "is a folder, not a table" if path.is_dir() else "is not there"
        raise FileNotFoundError(
            f"there is no table {source!r} (it {what}): give a file, hf:<dataset>, or "
            f"{', '.join(DOWNLOADS)}"
        )
    if not rows.is_rows(path) and source not in DOWNLOADS:
        raise ValueError(
            f"{path} is not a table that is known here: its name must end in "
            f"{', '.join(READERS)}"
        )
    return rows.read(path, names=header, only=used, bad=bad)


def _lines_of_code(source: str) -> Iterator[rows.Row]:
    corpus = corpora.open(source, field="", cache="", progress=False)
    texts = defaultdict(str)
    for piece in corpus.pieces():
        texts[piece.source] += piece.text
    for path, text in texts.items():
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                fields = {"text": line.strip(), "label": Path(path).stem}
                yield rows.Row(f"{path}, line {number}", number, fields)
