"""Rows of labelled text, from every kind of table."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import corpora, files

# Columns of downloads whose files have no header.
DOWNLOADS = {"sms_spam": ("label", "text")}

CSV_FIELD = 1 << 30  # characters; Python's own limit is 131,072


class Row(NamedTuple):
    """A text, its label as text, what its split column says, and where it stands."""

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


def read(source: str, columns: Columns, cache: str | Path) -> list[Row]:
    """Returns all rows of a table; see `load` for the errors."""
    named = []
    for where, fields in _records(source, columns.names, cache):
        for column in filter(None, (columns.text, columns.label, columns.part)):
            if column not in fields:
                raise ValueError(
                    f"{where} has no column {column!r}; its columns are: "
                    f"{', '.join(map(str, fields))}. Name the right ones with "
                    "text_column and label_column, and all of a file without a header "
                    "with columns"
                )
        text = fields[columns.text]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{where}: {columns.text!r} is {text!r}, not a text")
        label = _plain(fields[columns.label])
        part = _plain(fields[columns.part]) if columns.part else ""
        named.append(Row(text or "", label, part, where))
    if not named:
        raise ValueError(f"{source} has no rows")
    return named


def _plain(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _records(
    source: str, names: tuple[str, ...], cache: str | Path
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields where each row of a table stands, and its fields by column."""
    if source.startswith("hf:"):
        yield from _dataset(source)
        return
    if source.startswith("builtin:"):
        yield from _lines_of_code(source)
        return
    if source in DOWNLOADS:
        path = corpora.fetch(source, cache)
        yield from _tsv(path, names or DOWNLOADS[source])
        return
    path = files.expand(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no table {source!r}: give a file, hf:<dataset>, or "
            f"{', '.join(DOWNLOADS)}"
        )
    if path.suffix not in READERS:
        raise ValueError(
            f"{path} is not a table that is known here: its name must end in "
            f"{', '.join(READERS)}"
        )
    yield from READERS[path.suffix](path, names)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: the byte at offset {error.start} is invalid; "
            "convert the file to UTF-8"
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the number and the text of every line that is not blank."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _tsv(path: Path, names: tuple[str, ...]):
    """Fields between tabs, exactly as they stand: a quotation mark is a character."""
    numbered = ((number, line.split("\t")) for number, line in _lines(path))
    return _by_name(path, numbered, names)


def _csv(path: Path, names: tuple[str, ...]):
    """Fields between commas, quoted where they hold commas or line breaks."""
    csv.field_size_limit(CSV_FIELD)
    lines = csv.reader(io.StringIO(_text(path), newline=""), strict=True)

    def numbered():
        try:
            yield from ((lines.line_num, fields) for fields in lines if fields)
        except csv.Error as error:
            raise ValueError(f"{path} line {lines.line_num}: {error}") from None

    return _by_name(path, numbered(), names)


def _by_name(path: Path, lines: Iterator[tuple[int, list[str]]], names):
    for number, fields in lines:
        if not names:
            names = tuple(field.strip() for field in fields)
            continue
        if len(fields) != len(names):
            raise ValueError(
                f"{path} line {number} has {len(fields)} fields where there are "
                f"{len(names)} columns ({', '.join(names)})"
            )
        yield f"{path} line {number}", dict(zip(names, fields, strict=True))


def _jsonl(path: Path, names: tuple[str, ...]):
    """A JSON object in each line."""
    del names  # every row names its own
    for number, line in _lines(path):
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        yield _object(f"{path} line {number}", fields)


def _json(path: Path, names: tuple[str, ...]):
    """A list of JSON objects."""
    del names
    try:
        rows = json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds no list of rows")
    for number, fields in enumerate(rows, start=1):
        yield _object(f"{path} row {number}", fields)


def _object(where: str, fields: Any) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is not an object with named fields")
    return where, fields


READERS: dict[str, Callable] = {
    **{".tsv": _tsv, ".csv": _csv, ".jsonl": _jsonl, ".json": _json}
}


def _dataset(spec: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of a Hugging Face dataset; numbers of classes become their names."""
    rows = corpora.dataset(spec, streaming=False)
    import datasets

    names = {
        column: feature.names
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for number, fields in enumerate(rows, start=1):
        told = {
            column: names[column][value] if value >= 0 else None  # -1 = not labelled
            for column, value in fields.items()
            if column in names and value is not None
        }
        yield f"{spec} row {number}", {**fields, **told}


def _lines_of_code(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    corpus = corpora.open(source, field="", cache="", progress=False)
    texts = defaultdict(str)
    for piece in corpus.pieces():
        texts[piece.source] += piece.text
    for path, text in texts.items():
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                fields = {"text": line.strip(), "label": Path(path).stem}
                yield f"{path} line {number}", fields
