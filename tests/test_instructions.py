"""Rows of instructions: files, splits, and what is refused."""

import json
from functools import partial

import pytest

from gpt_jax import instructions
from gpt_jax.rows import Row

ROW = {"instruction": "Say it twice.", "input": "ten", "output": "ten ten"}
TALK = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
}


def test_the_split_of_the_book_is_935_110_55_in_the_order_of_the_file():
    rows = [Row("", n, {}) for n in range(1100)]
    parts = instructions.split(
        rows, how="fraction", val_fraction=0.05, test_fraction=0.1
    )
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 935,
        "test": 110,
        "val": 55,
    }
    assert [*parts["train"], *parts["test"], *parts["val"]] == rows


def test_a_shuffled_split_loses_no_row_and_is_always_the_same():
    rows = [Row("", n, {}) for n in range(20)]
    cut = partial(instructions.split, rows, val_fraction=0.2, test_fraction=0.0)
    parts = cut(how="documents")
    found = [row.number for part in parts.values() for row in part]
    assert found != sorted(found) and sorted(found) == list(range(20))
    assert parts["test"] == [] and parts == cut(how="documents")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_json_and_json_lines_are_read_alike(tmp_path, name):
    wanted = [ROW, TALK]
    path = tmp_path / name
    lines = "\n".join(map(json.dumps, wanted))
    path.write_text(lines if name.endswith("l") else json.dumps(wanted))
    rows = instructions.read(str(path), cache=tmp_path, progress=False)
    assert [row.fields for row in rows] == wanted


def test_a_line_of_json_lines_ends_at_a_newline_alone(tmp_path):
    row = {**ROW, "output": "one\u2028two\x85three"}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(row, ensure_ascii=False)}\r\n" * 2, encoding="utf-8")
    rows = instructions.read(str(path), cache=tmp_path, progress=False)
    assert [row.fields for row in rows] == [row, row]


def test_the_library_of_python_is_a_source_without_a_download(tmp_path):
    rows = instructions.read("builtin:json", cache=tmp_path, progress=False)
    dumps = next(row for row in rows if row.fields["input"] == "dumps")
    assert dumps.fields["output"] == "Serialize ``obj`` to a JSON formatted ``str``."


@pytest.mark.parametrize(
    "text, words",
    [
        ('[{"instruction": "a"}, {"text": "b"}]', "row 2: it has the columns 'text'"),
        ('{"messages": [{"role": "bot", "content": ""}]}', "line 1: role 'bot'"),
        ('["a"]', "row 1 is text, not an object"),
        ("[]", "has no rows"),
        ("instruction,output", "a list of rows, or a row a line"),
    ],
)
def test_a_file_that_is_no_list_of_conversations_is_refused(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        instructions.read(str(tmp_path / "a.json"), cache=tmp_path, progress=False)


def test_an_absent_file_is_told_with_the_names_that_there_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="instructions, preferences, alpaca"):
        instructions.read("none.json", cache=tmp_path, progress=False)


@pytest.mark.parametrize(
    "count, val, test", [(20, 0, 0.1), (20, 0.5, 0.5), (1, 0.5, 0)]
)
def test_a_split_without_rows_to_train_or_validate_is_refused(count, val, test):
    with pytest.raises(ValueError, match=r"task\.test_fraction"):
        instructions.split(
            [ROW] * count, how="fraction", val_fraction=val, test_fraction=test
        )


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "has no rows"),
        ("[1]", "row 1 is the number 1, not an object"),
        ('{"a": 1}\nnot json', "line 2 is not JSON"),
        ("[{]", "is not JSON"),
    ],
)
def test_files_without_rows_are_refused(tmp_path, text, words):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        instructions.read_file(tmp_path / "rows.json")


@pytest.mark.fault(34, injections=4)
def test_rows_that_are_no_conversations_are_named_or_left_out(tmp_path):
    lines = [json.dumps(ROW), r'{"instruction": "a", "output": "b \ud83d"}', "{"]
    lines += ['{"text": "a"}', '{"instruction": 5}', json.dumps(TALK)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    read = partial(instructions.read, str(path), cache=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: 'output' holds half of"):
        read()
    told: list[str] = []
    assert [row.number for row in read(bad=told.append)] == [1, 6]
    assert [why.split(", ")[1][:6] for why in told] == [f"line {n}" for n in "2345"]
    path.write_text("{")
    with pytest.raises(
        ValueError, match=r"no rows that can be used, the first of 1 bec"
    ):
        read(bad=told.append)


def test_a_table_holds_instructions_too(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\nSay a.,a\n")
    (row,) = instructions.read(f"{tmp_path}/a.csv", cache=tmp_path, progress=False)
    assert row.fields == {"instruction": "Say a.", "output": "a"}
