"""Labelled texts: every kind of table, and which rows end in which part."""

import json
from collections import Counter

import numpy as np
import pytest

from gpt_jax import labelled

PLAIN = labelled.Columns("text", "label", "", ())


def source(path, **changes):
    settings = {
        **{"source": str(path), "cache": "nowhere", "columns": PLAIN},
        **{"val": "", "test": "", "fractions": (0.7, 0.1, 0.2), "seed": 1},
        **{"balance": False, "labels": (), "skip": False},
    }
    return labelled.Source(**{**settings, **changes})


def write(path, rows, columns=("label", "text")):
    """Writes a TSV with a header."""
    lines = ["\t".join(columns), *("\t".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def many(spam=20, ham=50):
    return [("spam", f"s{i}") for i in range(spam)] + [
        ("ham", f"h{i}") for i in range(ham)
    ]


# --- reading --------------------------------------------------------------------------

ROWS = [("ham", "hello"), ("spam", "größer")]
TSV = "label\ttext\n" + "".join(f"{a}\t{b}\n" for a, b in ROWS)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.tsv", TSV),
        ("old.tsv", TSV.replace("\n", "\r")),
        ("a.csv", TSV.replace("\t", ",")),
        (
            "a.JSONL",
            "".join(json.dumps({"text": b, "label": a}) + "\n" for a, b in ROWS),
        ),
        ("a.json", json.dumps([{"text": b, "label": a, "more": 1} for a, b in ROWS])),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    rows = labelled.read(str(tmp_path / name), PLAIN, "nowhere")
    assert [(row.label, row.text) for row in rows] == ROWS
    assert name in rows[0].where


@pytest.mark.parametrize("name, mark", [("a.tsv", "\t"), ("a.csv", ",")])
def test_a_file_without_a_header_takes_the_names_that_it_is_given(tmp_path, name, mark):
    (tmp_path / name).write_text(f"ham{mark}hello\nspam{mark}win\n")
    columns = labelled.Columns("text", "label", "", ("label", "text"))
    rows = labelled.read(str(tmp_path / name), columns, "nowhere")
    assert [row[:2] for row in rows] == [("hello", "ham"), ("win", "spam")]


def test_labels_may_be_numbers_and_one_number_is_one_class(tmp_path):
    path = tmp_path / "a.jsonl"
    labels = [0, True, 1, 1.0, 2.5, float("nan"), None, " a "]
    path.write_text(
        "".join(json.dumps({"text": "a", "label": x}) + "\n" for x in labels)
    )
    found = [row.label for row in labelled.read(str(path), PLAIN, "")]
    assert found == ["0", "True", "1", "1", "2.5", "", "", "a"]


@pytest.mark.fault(34)
def test_one_number_in_two_spellings_is_not_two_classes(tmp_path):
    path = write(tmp_path / "a.tsv", [("1", "a"), ("1.0", "b"), ("0", "c")] * 9)
    with pytest.raises(
        ValueError, match=r"classes '1' and '1.0', which are one number"
    ):
        labelled.load(source(path))
    path = write(tmp_path / "a.tsv", [("7", "a"), ("007", "b")] * 40)  # codes, say
    assert labelled.load(source(path)).labels == ("007", "7")


@pytest.mark.fault(34, injections=4)
def test_rows_that_cannot_be_read_are_refused_or_counted(tmp_path):
    rows = [json.dumps({"text": t, "label": label}) for label, t in many()]
    bad = [r'{"text": "a \ud83d", "label": "ham"}', '{"text": 1, "label": "ham"}']
    bad += ["{", '{"text": "a", "label": ["ham"]}']
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, *bad]))
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 71: 'text' holds half of a sur"
    ):
        labelled.load(source(tmp_path / "a.jsonl"))
    found = labelled.load(source(tmp_path / "a.jsonl", skip=True))
    assert sum(map(len, found.parts)) == 70
    assert "left out: 4 that cannot be read (the first: " in found.summary()


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "a.tsv",
            "label\tmessage\nham\thi\n",
            "no field 'text'; .*label, message; name",
        ),
        ("a.tsv", "label\ttext\nham\thi\tyou\n", "line 2 has 3 fields .* 2 columns"),
        ("a.csv", 'label,text\nham,"hi\n', "line 2"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"\n', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "row 1 is the number 1, not an object"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "'text' is the number 3, not text"),
        ("a.json", '{"text": "a"}', "no field 'label'"),
        ("a.json", '{"text": "a", "label": []}', "'label' is a list, not a text or"),
        ("a.tsv", "label\ttext\n", "has no rows"),
        ("a.txt", "hello", "must end in .tsv, .csv"),
    ],
)
def test_what_is_no_table_is_refused_in_a_sentence(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        labelled.read(str(tmp_path / name), PLAIN, "nowhere")


def test_bytes_that_are_no_text_and_files_that_are_absent_are_refused(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"label\ttext\nham\t\xff\n")
    with pytest.raises(ValueError, match="not UTF-8 text: the byte at offset 15"):
        labelled.read(str(tmp_path / "a.tsv"), PLAIN, "nowhere")
    with pytest.raises(FileNotFoundError, match="there is no table"):
        labelled.read("absent.tsv", PLAIN, "nowhere")
    with pytest.raises(ValueError, match=r"write hf:<name>"):
        labelled.read("hf:", PLAIN, "nowhere")


def test_the_library_of_python_is_a_table_for_a_first_try():
    rows = labelled.read("builtin:json", PLAIN, "nowhere")
    assert {"decoder", "encoder"} <= {row.label for row in rows}
    assert all(row.text.strip() for row in rows)


def test_a_dataset_names_its_classes(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["a", "b"]),
        }
    )
    table = datasets.Dataset.from_dict(
        {"text": ["one", "two", "three"], "label": [1, 0, -1]}, features=features
    )
    table.to_parquet(tmp_path / "train.parquet")
    rows = labelled.read(f"hf:{tmp_path}", PLAIN, "nowhere")
    assert [row[:2] for row in rows] == [("one", "b"), ("two", "a"), ("three", "")]


