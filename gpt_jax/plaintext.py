"""The text of a file: unpacked and decoded, or what the file is where it is no text.

Text is UTF-8, as it is or packed by gzip, bzip2 or xz. A file that is something else is
told by what it begins with: some of them would pass for text, byte by byte.
"""

import bz2
import contextlib
import gzip
import lzma
import re
import zlib
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.files import shown

READ_BYTES = 1 << 20
HEAD_BYTES = 512  # of a file, which tell what it is
NUL_SHARE = 0.25  # of a head: every second byte of UTF-16's English is one

PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

_EXPORT = "export its text, or take it out with a converter, to a .txt file"
_UTF16 = "convert it (iconv -f UTF-16 -t UTF-8)"
# What files begin with that are no text, what they are, and how to get at the text.
FORMATS = (
    (rb"%PDF-", "a PDF document", "take its text out: pdftotext FILE.pdf"),
    (rb"%!PS", "a PostScript document", _EXPORT),
    (rb"\{\\rtf", "a document of a word processor (RTF)", _EXPORT),
    (rb"\xd0\xcf\x11\xe0", "a document of an office program", _EXPORT),
    (
        rb"PK(\x03\x04|\x05\x06)",
        "a zip archive (.docx, .xlsx, .epub and .odt are such)",
        "unpack it, or export its text",
    ),
    (rb"\x1f\x8b", "packed by gzip", "let its name end in .gz"),
    (rb"BZh[1-9]1AY&SY", "packed by bzip2", "let its name end in .bz2"),
    (rb"\xfd7zXZ\0", "packed by xz", "let its name end in .xz"),
    (rb"\x28\xb5\x2f\xfd", "packed by Zstandard", "unpack it: zstd -d FILE"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
    (rb"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (rb"[\s\S]{257}ustar", "a tar archive", "unpack it: tar -xf FILE"),
    (rb"\x89PNG\r\n", "a PNG image", "leave it out"),
    (rb"\xff\xd8\xff", "a JPEG image", "leave it out"),
    (rb"GIF8[79]a", "a GIF image", "leave it out"),
    (rb"(II\*\0|MM\0\*)", "a TIFF image", "leave it out"),
    (rb"RIFF[\s\S]{4}(WEBP|WAVE|AVI )", "an image, a sound or a film", "leave it out"),
    (rb"(ID3[\2-\4]\0|OggS\0|fLaC\0|\0\0\0.ftyp)", "a sound or a film", "leave it out"),
    (rb"PAR1\x15", "a Parquet table", "write it as .jsonl, or read it by hf:FOLDER"),
    (rb"ARROW1\0\0", "an Arrow table", "write it as .jsonl"),
    (rb"SQLite format 3\0", "an SQLite database", "write its rows as .jsonl"),
    (rb"\x89HDF\r\n", "an HDF5 file", "write its texts as .jsonl"),
    (rb"\x93NUMPY", "an array of numpy", "write its texts as .jsonl"),
    (rb"\x80[\x02-\x05]", "a pickle of Python, which is never opened", "leave it out"),
    (rb"[\s\S]{2,4}\0{4,6}\{\"", "a file of weights (safetensors)", "leave it out"),
    (rb"\x7fELF|MZ\x90\0", "a program", "leave it out"),
    (rb"(\xff\xfe\0\0|\0\0\xfe\xff)", "UTF-32 text", _UTF16.replace("16", "32")),
    (rb"(\xff\xfe|\xfe\xff)", "UTF-16 text", _UTF16),
)

HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can spell it, UTF-8 cannot


class Line(NamedTuple):
    """A line of a file with its end, its number from 1 on, and the bytes before it."""

    number: int
    offset: int
    data: bytes


def chunks(path: Path) -> Iterator[str]:
    """Yields the decoded text of a file, a megabyte at a time.

    A byte order mark at its beginning is left out.

    Raises:
      ValueError: it is no text, a byte is not UTF-8, or packed data is damaged.
    """
    decoder = getincrementaldecoder("utf-8")()
    offset = 0
    for data in blocks(path):
        # The decoder may hold back up to three bytes of an unfinished character.
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _not_text(path, offset - held + error.start) from None
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(data)


def whole(path: Path) -> str:
    """Returns the decoded text of a file; see `chunks`."""
    return "".join(chunks(path))


def lines(path: Path) -> Iterator[Line]:
    r"""Yields the lines of a file, not decoded yet; the time is that of reading it.

    They end at "\n" (or "\r\n"), and in a file that has none of these at "\r".

    Raises:
      ValueError: it is no text, or packed data is damaged.
    """
    held: list[bytes] = []
    number, offset, end, carry = 1, 0, b"", b""
    for block in blocks(path):
        data, carry = carry + block, b""
        if not end:
            if block and data.endswith(b"\r"):  # a "\n" may follow
                data, carry = data[:-1], b"\r"
            end = next((e for e in (b"\n", b"\r") if e in data), b"")
        *ended, rest = data.split(end) if end else [data]
        for part in ended:
            line = b"".join([*held, part, end])
            yield Line(number, offset, line)
            number, offset, held = number + 1, offset + len(line), []
        held.append(rest)
    if last := b"".join(held):
        yield Line(number, offset, last)


def decoded(path: Path, line: Line) -> str:
    """Returns the text of a line with its end; ValueError says which byte is none."""
    try:
        return line.data.decode("utf-8-sig" if line.number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(path, line.offset + error.start) from None


def blocks(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file, unpacked, and then an empty block.

    Raises:
      ValueError: it begins like something that is no text, or it is damaged.
    """
    unpacked: Any = PACKED.get(path.suffix.lower(), contextlib.nullcontext)
    try:
        with path.open("rb") as packed, unpacked(packed) as file:
            data = file.read(max(READ_BYTES, HEAD_BYTES))
            _refuse_formats(path, data[:HEAD_BYTES])
            while data:
                yield data
                data = file.read(READ_BYTES)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is not None:  # the disk's or the system's, not the packer's
            raise
        raise _damaged(path, error) from None
    yield b""


def suffix(path: Path) -> str:
    """Returns the end of a file's name in small letters, without that of a packer."""
    name = Path(path.name.lower())
    return (Path(name.stem) if name.suffix in PACKED else name).suffix


def refuse_half_pairs(value: Any, where: str) -> None:
    """Raises ValueError where a text, or one in lists and objects, is none.

    Half of a surrogate pair is what is left of an emoji that a program cut in two. No
    file and no tokenizer can hold it.
    """
    if isinstance(value, str):
        if found := HALF_PAIR.search(value):
            raise ValueError(
                f"{where} holds half of a surrogate pair ({found[0]!r} at character "
                f"{found.start()}), which is not text: an emoji was cut; remove it"
            )
    elif isinstance(value, dict):
        for key, inner in value.items():
            refuse_half_pairs(key, f"{where}, in a name,")
            refuse_half_pairs(inner, where)
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_half_pairs(inner, where)


def kind(value: Any) -> str:
    """Returns what a value of JSON is, in the words of sentences."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"the number {value}"
    kinds = {str: "text", list: "a list", tuple: "a list", dict: "an object"}
    found = (name for of, name in kinds.items() if isinstance(value, of))
    return next(found, "neither text, number, list nor object")


def _refuse_formats(path: Path, head: bytes) -> None:
    for begins, what, cure in FORMATS:
        if re.match(begins, head):
            raise ValueError(f"{shown(path)} is {what}, not UTF-8 text: {cure}")
    if head.count(0) > NUL_SHARE * len(head):
        raise ValueError(
            f"{shown(path)} is no UTF-8 text: of its first {len(head)} bytes "
            f"{head.count(0)} are zero; where it is UTF-16 without a mark, {_UTF16}"
        )


def _not_text(path: Path, offset: int) -> ValueError:
    return ValueError(
        f"{shown(path)} is not UTF-8 text: the byte at offset {offset} is invalid; "
        "convert the file to UTF-8 (iconv -f WINDOWS-1252 -t UTF-8, say)"
    )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{shown(path)} is cut short or damaged: {error}")
