"""Corpora: what is read, in which order, and what a download survives."""

import gzip
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest

from gpt_jax import corpora, plaintext


@pytest.fixture
def read(tmp_path):
    """Returns a function that opens a source and returns its documents."""

    def documents(source, field="text"):
        corpus = corpora.open(str(source), field=field, cache=tmp_path / "cache")
        return list(corpus.documents())

    return documents


def fingerprint(source, field="text"):
    return corpora.open(str(source), field=field, cache="unused").fingerprint


# --- files ----------------------------------------------------------------------------


def test_a_text_file_is_one_document_with_every_byte_of_it(tmp_path, read):
    text = "one\r\ntwo\ttab\n\n  é ☃ 𝄞 \x00 end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path / "a.txt") == [text]


def test_a_byte_order_mark_at_the_start_is_left_out_and_elsewhere_kept(tmp_path, read):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx\xef\xbb\xbfy")
    assert read(tmp_path / "a.txt") == ["x\ufeffy"]


def test_a_glob_reads_its_files_sorted_and_passes_over_empty_ones(tmp_path, read):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "note.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    assert read(f"{tmp_path}/**/*.txt") == ["a.txt", "b.txt", "sub/c.txt"]


def test_a_gz_file_reads_like_the_unpacked_one(tmp_path, read):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("grüße".encode()))
    rows = "".join(json.dumps({"body": text}) + "\n" for text in ("x", "y\n"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert read(tmp_path / "a.txt.gz") == ["grüße"]
    assert read(tmp_path / "b.jsonl.gz", field="body") == ["x", "y\n"]


def test_every_row_of_a_jsonl_file_is_a_document(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo"}\n\n{"text": "three", "id": 3}')
    assert read(path) == ["one\ntwo", "three"]


def test_a_folder_is_all_that_is_visible_below_it(tmp_path, read):
    for name in ("b.txt", "a/c.md", "a/.d.txt", ".git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a/c.md", "b.txt"]
    assert read(f"{tmp_path}/a/.*") == ["a/.d.txt"]


ROWS = [{"text": "one\ntwo"}, {"text": "three", "id": 3}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.JSONL", "\n".join(map(json.dumps, ROWS))),
        ("a.ndjson", "\n".join(map(json.dumps, ROWS))),
        ("a.json", json.dumps(ROWS)),
        ("a.csv", 'id,text\n1,"one\ntwo"\n3,three\n'),
    ],
)
def test_rows_of_every_kind_are_documents_and_never_learnt_as_they_stand(
    tmp_path, read, name, text
):
    (tmp_path / name).write_text(text)
    assert read(tmp_path / name) == ["one\ntwo", "three"]
    with pytest.raises(ValueError, match=r"no field 'body'.*name end in .txt to learn"):
        read(tmp_path / name, field="body")
    (tmp_path / name).rename(tmp_path / "a.txt")
    assert read(tmp_path / "a.txt") == [text]


def test_rows_that_0_1_learnt_as_text_are_another_text_now(tmp_path):
    """So that what it prepared of them is not found again."""
    for name in ("a.jsonl", "a.csv"):
        path, rows = tmp_path / name, b'{"text": "a"}'
        path.write_bytes(rows)
        sha256 = hashlib.sha256(rows).hexdigest()
        told = f"{path} {len(rows)} {sha256}\ntext"
        was = hashlib.sha256(told.encode()).hexdigest()
        assert (fingerprint(path) == was) == (name == "a.jsonl")


@pytest.mark.fault(34)
def test_each_real_file_is_read_once_whatever_links_lead_to_it(tmp_path, capfd):
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("texts/x.txt", "texts/a/y.txt", "other/z.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "texts/a/up").symlink_to("..")
    (tmp_path / "texts/more").symlink_to("../other")
    (tmp_path / "texts/a/again").symlink_to("../../other")
    (tmp_path / "texts/0.txt").symlink_to("x.txt")
    found = corpora.open(f"{tmp_path}/texts/**/*.txt", field="", cache="unused")
    wanted = ["texts/a/y.txt", "other/z.txt", "texts/x.txt"]
    assert sorted(found.documents()) == sorted(wanted)
    names = [piece.source.removeprefix(f"{tmp_path}/") for piece in found.pieces()]
    assert names == ["texts/a/y.txt", "texts/more/z.txt", "texts/x.txt"]
    shown = " ".join("".join(capfd.readouterr()).split())
    assert "links lead 3 times to what is read already" in shown


@pytest.mark.fault(34)
def test_a_file_whose_name_is_not_utf_8_is_read_like_any_other(tmp_path, read):
    (tmp_path / "a.txt").write_text("one")
    name = b"b\xff.txt".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_text("two")
    assert read(f"{tmp_path}/*.txt") == ["one", "two"]
    corpus = corpora.open(str(tmp_path / name), field="", cache="unused")
    assert [piece.source for piece in corpus.pieces()] == [f"{tmp_path}/b\\xff.txt"]
    (tmp_path / name).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"b\\xff.txt is not UTF-8"):
        read(tmp_path / name)


@pytest.mark.fault(34)
def test_what_cannot_be_opened_is_named_or_left_out(tmp_path, read):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to("nowhere")
    (tmp_path / "c.txt").symlink_to("c.txt")
    os.mkfifo(tmp_path / "d.txt")
    with pytest.raises(ValueError, match=r"b.txt is a link to nothing; data.skip_bad"):
        read(f"{tmp_path}/*.txt")
    with pytest.raises(ValueError, match=r"d.txt is a pipe or a device: give a file"):
        read(tmp_path / "d.txt")
    told: list[str] = []
    corpus = corpora.open(
        str(tmp_path), field="", cache="unused", bad=told.append, progress=False
    )
    assert list(corpus.documents()) == ["one"]
    assert [re.findall(r"(.)\.txt", why)[0] for why in told] == ["b", "c", "d"]


FORBIDDEN = """
import os, sys
from gpt_jax import corpora
if os.getuid() == 0:
    os.setuid(65534)
folder, told = sys.argv[1], []
for source in (folder, folder + "/b.txt"):
    try:
        corpora.open(source, field="", cache="unused")
    except (ValueError, PermissionError) as error:
        print(error)
corpus = corpora.open(folder, field="", cache="unused", bad=told.append)
print(list(corpus.documents()), told)
"""


@pytest.mark.fault(34)
def test_what_may_not_be_read_is_named_or_left_out():
    with tempfile.TemporaryDirectory() as name:  # others can see it
        folder = Path(name)
        (folder / "a.txt").write_text("one")
        (folder / "b.txt").write_text("two")
        (folder / "inner").mkdir()
        for path, mode in (("b.txt", 0), ("inner", 0), (".", 0o755)):
            (folder / path).chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", FORBIDDEN, name],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        (folder / "inner").chmod(0o755)
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert "inner cannot be read: Permission denied; data.skip_bad_docs=True" in first
    assert "Permission denied" in second and "b.txt" in second
    assert last.startswith("['one'] [") and last.count("Permission denied") == 2


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    corpus = corpora.open(f"{tmp_path}/*.txt", field="", cache="unused")
    assert list(corpus.documents()) == ["one", "two"]
    with (tmp_path / "b.txt").open("a") as file:
        file.write(" and more")
    with pytest.raises(ValueError, match=r"b.txt changed while it was read: begin aga"):
        list(corpus.documents())


def test_a_run_folder_is_no_text_and_neither_is_a_prepared_one(tmp_path, read):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a run folder.*--config.init_from="):
        read(tmp_path / "run")
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="prepared from another source"):
        read(tmp_path / "data")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_read_size_does_not_change_the_text(tmp_path, read, monkeypatch, size):
    text = "aé☃𝄞\n<|endoftext|>\nb\n" * 5
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(plaintext, "READ_BYTES", size)
    assert read(tmp_path / "a.txt") == [text]


def test_a_long_document_is_cut_only_behind_words(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_CHARS", 20)
    monkeypatch.setattr(plaintext, "READ_BYTES", 16)
    text = "def f():\n    return 1\n\n\nx = 2 \ny = é\nz_ = 4\nprint(x, y, z)\n\n" * 4
    (tmp_path / "a.py").write_text(text)
    corpus = corpora.open(str(tmp_path / "a.py"), field="", cache="unused")
    pieces = list(corpus.pieces())
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 8
    for left, right in itertools.pairwise(pieces):
        assert left.text[-1].isalnum() and right.text[0] in " \n"
        assert right.start == left.start + len(left.text) <= left.start + 30
    assert list(corpus.documents()) == [text]


def test_text_without_any_space_is_still_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_CHARS", 10)
    (tmp_path / "a.txt").write_text("x" * 95)
    corpus = corpora.open(str(tmp_path / "a.txt"), field="", cache="unused")
    assert max(len(piece.text) for piece in corpus.pieces()) <= 40
    assert list(corpus.documents()) == ["x" * 95]


@pytest.mark.fault(34)
def test_a_row_of_any_length_is_read_in_proportion_to_it(tmp_path, monkeypatch):
    """As a row of a gigabyte that is cut into pieces of a megabyte."""
    monkeypatch.setattr(corpora, "PIECE_CHARS", 1000)
    text = "x" * 1_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    corpus = corpora.open(str(tmp_path / "a.jsonl"), field="text", cache="unused")
    began = time.process_time()
    pieces = list(corpus.pieces())
    assert time.process_time() - began < 3  # each would be looked for in all the rest
    assert len(pieces) > 990 and "".join(piece.text for piece in pieces) == text


# --- identity -------------------------------------------------------------------------


def test_the_fingerprint_follows_names_contents_and_field(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    before = fingerprint(f"{tmp_path}/*.txt")
    assert fingerprint(f"{tmp_path}/*.txt") == before
    assert fingerprint(f"{tmp_path}/*.txt", field="body") != before
    (tmp_path / "b.txt").write_text("tow")  # the same size
    changed = fingerprint(f"{tmp_path}/*.txt")
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert len({before, changed, fingerprint(f"{tmp_path}/*.txt")}) == 3


def test_the_built_in_corpus_is_sorted_valid_source_without_tests(
    tmp_path, monkeypatch
):
    for name in ("b.py", "a/x.py", "test/t.py", "a/tests/t.py", "site-packages/s.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "a" / "__init__.py").touch()
    (tmp_path / "a" / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "a" / "data.txt").write_text("not source")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = corpora.open("builtin", field="", cache="unused")
    assert list(corpus.documents()) == ["# a/x.py\n", "# b.py\n"]
    assert corpus.size_hint == sum(map(len, corpus.documents()))


def test_one_folder_of_the_built_in_corpus_can_be_named(read):
    parts = read("builtin:json")
    assert any("class JSONDecoder" in text for text in parts)
    assert set(parts) < set(read("builtin"))
    for name in ("builtin:../bin", "builtin:", "builtin:nothing", "builtin:a/b"):
        with pytest.raises(
            FileNotFoundError, match=r"does not name a folder of Python"
        ):
            read(name)


def test_the_built_in_corpus_is_there_and_large():
    corpus = corpora.open("builtin", field="", cache="unused")
    assert corpus.size_hint is not None and corpus.size_hint > 5_000_000
    texts = list(corpus.documents())
    assert sum("class ZipFile:" in text for text in texts) == 1
    # Tables of code points, one in ten characters of the library, teach no code.
    assert not any("charmap_decode(input,errors,decoding_table)" in t for t in texts)


# --- mixtures and datasets ------------------------------------------------------------


def test_a_mixture_keeps_the_shares_of_text_to_within_a_document(tmp_path, read):
    for name, count in (("a", 90), ("b", 90)):
        rows = [json.dumps({"text": f"{name}{i:02}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    source = f"{tmp_path}/a.jsonl*3 + {tmp_path}/b.jsonl*1"
    mixed = read(source)
    assert mixed == read(source)
    for end in range(1, len(mixed)):
        a = sum(text[0] == "a" for text in mixed[:end])
        assert abs(a - 0.75 * end) <= 1
    assert [text for text in mixed if text[0] == "a"] == [f"a{i:02}" for i in range(90)]
    assert len(set(mixed)) == len(mixed) == 120  # a runs out: b is not carried on


@pytest.mark.parametrize(
    ("weight", "count"), [(".5", 150), ("5e-1", 150), ("1e1", 1000), ("2.", 600)]
)
def test_weights_of_a_mixture_are_written_as_numbers_are(tmp_path, read, weight, count):
    (tmp_path / "long.txt").write_text("L" * 300)
    rows = [json.dumps({"text": "s" * 10}) for _ in range(100)]
    (tmp_path / "short.jsonl").write_text("\n".join(rows))
    mixed = "".join(read(f"{tmp_path}/long.txt + {tmp_path}/short.jsonl*{weight}"))
    assert mixed.count("s") == count


def test_a_mixture_weighs_text_not_documents(tmp_path, read):
    (tmp_path / "long.txt").write_text("L" * 300)
    rows = [json.dumps({"text": "s" * 10}) for _ in range(100)]
    (tmp_path / "short.jsonl").write_text("\n".join(rows))
    mixed = "".join(read(f"{tmp_path}/long.txt + {tmp_path}/short.jsonl*0.5"))
    assert (mixed.count("L"), mixed.count("s")) == (300, 150)


def test_a_dataset_is_streamed_by_name_config_and_split(read, monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return iter([{"body": "one", "id": 1}, {"body": "two", "id": 2}])

    module = types.SimpleNamespace(load_dataset=load_dataset, ClassLabel=type)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read("hf:some/data:small:validation", field="body") == ["one", "two"]
    assert read("fineweb-edu", field="body") == ["one", "two"]
    assert asked == [
        (("some/data", "small"), {"split": "validation", "streaming": True}),
        (
            ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
            asked[0][1] | {"split": "train"},
        ),
    ]
    with pytest.raises(ValueError, match=r"row 1 has no field 'text'.*body, id"):
        read("hf:some/data")


def test_a_missing_datasets_package_is_named(read, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        read("openwebtext")


# --- mistakes -------------------------------------------------------------------------


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bad.txt", b"ab\xff cd", r"bad.txt is not UTF-8 text.* offset 2 "),
        ("late.txt", b"x" * 10 + b"\xc3", r"late.txt is not UTF-8.* offset 10 "),
        ("utf16.txt", "hi".encode("utf-16"), r"utf16.txt is UTF-16 text.*convert"),
        ("empty.txt", b"", r"empty.txt is empty"),
        (
            "cut.txt.gz",
            gzip.compress(b"x" * 999, mtime=0)[:-9],
            r"cut.txt.gz is cut short",
        ),
        ("not.txt.gz", b"plain", r"not.txt.gz is cut short or damaged"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a.jsonl, line 2 is not JSON"),
        (
            "b.jsonl",
            b'{"body": 1}',
            r"line 1 has no field 'text'; it has: body; .*data",
        ),
        ("c.jsonl", b"[1]", r"c.jsonl, row 1 is the number 1, not an obj"),
        (
            "e.jsonl",
            b'{"text": "\\ud800"}',
            r"e.jsonl, line 1: 'text' holds half of a surrogate",
        ),
        ("d.jsonl", b'{"text": "x"}\n\xff\n', r"d.jsonl is not UTF-8.* offset 14 "),
    ],
)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_damaged_files_are_named(
    tmp_path, read, monkeypatch, size, name, data, message
):
    monkeypatch.setattr(plaintext, "READ_BYTES", size)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_source_that_does_not_exist_is_told_with_the_names_that_do(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"'shakspere'.*tinyshakespeare"):
        read("shakspere")
    with pytest.raises(FileNotFoundError, match=r"did you mean tinyshakespeare\?"):
        read("tinyshakspeare")
    with pytest.raises(FileNotFoundError, match=r"with spaces: 'a\*3 \+ b\*1'"):
        read("builtin*3+austen*1")
    with pytest.raises(ValueError, match="holds no file that can be read"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"source is empty"):
        read(" ")
    with pytest.raises(ValueError, match="does not name a dataset"):
        read("hf:a:b:c:d")
    with pytest.raises(ValueError, match=r"weight of builtin .* above 0"):
        read("builtin*0 + builtin*1")


def test_tinystories_are_split_into_stories(tmp_path, read, monkeypatch):
    (tmp_path / "cache").mkdir()
    text = (
        "\nOnce.\n\nThe end.\n<|endoftext|>\n\nTwice.\n<|endoftext|>\n<|endoftext|>\n"
    )
    (tmp_path / "cache" / "tinystories.txt").write_text(text)
    monkeypatch.setattr(plaintext, "READ_BYTES", 5)
    assert read("tinystories") == ["Once.\n\nThe end.", "Twice."]


def test_every_named_corpus_can_be_opened_from_a_filled_cache(corpus_file):
    sizes = {"tinyshakespeare": 1_115_394, "the_verdict": 20_479, "austen": 4_025_038}
    for name, file in (
        ("tinyshakespeare", "tinyshakespeare.txt"),
        ("the_verdict", "the-verdict.txt"),
        ("austen", "austen.txt"),
    ):
        cache = corpus_file(file).parent
        corpus = corpora.open(name, field="text", cache=cache)
        assert [len(text) for text in corpus.documents()] == [sizes[name]]
