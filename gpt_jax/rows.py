"""Rows: texts and numbers by name, from tables, JSON and Hugging Face datasets.

One reader for all who want rows, with one check: what cannot be read is named with its
file and row, or left out and told to `bad` where the user wants that.

A file is read by the end of its name, in any letters, packed or not: .tsv and .csv with
a header, and JSON (.jsonl, .ndjson, .json): a list of objects, or an object a line.
"""

import contextlib
import csv
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import plaintext
from gpt_jax.files import shown
from gpt_jax.plaintext import Line, kind, refuse_half_pairs

CSV_FIELD = 1 << 30  # characters; Python's own limit is 131,072
JSON_NAMES = (".jsonl", ".ndjson", ".json")

Bad = Callable[[str], object] | None


class Row(NamedTuple):
    """A row.

    Attributes:
      where: it stands, for sentences: "a.jsonl, line 7".
      number: from 1 on, of all rows that its source has, those left out included.
      fields: its values by name.
    """

    where: str
    number: int
    fields: dict[str, Any]

    def text(self, name: str, cure: str = "") -> str:
        """Returns the text in a field; ValueError says what is there instead."""
        value = self.value(name, cure)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {name!r} is {kind(value)}, not text")
        return value

    def value(self, name: str, cure: str = "") -> Any:
        """Returns what is in a field.

        Raises:
          ValueError: there is no such field; the sentence ends with `cure`.
        """
        if name not in self.fields:
            there = ", ".join(map(str, self.fields)) or "nothing"
            there = there.encode("utf-8", "backslashreplace").decode()
            cure = cure and f"; {cure}"
            raise ValueError(
                f"{self.where} has no field {name!r}; it has: {there}{cure}"
            )
        return self.fields[name]


def is_rows(path: Path) -> bool:
    """Whether the name of a file says that it holds rows."""
    return plaintext.suffix(path) in READERS


def read(
    path: str | Path,
    *,
    names: Sequence[str] = (),
    only: Collection[str] = (),
    bad: Bad = None,
) -> Iterator[Row]:
    """Yields the rows of a file; one whose name says nothing is read as JSON.

    Args:
      path: the file.
      names: of the columns of a table that has no header; () = it has one.
      only: the fields that are going to be read, whose texts are checked; () = all.
      bad: is told why a row cannot be read, which is then left out; where a table or a
        packed file is damaged, this holds for its rest. None: it is an error.

    Raises:
      ValueError: the file is no text, holds no rows, or one cannot be read.
    """
    path = Path(path)
    reader = READERS.get(plaintext.suffix(path), _json)
    for number, (where, find) in enumerate(_while_sound(reader(path, names), bad), 1):
        try:
            yield checked(Row(where, number, find()), only)
        except ValueError as error:
            refuse(error, bad)


def dataset(
    spec: str, *, streaming: bool, only: Collection[str] = (), bad: Bad = None
) -> Iterator[Row]:
    """Yields the rows of `hf:<name>[:<config>][:<split>]`, of its train split without.

    The number of a class becomes its name, and -1, which is no class, None. Code of a
    dataset, if it has any, never runs. See `read` for the other arguments.

    Raises:
      ValueError: that names no dataset, it cannot be loaded, or the package datasets
        is not installed.
    """
    path, config, split = dataset_name(spec)
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f"reading {spec} needs the package datasets: pip install datasets"
        ) from None
    with _loading(spec):
        found = datasets.load_dataset(
            path, config or None, split=split, streaming=streaming
        )
    classes = {
        name: feature.names
        for name, feature in (getattr(found, "features", None) or {}).items()
        if isinstance(feature, datasets.ClassLabel)
    }
    fields_of, number = iter(found), 0
    while True:
        with _loading(spec):
            fields = next(fields_of, None)
        if fields is None:
            return
        number += 1
        told = {
            name: classes[name][value] if value >= 0 else None
            for name, value in fields.items()
            if name in classes and value is not None
        }
        row = Row(f"{spec}, row {number}", number, {**fields, **told})
        try:
            yield checked(row, only)
        except ValueError as error:
            refuse(error, bad)


