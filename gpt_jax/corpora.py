"""Where text comes from: the built-in corpus, files, downloads, datasets, mixtures.

`open(source)` returns a Corpus, whose text is read as a stream of pieces, so a file
of any size needs little memory. Text comes out as it is stored: only a byte order
mark at the start of a file is left out. A file whose name says that it holds rows
(`rows.READERS`) is never learnt as it stands: each of its rows is a document.
"""

import itertools
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import downloads, names, paths, plaintext, rows, screen, stores
from gpt_jax.files import digest, digest_of, expand, is_address, shown

# A longer document is handed over in pieces, so that memory stays bounded.
PIECE_CHARS = 1 << 20
# Where a long document is cut: behind a letter or digit, before a space or line break.
# No token of the character, byte and word tokenizers spans such a place, nor does one
# of GPT-2's rule or its descendants, so the ids are those of the whole document.
CUT = re.compile(r"(?<=[^\W_])(?=[ \n])")

# The separator line between the stories of TinyStories; no other source has one.
STORY_END = "<|endoftext|>"

DATASETS = {
    "openwebtext": "hf:Skylion007/openwebtext",
    "fineweb-edu": "hf:HuggingFaceFW/fineweb-edu:sample-10BT",
}
NAMES = (
    "builtin",
    "tinyshakespeare",
    "the_verdict",
    "austen",
    "tinystories",
    *DATASETS,
)

# Left out of the built-in corpus: tests (some hold text that is invalid on purpose),
# what others installed, and folders that only some builds of Python have.
BUILTIN_SKIPS = {
    *("test", "tests", "idlelib", "idle_test", "lib2to3"),
    *("site-packages", "dist-packages", "__pycache__"),
    *("pydoc_data", "encodings"),  # a string literal and tables of bytes, not code
}

