"""Rows: every kind of file gives the same ones, and what is no row is named."""

import gzip
import json
import re
import sys
import types

import pytest

from gpt_jax import rows

ROWS = [("ham", 'he said "no", then left'), ("spam", "größer, €5\u2028now\x85")]
FIELDS = [{"label": label, "text": text} for label, text in ROWS]
TSV = "label\ttext\n" + "".join(f"{a}\t{b}\n" for a, b in ROWS)
CSV = "label,text\n" + 'ham,"he said ""no"", then left"\nspam,"' + ROWS[1][1] + '"\n'
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in FIELDS)
FILES = {
    "a.tsv": TSV,
    "feeds.tsv": TSV.replace("\n", "\r\n"),
    "returns.tsv": TSV.replace("\n", "\r"),
    "bom.TSV": f"\ufeff{TSV}",
    "a.csv": CSV,
    "returns.csv": CSV.replace("\n", "\r"),
    "bom.csv": f"\ufeff{CSV}",
    "a.jsonl": JSONL,
    "bom.JSONL": f"\ufeff{JSONL}",
    "a.ndjson": JSONL.replace("\n", "\r\n"),
    "a.json": json.dumps(FIELDS),
    "list.jsonl": f"\ufeff \n{json.dumps(FIELDS, indent=1)}\n",
    "lines.json": JSONL,
    "no name that says it": JSONL,
}


def read(path, text, **options):
    """Writes a file and returns its rows."""
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return list(rows.read(path, **options))


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, packed):
    found = read(tmp_path / f"{name}{packed}", FILES[name])
    assert [row.fields for row in found] == FIELDS
    assert [row.number for row in found] == [1, 2]
    place = re.fullmatch(rf"{tmp_path}/{name}{packed}, (line|row) (\d)", found[1].where)
    assert place and rows.is_rows(tmp_path / f"{name}{packed}") == ("." in name)


def test_a_table_without_a_header_takes_the_names_that_it_is_given(tmp_path):
    for name, mark in (("a.tsv", "\t"), ("a.csv", ",")):
        (row,) = read(tmp_path / name, f"ham{mark}hello\n", names=("label", "text"))
        assert row.fields == {"label": "ham", "text": "hello"}


def test_quoted_fields_of_a_csv_hold_line_breaks_of_every_kind(tmp_path):
    (row,) = read(tmp_path / "a.csv", b'text\r\n"a\nb\r\nc\rd"\r\n')
    assert row.fields == {"text": "a\nb\r\nc\rd"}


def test_a_line_of_tabs_is_a_row_of_empty_fields_and_a_blank_line_is_none(tmp_path):
    found = read(tmp_path / "a.tsv", "a\tb\n\n\t\n \n")
    assert [row.fields for row in found] == [{"a": "", "b": ""}]


def test_a_text_is_asked_for_by_its_name(tmp_path):
    (row,) = read(tmp_path / "a.jsonl", '{"text": "a", "id": 5, "note": null}')
    assert row.text("text", "") == "a"
    for name, words in {
        "body": "line 1 has no field 'body'; it has: text, id, note; name another",
        "id": "line 1: 'id' is the number 5, not text",
        "note": "line 1: 'note' is null, not text",
    }.items():
        with pytest.raises(ValueError, match=words):
            row.text(name, "name another")


BAD = {
    "no json": ("a.jsonl", "{}\n{", r"line 2 is not JSON.*character 2"),
    "one object": ("a.json", '{\n"text": "a"\n}', r"line 1 is not JSON, of which a f"),
    "a cut list": ("a.json", '[{},\n {"a"}]', r"a.json is not JSON.*line 2, char"),
    "a number": ("a.jsonl", "5", r"line 1 is the number 5, not an object"),
    "a list of texts": ("a.json", '["a"]', r"row 1 is text, not an object"),
    "null": ("a.ndjson", "{}\nnull", r"line 2 is null, not an object"),
    "deep": ("a.jsonl", '{"a":' + "[" * 10**5, r"line 1 is .* nested too deeply"),
    "digits": ("a.jsonl", '{"a":' + "1" * 5000 + "}", r"line 1 is .* of digits"),
    "bytes": ("a.jsonl", b'{"a": "\xff"}', r"a.jsonl is not UTF-8.* offset 7 "),
    "bytes of a table": ("a.csv", b"a\n\xff", r"a.csv is not UTF-8.* offset 2 "),
    "half a pair": ("a.jsonl", r'{"a": "b\ud83d"}', r"line 1: 'a' holds half of a su"),
    "in a list": ("a.json", r'[{"a": ["b\ud83d"]}]', r"row 1: 'a' holds half"),
    "in a name": ("a.jsonl", r'{"\ud83d": 1}', r"line 1: the name of a field holds"),
    "a short row": ("a.tsv", "a\tb\nc\n", r"line 2 has 1 fields where .* 2 columns"),
    "an open quote": ("a.csv", 'a,b\n1,"2\n', r"line 2: unexpected end of data"),
    "two columns": ("a.csv", "a, b,b\n", r"line 1 has two fields called 'b': rename"),
    "two of a tsv": ("a.tsv", "b\ta\tb\n", r"line 1 has two fields called 'b'"),
    "two names": ("a.jsonl", '{"a": 1, "a": 2}', r"line 1 has two fields called 'a'"),
    "two inside": ("a.json", '[{"b": {"a": 1, "a": 2}}]', r"two fields called 'a'"),
    "cut gz": ("a.csv.gz", None, r"a.csv.gz is cut short or damaged"),
    "a zip": ("a.csv", b"PK\x03\x04", r"a.csv is a zip archive"),
}