# --- parts ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "own, sizes", [("val", [56, 20, 14]), ("test", [63, 7, 20]), ("both", [70, 20, 20])]
)
def test_a_part_without_a_table_of_its_own_is_cut_from_the_rows(tmp_path, own, sizes):
    path = write(tmp_path / "a.tsv", many())
    more = str(write(tmp_path / "b.tsv", [(a, f"{b}+") for a, b in many(10, 10)]))
    given = {name: more for name in ("val", "test") if own in (name, "both")}
    found = labelled.load(source(path, **given))
    assert [len(part) for part in found.parts] == sizes
    texts = [row.text for part in found.parts for row in part if "+" not in row.text]
    assert sorted(texts) == sorted(text for _, text in many())


def test_shares_are_decimal_fractions():
    """0.29 * 100 is 28.999999999999996 in binary."""
    rows = [labelled.LabelledText(f"{i}", "a", "", "") for i in range(100)]
    parts = labelled.cut(rows, (0.29, 0.57, 0.14), np.random.default_rng(0))
    assert [len(part) for part in parts] == [29, 57, 14]


def test_rows_are_cut_into_three_parts_that_share_none(tmp_path):
    found = labelled.load(source(write(tmp_path / "a.tsv", many())))
    assert [len(part) for part in found.parts] == [49, 7, 14]
    texts = [row.text for part in found.parts for row in part]
    assert sorted(texts) == sorted(text for _, text in many())
    assert found.labels == ("ham", "spam")
    again = labelled.load(source(tmp_path / "a.tsv"))
    other = labelled.load(source(tmp_path / "a.tsv", seed=2))
    assert again.fingerprint == found.fingerprint != other.fingerprint
    assert "49 train, 7 val, 14 test" in found.summary()


def test_a_balanced_table_has_as_many_of_each_class_as_the_rarest(tmp_path):
    path = write(tmp_path / "a.tsv", many(spam=20, ham=50))
    found = labelled.load(source(path, balance=True))
    rows = [row for part in found.parts for row in part]
    assert Counter(row.label for row in rows) == {"ham": 20, "spam": 20}
    ham = {row.text for row in rows if row.label == "ham"}
    assert ham != {f"h{i}" for i in range(20)}  # drawn, not the first ones