WEIGHT = re.compile(r"\s*(.+?)\s*\*\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


class Piece(NamedTuple):
    """A document, or a part of a long one; `ends` is true for its last part."""

    text: str
    source: str  # the file or dataset that it is from
    start: int  # characters of its document before it
    ends: bool


@dataclass(frozen=True)
class Corpus:
    """A source of text that can be read again and again, always in the same order.

    Attributes:
      name: short and fit for a file name.
      fingerprint: sha256 over the names, sizes and contents of the files; over the
        name alone for a streamed dataset.
      size_hint: about how many bytes of text there are; None when nobody knows.
      pieces: returns a fresh iterator over the text.
    """

    name: str
    fingerprint: str
    size_hint: int | None
    pieces: Callable[[], Iterator[Piece]]

    def documents(self) -> Iterator[str]:
        """Yields whole documents, however long they are."""
        parts: list[str] = []
        for piece in self.pieces():
            parts.append(piece.text)
            if piece.ends:
                yield "".join(parts)
                parts = []


def open(
    source: str,
    *,
    field: str,
    cache: str | Path,
    progress: bool = True,
    bad: Callable[[str], object] | None = None,
) -> Corpus:
    """Returns the corpus that a source names.

    Args:
      source: "builtin" (the source of the running Python's standard library;
        "builtin:json" is one folder of it), one of NAMES, a file, a folder or a glob
        (rows by `field`, any other file is text; see `plaintext` for packed ones),
        any of them in a store (gs://bucket/books/*.txt),
        `hf:<dataset>[:<config>][:<split>]`, or a mixture "a*3 + b*1". Hidden files
        of a folder or glob are not looked at; links are followed, and each file is
        read once.
      field: the field of a row that holds its text.
      cache: the folder where downloads are kept.
      progress: show how far a download is, and say which links lead round.
      bad: is told why a document or a file cannot be read, each time it is met; it is
        then left out. None: it is an error.

    Raises:
      FileNotFoundError: there is no such file or corpus.
      ValueError: the source cannot be used: empty, a run, damaged, not text.
      OSError: a file cannot be read.
    """
    if not source.strip():
        raise ValueError(
            f"data.source is empty; name a file or one of: {', '.join(NAMES)}"
        )
    is_file = not is_address(source) and expand(source).exists()
    if " + " in source and not is_file:
        parts = [_weighted(part) for part in source.split(" + ")]
        opened = [
            (open(name, field=field, cache=cache, progress=progress, bad=bad), weight)
            for name, weight in parts
        ]
        return mixture(opened)
    if source in DATASETS:
        return _dataset(source, DATASETS[source], field, bad)
    if source.startswith("hf:"):
        return _dataset(_short(source), source, field, bad)
    if source == "builtin" or source.startswith("builtin:"):
        return _builtin(source)
    if source in NAMES:
        path = downloads.fetch(source, cache, progress=progress)
        identity = _identity([(source, path)])
        read = _stories if source == "tinystories" else _file
        return Corpus(
            source, identity, path.stat().st_size, lambda: read(path, source, field)
        )
    return _local(source, field, bad, screen.Show(progress))


def mixture(parts: list[tuple[Corpus, float]]) -> Corpus:
    """Returns the documents of several corpora, interleaved by weight.

    Each next document is from the corpus that is furthest behind its share of the
    text so far (in characters; the first listed of equals). No document is used twice:
    the mixture ends when the corpus whose turn it is has no more, so shares hold to
    within one document, and what is left of the others stays unused.
    """
    for corpus, weight in parts:
        if not weight > 0:
            raise ValueError(
                f"the weight of {corpus.name} in the mixture is {weight:g}; it must "
                "be above 0"
            )

    def read() -> Iterator[Piece]:
        streams = [corpus.pieces() for corpus, _ in parts]
        taken = [0.0] * len(parts)
        while True:
            turn = taken.index(min(taken))
            ends = False
            while not ends:
                piece = next(streams[turn], None)
                if piece is None:
                    return
                taken[turn] += len(piece.text) / parts[turn][1]
                ends = piece.ends
                yield piece

    identity = [f"{corpus.fingerprint}*{weight:g}" for corpus, weight in parts]
    return Corpus(
        name=_short("-".join(corpus.name for corpus, _ in parts)),
        fingerprint=_hash("mixture", *identity),
        size_hint=None,
        pieces=read,
    )


def _builtin(source: str) -> Corpus:
    """Returns the library's own source; files that are not UTF-8 are left out."""
    library = Path(sysconfig.get_path("stdlib"))
    _, colon, part = source.partition(":")
    if colon and not (part.isidentifier() and (library / part).is_dir()):
        raise FileNotFoundError(
            f"{source!r} does not name a folder of Python's library in {library}; "
            'name one, as in "builtin:json", or take "builtin"'
        )
    root = library / part
    found = [
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not BUILTIN_SKIPS.intersection(path.relative_to(root).parts[:-1])
    ]
    files = [(name, path) for name, path in sorted(found) if _is_text(path)]
    if not files:
        raise ValueError(
            f"the built-in corpus is the Python source in {root}, but no .py file is "
            "there; give data.source a text file of your own"
        )
    size = sum(path.stat().st_size for _, path in files)

    def read() -> Iterator[Piece]:
        for name, path in files:
            yield from _file(path, name, "")

    return Corpus(_short(source), _identity(files), size, read)


def _local(source: str, field: str, bad: rows.Bad, show: screen.Show) -> Corpus:
    far, path = is_address(source), stores.opened(source)
    if path.is_dir():
        _refuse_run(source, path)
    if far:
        found = paths.Matches(stores.listed(source))
    elif path.is_dir():
        found = paths.matching(path / "**")
    elif path.exists():
        if why := paths.unreadable(path):
            raise ValueError(why)
        found = paths.Matches([path])
    else:
        found = paths.matching(path)
    for why in found.unread:
        rows.refuse(ValueError(why if bad else f"{why}; {SKIP}"), bad)
    sources = _readable(found.files, bad)
    if not sources and path.is_dir():
        raise ValueError(f"{source} holds no file that can be read")
    if not sources:
        near = names.did_you_mean(source, NAMES)
        if not near and "+" in source:
            near = "; a mixture is written with spaces: 'a*3 + b*1'"
        raise FileNotFoundError(
            f"no file and no corpus is called {shown(source)!r}; corpora are: "
            f"{', '.join(NAMES)}{near}"
        )
    if found.again:
        show.say(
            f"{source}: links lead {found.again} times to what is read already; each "
            "file is read once"
        )
    # Empty files are common among many, but one that was asked for is a mistake.
    sources = [one for one in sources if one.size]
    if not sources:
        raise ValueError(f"{source} is empty; give a file that holds text")
    packed = any(one.path.suffix.lower() in plaintext.PACKED for one in sources)
    parts = [f"{one.path} {one.size} {one.sha256}" for one in sources]
    # In 0.1 only these rows were documents: what it prepared of others is not meant.
    others = [
        one for one in sources if not re.search(r"\.jsonl(\.gz)?$", one.path.name)
    ]
    told = ["rows"] if any(rows.is_rows(one.path) for one in others) else []
    folder = path if far else path.resolve()
    name = folder.name if path.is_dir() else path.name.removesuffix(".gz")

    def read() -> Iterator[Piece]:
        for one in sources:
            try:
                yield from _file(one.path, shown(one.path), field, bad)
            except ValueError as error:
                many = len(sources) > 1 or rows.is_rows(one.path)
                raise ValueError(f"{error}; {SKIP}" if many else str(error)) from None
            if stores.stamp(one.path) != one.stamp:
                raise ValueError(
                    f"{shown(one.path)} changed while it was read: begin again when "
                    "nothing writes to it"
                )

    return Corpus(
        name=_short(name if path.exists() else source),
        fingerprint=_hash(*parts, field, *told),
        size_hint=None if packed else sum(one.size for one in sources),
        pieces=read,
    )


SKIP = "data.skip_bad_docs=True leaves out what cannot be read"


class Source(NamedTuple):
    """A file as it was found: its size, its sha256, and what tells that it changed."""

    path: Path
    size: int
    sha256: str
    stamp: Any


def _readable(files: list[Path], bad: rows.Bad) -> list[Source]:
    """Returns the files that can be read; raises OSError for others, or tells `bad`."""
    found = []
    for path in files:
        try:
            stamp = stores.stamp(path)
            size = path.stat().st_size
            found.append(Source(path, size, digest_of(path), stamp))
        except OSError as error:
            if bad is None:
                raise
            bad(f"{shown(path)} cannot be read: {error.strerror}")
    return found


def _refuse_run(source: str, path: Path) -> None:
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        raise ValueError(
            f"{source} is a run folder, which holds no text to learn; to start from "
            f"its weights set --config.init_from={source}"
        )
    if (path / "train" / "index.json").is_file():
        raise ValueError(
            f"{source} holds a text that was prepared from another source; name that "
            "source, and it is found again"
        )


def _file(path: Path, name: str, field: str, bad: rows.Bad = None) -> Iterator[Piece]:
    if rows.is_rows(path):
        cure = "name the right one with data.field"
        cure += ", or let the file's name end in .txt to learn it as it stands"
        for text in _texts(rows.read(path, only={field}, bad=bad), field, cure, bad):
            yield from _cut(_slices(text), name)
    elif bad is None or _can_be_read(path, bad):
        yield from _cut(plaintext.chunks(path), name)


def _texts(
    found: Iterator[rows.Row], field: str, cure: str, bad: rows.Bad
) -> Iterator[str]:
    """Yields the text of every row that has one; see `open` for `bad`."""
    for row in found:
        try:
            text = row.text(field, cure)
        except ValueError as error:
            rows.refuse(error, bad)
        else:
            yield text


def _can_be_read(path: Path, bad: Callable[[str], object]) -> bool:
    """Whether a file is text to its end; tells `bad` where it is not."""
    try:
        for _ in plaintext.chunks(path):
            pass
    except ValueError as error:
        bad(str(error))
        return False
    return True


# --- the text of files ----------------------------------------------------------------


def _stories(path: Path, name: str, field: str) -> Iterator[Piece]:
    """Yields what stands between the separator lines of TinyStories."""
    del field
    lines = (plaintext.decoded(path, line) for line in plaintext.lines(path))
    for is_end, story in itertools.groupby(lines, lambda s: s.strip() == STORY_END):
        text = "" if is_end else "".join(story).strip("\n")
        if text:
            yield from _cut(_slices(text), name)


def _cut(chunks: Iterable[str], name: str) -> Iterator[Piece]:
    """Yields one document in pieces of about PIECE_CHARS characters; see CUT.

    Only where four pieces' worth of text has no place like that is it cut anywhere.
    """
    held, start = "", 0
    for chunk in chunks:
        held += chunk
        while len(held) > PIECE_CHARS:
            end = _cut_at(held, PIECE_CHARS)
            if not end:
                if len(held) <= 4 * PIECE_CHARS:
                    break
                end = PIECE_CHARS
            yield Piece(held[:end], name, start, ends=False)
            held, start = held[end:], start + end
    if held:
        yield Piece(held, name, start, ends=True)


def _slices(text: str) -> Iterator[str]:
    """Yields a text as files are read, so that one of any length is cut in its time."""
    return (text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def _cut_at(text: str, limit: int) -> int:
    """Returns the last place before `limit` where text may be cut, else the first."""
    for begin in (max(limit - 4096, 0), 0):
        places = [match.start() for match in CUT.finditer(text, begin, limit)]
        if places:
            return places[-1]
    found = CUT.search(text, limit - 1)
    return found.start() if found else 0


def _dataset(name: str, spec: str, field: str, bad: rows.Bad) -> Corpus:
    """Returns a streamed Hugging Face dataset."""
    path, config, split = rows.dataset_name(spec)

    def read() -> Iterator[Piece]:
        found = rows.dataset(spec, streaming=True, only={field}, bad=bad)
        cure = "name the right one with data.field"
        for text in _texts(found, field, cure, bad):
            yield from _cut(_slices(text), path)

    return Corpus(name, _hash("dataset", path, config, split, field), None, read)


def _weighted(part: str) -> tuple[str, float]:
    """Splits "name*3" into the name and its weight; a bare name weighs 1."""
    match = WEIGHT.fullmatch(part)
    return (match[1], float(match[2])) if match else (part.strip(), 1.0)


def _identity(files: list[tuple[str, Path]], *more: str) -> str:
    parts = [f"{name} {p.stat().st_size} {digest_of(p)}" for name, p in files]
    return _hash(*parts, *more)


def _hash(*parts: str) -> str:
    # A name of a file need not be UTF-8.
    return digest("\n".join(parts).encode("utf-8", "surrogateescape"))


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _short(name: str) -> str:
    """Returns a name that is fit for a folder."""
    name = re.sub(r"\.(txt|md|jsonl)$", "", name.removeprefix("hf:"))
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[-40:] or "text"