@contextlib.contextmanager
def _loading(spec: str) -> Iterator[None]:
    """Makes a sentence of what the package raises, which may be anything."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(f"{spec} cannot be loaded: {reason}") from error


def dataset_name(spec: str) -> tuple[str, str, str]:
    """Returns the name, configuration and split that hf:... means."""
    _, *parts = spec.split(":")
    if not parts[0] or len(parts) > 3:
        raise ValueError(
            f"{spec!r} does not name a dataset; write hf:<name>[:<config>][:<split>]"
        )
    path, config, split = (*parts, "", "")[:3]
    return path, config, split or "train"


def checked(row: Row, only: Collection[str] = ()) -> Row:
    """Returns a row; raises ValueError where a text in it is no text."""
    try:
        for name, value in row.fields.items():
            if not only or name in only:
                refuse_half_pairs(name, f"{row.where}: the name of a field")
                refuse_half_pairs(value, f"{row.where}: {name!r}")
    except RecursionError:
        raise ValueError(f"{row.where} is nested too deeply") from None
    return row


def refuse(error: ValueError, bad: Bad) -> None:
    """Raises an error, or tells `bad` about it; see `read`."""
    if bad is None:
        raise error from None
    bad(str(error))


def usable(
    source: str | Path,
    find: Callable[[Bad], Iterator[Row]],
    make: Callable[[Row], Any],
    bad: Bad,
) -> list[Any]:
    """Returns what `make` makes of each row, without those that it refuses.

    Args:
      source: what the rows are from, for a sentence.
      find: finds them, and tells the function that it is given as `read` tells `bad`.
      make: raises ValueError for a row that cannot be used.
      bad: see `read`.

    Raises:
      ValueError: a row cannot be used and `bad` is None, or none can.
    """
    made: list[Any] = []
    lost: list[str] = []

    def leave_out(why: str) -> None:
        lost.append(why)
        refuse(ValueError(why), bad)

    for row in find(leave_out if bad else None):
        try:
            made.append(make(row))
        except ValueError as error:
            leave_out(str(error))
    if not made:
        why = f", the first of {len(lost)} because {lost[0]}" if lost else ""
        raise ValueError(f"{source} has no rows that can be used{why}")
    return made


# --- files ----------------------------------------------------------------------------

# Where a row stands, and what makes its fields or raises a ValueError.
Found = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def _tsv(path: Path, names: Sequence[str]) -> Found:
    """Fields between tabs, exactly as they stand: a quotation mark is a character."""

    def split(line: Line) -> list[str]:
        text = plaintext.decoded(path, line)
        return text.rstrip("\r\n").split("\t")

    lines = (line for line in plaintext.lines(path) if line.data.strip(b" \r\n"))
    return _by_name(
        path, ((line.number, partial(split, line)) for line in lines), names
    )


def _csv(path: Path, names: Sequence[str]) -> Found:
    """Fields between commas, quoted where they hold commas or line breaks."""
    csv.field_size_limit(CSV_FIELD)
    decoded = (plaintext.decoded(path, line) for line in plaintext.lines(path))
    records = csv.reader(decoded, strict=True)

    def numbered() -> Iterator[tuple[int, Callable[[], list[str]]]]:
        try:
            for fields in records:
                if fields:
                    yield records.line_num, partial(list, fields)
        except csv.Error as error:
            where = f"{shown(path)}, line {records.line_num}"
            raise ValueError(f"{where}: {error}") from None

    return _by_name(path, numbered(), names)


def _by_name(
    path: Path, lines: Iterator[tuple[int, Callable]], names: Sequence[str]
) -> Found:
    for number, split in lines:
        where = f"{shown(path)}, line {number}"
        if names:
            yield where, partial(_named, split, names, where)
        else:
            names = tuple(field.strip() for field in split())
            _refuse_twice(names, where)


def _named(split: Callable, names: Sequence[str], where: str) -> dict[str, Any]:
    found = split()
    if len(found) != len(names):
        raise ValueError(
            f"{where} has {len(found)} fields where there are {len(names)} columns "
            f"({', '.join(names)})"
        )
    return dict(zip(names, found, strict=True))


def _json(path: Path, names: Sequence[str]) -> Found:
    """A list of objects, or an object in each line."""
    del names  # every row has its own
    begins = (data.lstrip(b"\xef\xbb\xbf \t\r\n") for data in plaintext.blocks(path))
    if next(filter(None, begins), b"").startswith(b"["):
        values = _parsed(plaintext.whole(path), shown(path))
        for number, value in enumerate(values, start=1):
            where = f"{shown(path)}, row {number}"
            yield where, partial(_object, value, where)
        return
    for line in plaintext.lines(path):
        if line.data.strip():
            where = f"{shown(path)}, line {line.number}"
            yield where, partial(_object_of_line, path, line, where)


def _object_of_line(path: Path, line: Line, where: str) -> dict[str, Any]:
    return _object(_parsed(plaintext.decoded(path, line), where), where)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {kind(value)}, not an object with named fields")
    return value


READERS: dict[str, Callable[[Path, Sequence[str]], Found]] = {
    **{".tsv": _tsv, ".csv": _csv},
    **dict.fromkeys(JSON_NAMES, _json),
}


def _parsed(text: str, where: str) -> Any:
    try:
        return _DECODER.decode(text.removeprefix("\ufeff"))
    except JSONDecodeError as error:
        at = f"character {error.pos + 1}"
        if "\n" in text.strip():
            at = f"line {error.lineno}, character {error.colno}"
        why = f"{error.msg} at {at}"
    except RecursionError:
        why = "it is nested too deeply"
    except _Twice as error:
        raise ValueError(f"{where} {error}") from None
    except ValueError:  # Python reads no number of more than 4,300 digits
        why = "a number in it has thousands of digits"
    raise ValueError(
        f"{where} is not JSON, of which a file holds a list of rows, or a row a line: "
        f"{why}"
    )


class _Twice(ValueError):
    """Two values have one name."""


def _of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        _refuse_twice([name for name, _ in pairs], "")
    return found


def _refuse_twice(names: Sequence[str], where: str) -> None:
    twice = [name for i, name in enumerate(names) if name and name in names[:i]]
    if twice:
        raise _Twice(
            f"{where} has two fields called {twice[0]!r}: rename one of them".strip()
        )


_DECODER = json.JSONDecoder(object_pairs_hook=_of_pairs)


def _while_sound(found: Found, bad: Bad) -> Found:
    """Yields rows up to the place where their file turns out to be damaged."""
    while True:
        try:
            item = next(found, None)
        except ValueError as error:
            refuse(error, bad)
            return
        if item is None:
            return
        yield item
