"""The text of a file: lines, packers, and what is told of files that are none."""

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from gpt_jax import plaintext


def archive(make, write):
    """Returns the bytes of an archive with one member."""
    packed = io.BytesIO()
    with make(packed) as into:
        write(into)
    return packed.getvalue()


def array() -> bytes:
    into = io.BytesIO()
    np.save(into, np.zeros(3))
    return into.getvalue()


def database() -> bytes:
    with sqlite3.connect(":memory:") as found:
        found.execute("create table a (b)")
        return found.serialize()


TAR = archive(
    lambda file: tarfile.TarFile(fileobj=file, mode="w"),
    lambda into: into.addfile(tarfile.TarInfo("a.txt")),
)
ZIP = archive(
    lambda file: zipfile.ZipFile(file, "w"), lambda into: into.writestr("a.txt", "a")
)
NO_TEXT = {
    # What is letters and spaces only would be learnt as it stands.
    "a.pdf": (b"%PDF-1.4\n1 0 obj\n", "is a PDF document.*pdftotext"),
    "a.rtf": (rb"{\rtf1\ansi Hello}", "word processor"),
    "a.ps": (b"%!PS-Adobe-3.0\n", "is a PostScript"),
    "a.tar": (TAR, "is a tar archive.*tar -xf"),
    "a.docx": (ZIP, r"is a zip archive \(.docx"),
    "a.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a PNG image"),
    "a.jpg": (b"\xff\xd8\xff\xe0", "is a JPEG"),
    "a.mp4": (b"\0\0\0\x20ftypisom", "a sound or a film"),
    "a.txt": (gzip.compress(b"text"), r"is packed by gzip.*let its name end in .gz"),
    "a.zst": (b"\x28\xb5\x2f\xfd$", "is packed by Zstandard.*zstd -d"),
    "a.parquet": (b"PAR1\x15\0\x15", r"is a Parquet table.*\.jsonl"),
    "a.npy": (array(), "an array of numpy"),
    "a.pkl": (pickle.dumps([1, "a"]), "a pickle"),
    "a.db": (database(), "SQLite"),
    "a.safetensors": (save({"a": np.zeros(3)}), "file of weights"),
    "mark.txt": ("\ufeffhi".encode("utf-16-le"), "is UTF-16 text.*iconv -f UTF-16"),
    "long.txt": ("\ufeffhi".encode("utf-32-be"), "is UTF-32 text.*iconv -f UTF-32"),
    "none.txt": ("some text".encode("utf-16-le"), "9 are zero.*iconv -f UTF-16"),
    "zeros.txt": (b"text" + b"\0" * 96, "of its first 100 bytes 96 are zero"),
    "latin.txt": ("café".encode("latin-1"), "byte at offset 3 is invalid.*iconv"),
}


@pytest.mark.fault(34, injections=20)
@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("read", [plaintext.chunks, plaintext.lines])
def test_a_file_that_is_no_text_is_told_by_what_it_is(tmp_path, name, read):
    data, words = NO_TEXT[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} .*{words}"):
        for found in read(tmp_path / name):
            if isinstance(found, plaintext.Line):
                plaintext.decoded(tmp_path / name, found)


@pytest.mark.parametrize(
    "text", ["ID3 tags are old.", "MZ, he wrote", "PAR1 of 3", "PK and I", "a\0b, say"]
)
def test_a_text_that_begins_almost_like_something_else_is_a_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert plaintext.whole(tmp_path / "a.txt") == text


PACK = {"GZ": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("packer", PACK)
def test_a_packed_file_reads_like_the_unpacked_one(tmp_path, packer):
    path, text = tmp_path / f"a.txt.{packer}", "grüße\n☃" * 999
    path.write_bytes(PACK[packer](text.encode()))
    assert plaintext.whole(path) == text
    assert plaintext.suffix(path) == ".txt"
    path.write_bytes(PACK[packer](text.encode())[:-9])
    with pytest.raises(ValueError, match=r"a.txt.* is cut short or damaged"):
        plaintext.whole(path)
    path.write_bytes(b"not packed at all")
    with pytest.raises(ValueError, match=r"a.txt.* is cut short or damaged"):
        plaintext.whole(path)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(st.sampled_from([b"", b"a", b"\xe9\xff", b"bc"]), max_size=6),
    size=st.integers(1, 5),
)
def test_lines_are_what_stands_between_the_ends_that_a_file_has(
    tmp_path_factory, end, parts, size
):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(end.join(parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plaintext, "READ_BYTES", size)
        patch.setattr(plaintext, "HEAD_BYTES", 1)
        found = list(plaintext.lines(path))
    wanted = end.join(parts).split(end)
    wanted = wanted[:-1] if wanted[-1] == b"" else wanted
    assert [line.data.removesuffix(end) for line in found] == wanted
    assert b"".join(line.data for line in found) == path.read_bytes()
    assert [line.number for line in found] == list(range(1, len(found) + 1))
    sizes = np.cumsum([0, *(len(line.data) for line in found)])[:-1]
    assert [line.offset for line in found] == sizes.tolist()


def test_a_return_inside_a_line_of_a_file_with_line_feeds_is_kept(tmp_path):
    (tmp_path / "a").write_bytes(b"a\rb\nc\r\n")
    assert [line.data for line in plaintext.lines(tmp_path / "a")] == [
        b"a\rb\n",
        b"c\r\n",
    ]


@pytest.mark.fault(34)
def test_a_line_of_any_length_is_read_in_proportion_to_it(tmp_path, monkeypatch):
    """80 MB in megabytes and 5 MB in these small blocks are joined as often."""
    monkeypatch.setattr(plaintext, "READ_BYTES", 512)
    (tmp_path / "a").write_bytes(b"x" * 5_000_000 + b"\ny")
    began = time.process_time()
    assert [len(line.data) for line in plaintext.lines(tmp_path / "a")] == [
        5_000_001,
        1,
    ]
    assert time.process_time() - began < 1  # quadratic: 25 GB are copied


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *((None, "null"), (True, "true"), (1, "the number 1"), (0.5, "the number 0.5")),
        *(("a", "text"), ([], "a list"), ((), "a list"), ({}, "an object")),
        (b"", "neither text, number, list nor object"),
    ],
)
def test_a_value_is_called_what_json_calls_it(value, words):
    assert plaintext.kind(value) == words


def test_half_a_surrogate_pair_is_found_in_every_text_of_a_value():
    plaintext.refuse_half_pairs(
        {"a": ["\ud83d\ude00".encode("utf-16", "surrogatepass")]}, "x"
    )
    for value in ("ab\ud83d", ["a", "ab\ud83d"], {"b": ({"a": "ab\ud83d"},)}):
        with pytest.raises(
            ValueError, match=r"here holds half .*'\\ud83d' at char.* 2"
        ):
            plaintext.refuse_half_pairs(value, "here")
    with pytest.raises(ValueError, match="here, in a name, holds half"):
        plaintext.refuse_half_pairs({"\udc00": 1}, "here")