@pytest.mark.fault(34, injections=21)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_row_is_named_with_file_and_place(tmp_path, kind):
    name, data, words = BAD[kind]
    if data is None:
        (tmp_path / name).write_bytes(gzip.compress(b"a\n" * 999)[:-9])
    with pytest.raises(ValueError, match=words) as refused:
        if data is None:
            list(rows.read(tmp_path / name))
        else:
            read(tmp_path / name, data)
    assert not re.search("NoneType|dict|list'|object at 0x", str(refused.value))


@pytest.mark.fault(34, injections=5)
def test_what_is_no_row_is_left_out_and_told_where_that_is_wanted(tmp_path):
    lines = ['{"a": 1}', '{"a": ', '{"a": 2}', r'{"a": "\ud83d"}', "[]", '{"a": 3}']
    told: list[str] = []
    found = read(tmp_path / "a.jsonl", "\n".join(lines), bad=told.append)
    assert [(row.number, row.fields["a"]) for row in found] == [(1, 1), (3, 2), (6, 3)]
    assert [re.findall(r"line (\d)", why)[0] for why in told] == ["2", "4", "5"]
    told.clear()
    found = read(tmp_path / "a.tsv", b"a\n1\n\xff\n2\tb\n3", bad=told.append)
    assert [row.fields["a"] for row in found] == ["1", "3"] and len(told) == 2


def test_a_damaged_table_is_read_up_to_there_where_that_is_wanted(tmp_path):
    told: list[str] = []
    found = read(tmp_path / "a.csv", 'a\n1\n2\n"x', bad=told.append)
    assert [row.fields["a"] for row in found] == ["1", "2"] and len(told) == 1


def test_only_fields_that_are_read_need_be_text(tmp_path):
    text = r'{"text": "a \ud83d\ude00", "title": "\ud83d"}'
    (row,) = read(tmp_path / "a.jsonl", text, only={"text"})
    assert row.text("text", "") == "a 😀"


class Feature:
    """As `datasets` tells of a column whose numbers are classes."""

    def __init__(self, names):
        self.names = names


@pytest.fixture
def hub(monkeypatch):
    """A module `datasets` that holds some rows; what it was asked for."""
    asked = []

    class Table(list):
        def __init__(self, found):
            super().__init__(found)
            self.features = {"label": Feature(["a", "b"]), "text": None}

    def load_dataset(*args, **options):
        asked.append((args, options))
        if args[0] == "absent":
            raise RuntimeError("no such\n dataset")
        if args[0] == "torn":
            return (1 / 0 for _ in "a")
        texts = ["one", "two", "\ud83d"]
        return Table({"text": t, "label": i - 1} for i, t in enumerate(texts))

    module = types.SimpleNamespace(load_dataset=load_dataset, ClassLabel=Feature)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_rows_of_a_dataset_name_their_classes_and_are_checked_too(hub):
    told: list[str] = []
    found = list(rows.dataset("hf:a/b:small:test", streaming=True, bad=told.append))
    assert [row.fields["label"] for row in found] == [None, "a"]
    assert found[1].where == "hf:a/b:small:test, row 2"
    assert hub == [(("a/b", "small"), {"split": "test", "streaming": True})]
    assert len(told) == 1 and "row 3: 'text' holds half" in told[0]
    assert len(list(rows.dataset("hf:a", streaming=False, only={"label"}))) == 3


def test_a_dataset_that_cannot_be_loaded_is_told_in_a_sentence(hub, monkeypatch):
    with pytest.raises(ValueError, match="hf:absent cannot be loaded: no such dataset"):
        list(rows.dataset("hf:absent", streaming=True))
    with pytest.raises(ValueError, match="hf:torn cannot be loaded: division by zero"):
        list(rows.dataset("hf:torn", streaming=True))
    with pytest.raises(ValueError, match="does not name a dataset; write hf:<name>"):
        list(rows.dataset("hf:", streaming=True))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        list(rows.dataset("hf:a", streaming=True))