def test_a_column_may_say_the_part(tmp_path):
    parts = ["train", "Validation", "test", "dev", "training"] * 4
    rows = [
        (label, f"{label}{i}", part)
        for i, part in enumerate(parts)
        for label in ("ham", "spam")
    ]
    path = write(tmp_path / "a.tsv", rows, ("label", "text", "split"))
    columns = labelled.Columns("text", "label", "split", ())
    found = labelled.load(source(path, columns=columns))
    assert [len(part) for part in found.parts] == [16, 16, 8]
    assert {row.part for row in found.parts.test} == {"test"}
    write(path, [*rows, ("ham", "x", "holdout")], ("label", "text", "split"))
    with pytest.raises(ValueError, match=r"task.split_column: 'holdout' is not one of"):
        labelled.load(source(path, columns=columns))


def test_parts_may_be_tables_of_their_own(tmp_path):
    train = write(tmp_path / "train.tsv", many(spam=3, ham=9))
    val = write(tmp_path / "val.tsv", many(spam=2, ham=4))
    own = {"val": str(val), "fractions": (0.8, 0.2, 0.0)}
    found = labelled.load(source(train, **own, balance=True))
    assert [len(part) for part in found.parts] == [6, 6, 0]  # what is judged stays
    write(val, [("eggs", "x"), *many(1, 1)])
    with pytest.raises(ValueError, match=r"val\.tsv, line 2 .*unknown label 'eggs'"):
        labelled.load(source(train, **own))
    found = labelled.load(source(train, **own, skip=True))
    assert found.skipped == {"with the unknown label 'eggs'": 1}
    assert "left out: 1 with the unknown label" in found.summary()


@pytest.mark.parametrize(
    "row, message",
    [(("ham", "  "), "without a text"), (("", "hello"), "without a label")],
)
def test_rows_without_text_or_label_are_refused_or_counted(tmp_path, row, message):
    path = write(tmp_path / "a.tsv", [*many(), row])
    with pytest.raises(ValueError, match=f"line 72 is a row {message}"):
        labelled.load(source(path))
    found = labelled.load(source(path, skip=True))
    assert found.skipped == {message: 1}
    assert sum(map(len, found.parts)) == 70


@pytest.mark.parametrize(
    "rows, changes, message",
    [
        (many(spam=0), {}, r"has 1 class \(ham\): a classifier needs at least two"),
        (many(spam=1), {}, "part has no row of the class spam"),
        (many(), {"labels": ("ham", "spam", "eggs")}, "no row of the class eggs"),
        (many(), {"labels": ("ham", "ham")}, "names a class twice"),
        (many(), {"labels": ("ham",)}, "task.labels names one class, 'ham'"),
        (many(), {"fractions": ("0.7", "0.1", "0.2")}, r"holds text \('0.7'\)"),
        (many(), {"fractions": (True, 0, 0)}, r"task.fractions holds true"),
        (many(), {"fractions": (0.7, 0.1, 0.1)}, "task.fractions is"),
        (many(), {"fractions": (1.2, 0.1, -0.3)}, "task.fractions is"),
    ],
)
def test_classes_and_shares_that_teach_nothing_are_refused(
    tmp_path, rows, changes, message
):
    path = write(tmp_path / "a.tsv", rows)
    with pytest.raises(ValueError, match=message):
        labelled.load(source(path, **changes))


def test_a_column_and_own_tables_for_the_parts_contradict_each_other():
    columns = labelled.Columns("text", "label", "split", ())
    with pytest.raises(ValueError, match="give one of them"):
        source("a.tsv", columns=columns, val="b.tsv")


def test_drawing_rows_takes_each_once():
    rows = [labelled.LabelledText(f"{i}", "ab"[i % 2], "", "") for i in range(9)]
    kept = labelled.balanced(rows, np.random.default_rng(0))
    assert len({row.text for row in kept}) == len(kept) == 8


def test_the_sms_collection_balances_to_747_of_each_class(corpus_file):
    path = corpus_file("sms_spam.tsv")
    columns = labelled.Columns("text", "label", "", ("label", "text"))
    rows = labelled.read(str(path), columns, "nowhere")
    assert Counter(row.label for row in rows) == {"ham": 4827, "spam": 747}
    found = labelled.load(source(path, columns=columns, balance=True))
    assert [len(part) for part in found.parts] == [1045, 149, 300]
