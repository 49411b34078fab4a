"""From a source of text to token shards: split, train the tokenizer, encode, write.

What is prepared lies in a folder that is named after everything it depends on, so a
second call with the same text and settings finds it, and other settings never reuse it.
"""

import contextlib
import functools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax import (
    corpora,
    data,
    downloads,
    files,
    names,
    screen,
    stores,
    tokenizers,
)
from gpt_jax.tokenizers import Tokenizer

FORMAT = 1  # of the prepared folder; part of its name
PARTS = ("train", "val")
TOKENIZER = "tokenizer.json"
LEFT_OUT = "left_out.txt"  # why documents were left out, one a line
SAMPLE_CHARS = 1 << 24  # the most text that a BPE tokenizer is trained on
GROUP_CHARS = 1 << 19  # encoded at once by one worker
SHARD_TOKENS = 1 << 27  # 256 MB of uint16
MAX_WORKERS = 8  # when the number is left open: each encodes on several cores already


@dataclass(frozen=True)
class Prepared:
    """Text made ready for training.

    Attributes:
      folder: holds train/, val/ and tokenizer.json.
      tokenizer: the one that made the ids.
      train: the tokens to learn from; train.index.meta says where they are from.
      val: the tokens kept for validation.
      fingerprint: sha256 over the tokenizer and every id.
    """

    folder: Path
    tokenizer: Tokenizer
    train: data.Tokens
    val: data.Tokens
    fingerprint: str


Leave = Callable[[Path, str], object]  # takes a finished file, and its name


class Part(NamedTuple):
    """A piece of text and which part of the data, 0 (train) or 1 (val), it is in."""

    part: int
    piece: corpora.Piece


def prepare(
    *,
    source: str,
    field: str,
    tokenizer: str,
    folder: str | Path,
    cache: str | Path,
    val_fraction: float,
    split: str,
    workers: int,
    skip_bad_docs: bool,
    progress: bool,
) -> Prepared:
    """Prepares a text, or finds it prepared.

    Args:
      source: see corpora.open.
      field: the field of a row that holds its text.
      tokenizer: char, word, byte, bpe:<size>, gpt2, or the path of a tokenizer.json.
        A BPE tokenizer is trained on the training part only (at most SAMPLE_CHARS,
        taken evenly where the size of the text is known); characters and words are
        collected from the whole text, so that validation can be encoded.
      folder: where prepared texts are kept: here, or an address (gs://bucket/data),
        from which a run then reads what its batches need.
      cache: where downloads are kept.
      val_fraction: the share kept for validation, above 0 and below 1.
      split: "fraction" cuts the text at that share of its characters; "documents"
        keeps every n-th document for validation, in one pass.
      workers: groups of text that are encoded at the same time; 0 = choose.
      skip_bad_docs: leave out documents that cannot be read (a file that is no text,
        cut short or forbidden, a row that is not JSON or has no text) and say how many;
        without it the first one is an error.
      progress: show how far it is.

    Raises:
      ValueError: a setting or the text cannot be used.
      FileNotFoundError: there is no such text or tokenizer.
    """
    check(split=split, val_fraction=val_fraction, workers=workers)
    workers = workers or min(MAX_WORKERS, files.cores())
    show = screen.Show(progress)
    bad: dict[str, None] = {}  # once each, though the text is read several times
    corpus = corpora.open(
        source,
        field=field,
        cache=cache,
        progress=progress,
        bad=bad.setdefault if skip_bad_docs else None,
    )
    ready = ready_tokenizer(tokenizer, cache, progress)
    identity = {
        "format": FORMAT,
        "text": corpus.fingerprint,
        "tokenizer": ready.sha256 if ready else tokenizer,
        "val_fraction": val_fraction,
        "split": split,
    }
    if skip_bad_docs:
        identity["skip_bad_docs"] = True
    target = stores.opened(folder) / files.shortened(f"{corpus.name}-{_key(identity)}")
    if (target / TOKENIZER).exists() if files.is_address(target) else target.exists():
        prepared = load(target)
        show.say(f"using the prepared text {target}: {_counts(prepared)}")
        return prepared
    started = time.monotonic()
    with _draft(target) as (partial, leave), _telling(bad):
        size = _size(corpus, show) if split == "fraction" else None
        parts = functools.partial(SPLITS[split], corpus, val_fraction, size)
        made = ready or _train(tokenizer, corpus, parts, size, val_fraction, show)
        made.save(partial / TOKENIZER)
        meta = {**identity, "source": source, "spec": tokenizer}
        total = size.bytes if size else corpus.size_hint
        _encode(parts(), made, partial, leave, meta, workers, show, total)
        if bad:
            show.say(_left_out(bad))
            (partial / LEFT_OUT).write_text("\n".join(bad) + "\n", "utf-8")
    prepared = load(target)
    seconds = time.monotonic() - started
    show.say(f"prepared {target} in {seconds:.1f} s: {_counts(prepared)}")
    return prepared


@contextlib.contextmanager
def _draft(target: Any) -> Iterator[tuple[Path, Leave]]:
    """Gives a folder to fill that becomes `target`, and who takes its finished files.

    In a store a shard is taken when it is finished, so only one is on this disk, and
    the tokenizer is the last, without which nothing is there.
    """
    if files.is_address(target):
        with stores.draft_folder(target, last=TOKENIZER) as draft:
            yield draft
    else:
        with files.draft_folder(target) as partial:
            yield partial, lambda file, name: None


@contextlib.contextmanager
def _telling(bad: Mapping[str, None]) -> Iterator[None]:
    """Adds to an error what was left out, of which too little text may come."""
    try:
        yield
    except ValueError as error:
        if not bad:
            raise
        raise ValueError(f"{error}; {_left_out(bad)}") from None


def _left_out(bad: Mapping[str, None]) -> str:
    return (
        f"left out {len(bad)} that cannot be read, the first because {next(iter(bad))}"
    )


def check(*, split: str, val_fraction: float, workers: int) -> None:
    """Raises ValueError for settings that no text can be prepared with."""
    names.choose("data.split", split, SPLITS)
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"data.val_fraction is {val_fraction}; it must be above 0 and below 1"
        )
    if workers < 0:
        raise ValueError(f"data.workers is {workers}; it must not be negative")


def load(folder: str | Path) -> Prepared:
    """Opens a folder that `prepare` made, and compares every file with its sha256.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file was changed after it was written.
    """
    place = stores.opened(folder)
    far = files.is_address(place)
    tokenizer = tokenizers.load(
        stores.fetched(place / TOKENIZER) if far else place / TOKENIZER
    )
    train, val = (data.open(place / part) for part in PARTS)
    for part in (train, val):
        if not far:  # all of a corpus, over a network: its sizes were compared
            part.verify()
        if part.index.meta.get("tokenizer_sha256") != tokenizer.sha256:
            raise ValueError(
                f"{place / TOKENIZER} is not what made the ids in "
                f"{part.folder}; delete {place} and prepare it again"
            )
    hashes = (tokenizer.sha256, train.index.fingerprint, val.index.fingerprint)
    digest = files.digest("\n".join(hashes))
    return Prepared(place, tokenizer, train, val, fingerprint=digest)


# --- the split ------------------------------------------------------------------------


class Size(NamedTuple):
    """How much text there is."""

    characters: int
    bytes: int  # in UTF-8


def _split_by_fraction(
    corpus: corpora.Corpus, val_fraction: float, size: Size | None
) -> Iterator[Part]:
    assert size is not None
    cut = int(size.characters * (1 - val_fraction))
    position = 0
    for piece in corpus.pieces():
        before = max(cut - position, 0)
        position += len(piece.text)
        left, right = piece.text[:before], piece.text[before:]
        if left:
            yield Part(0, piece._replace(text=left))
        if right:
            yield Part(1, piece._replace(text=right, start=piece.start + len(left)))


def _split_by_documents(
    corpus: corpora.Corpus, val_fraction: float, size: Size | None
) -> Iterator[Part]:
    del size  # unknown: the text is read once
    document = 0
    for piece in corpus.pieces():
        before = math.floor(document * val_fraction)
        is_val = math.floor((document + 1) * val_fraction) > before
        yield Part(int(is_val), piece)
        document += piece.ends


SPLITS: dict[str, Callable[..., Iterator[Part]]] = {
    "fraction": _split_by_fraction,
    "documents": _split_by_documents,
}


def _size(corpus: corpora.Corpus, show: screen.Show) -> Size:
    characters = size = 0
    with show.bar("counting", corpus.size_hint) as advance:
        for piece in corpus.pieces():
            more = len(piece.text.encode())
            characters, size = characters + len(piece.text), size + more
            advance(more)
    return Size(characters, size)


# --- the tokenizer --------------------------------------------------------------------


def ready_tokenizer(spec: str, cache: str | Path, progress: bool) -> Tokenizer | None:
    """Returns the tokenizer of a spec that needs no training; None for the others.

    Raises:
      FileNotFoundError: it is neither a kind of tokenizer nor the path of one.
    """
    if spec == "gpt2":
        encoder = downloads.fetch("gpt2_encoder", cache, progress)
        return tokenizers.gpt2(encoder, downloads.fetch("gpt2_bpe", cache, progress))
    if spec.partition(":")[0] in ("char", "word", "byte", "bpe"):
        return None
    path = stores.fetched(spec)
    if not path.is_file():
        raise FileNotFoundError(
            f"data.tokenizer {spec!r} is neither char, word, byte, bpe:<size>, gpt2 "
            "nor the path of a tokenizer.json"
        )
    return tokenizers.load(path)


def train_tokenizer(spec: str, texts: Iterable[str], show: screen.Show) -> Tokenizer:
    """Returns a tokenizer trained on texts, and shows for how long; see `tokenizers`.

    Raises:
      ValueError: the spec is none that can be trained, or there is no text.
    """
    show.say(f"training the tokenizer {spec}")
    what = f"training {spec}"
    with screen.counted(what, None, unit=screen.clock, wanted=show.wanted) as tick:
        return tokenizers.train(spec, texts, tick=tick)


def _train(
    spec: str,
    corpus: corpora.Corpus,
    parts: Callable[[], Iterator[Part]],
    size: Size | None,
    val_fraction: float,
    show: screen.Show,
) -> Tokenizer:
    if not spec.startswith("bpe"):
        return train_tokenizer(spec, (piece.text for piece in corpus.pieces()), show)
    total = size.characters if size else corpus.size_hint
    train_chars = total * (1 - val_fraction) if total else SAMPLE_CHARS
    texts = (part.piece.text for part in parts() if part.part == 0)
    sample = _sample(texts, SAMPLE_CHARS / max(train_chars, 1))
    return train_tokenizer(spec, sample, show)


def _sample(texts: Iterable[str], share: float) -> Iterator[str]:
    """Yields about that share of the text, spread evenly, and SAMPLE_CHARS at most."""
    seen = taken = 0
    for text in texts:
        if taken <= seen * share:
            yield text[: SAMPLE_CHARS - taken]
            taken += len(text)
        seen += len(text)
        if taken >= SAMPLE_CHARS:
            return


# --- encoding -------------------------------------------------------------------------


def _encode(
    parts: Iterable[Part],
    tokenizer: Tokenizer,
    folder: Path,
    leave: Leave,
    meta: dict,
    workers: int,
    show: screen.Show,
    total: int | None,
) -> None:
    """Encodes every piece and writes both parts below `folder`, in one pass.

    A shard that is finished goes to `leave`, with its name below the folder.
    """
    chars, documents = [0, 0], 0
    with contextlib.ExitStack() as stack:
        writers = [
            data.Writer(
                folder / name,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                shard_tokens=SHARD_TOKENS,
                leave=lambda file, part=name: leave(file, f"{part}/{file.name}"),
            )
            for name in PARTS
        ]
        for writer in writers:
            stack.callback(writer.close)
        advance = stack.enter_context(show.bar("tokenizing", total))
        for (i, piece), ids in _encoded(parts, tokenizer, workers):
            writers[i].add(data.Piece(ids, piece.ends))
            chars[i] += len(piece.text)
            documents += piece.ends
            advance(len(piece.text.encode()))
        for i, writer in enumerate(writers):
            if not writer.tokens:
                many = "s" * (documents != 1)
                raise ValueError(
                    f"the text is too short: its {sum(chars):,} characters in "
                    f"{documents} document{many} leave nothing for {PARTS[i]}; give "
                    "more text, or change data.val_fraction or data.split"
                )
            writer.finish(
                {
                    **meta,
                    "part": PARTS[i],
                    "characters": chars[i],
                    "tokenizer_sha256": tokenizer.sha256,
                }
            )


def _encoded(
    parts: Iterable[Part], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Part, np.ndarray]]:
    """Yields every piece with its ids, in order; a few groups are in memory at once."""
    encode = functools.partial(_encode_group, tokenizer)
    pool = ThreadPoolExecutor(workers)
    waiting: deque = deque()
    try:
        for group in _groups(parts):
            waiting.append((group, pool.submit(encode, group)))
            while len(waiting) > workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(parts: Iterable[Part]) -> Iterator[list[Part]]:
    group: list[Part] = []
    chars = 0
    for part in parts:
        group.append(part)
        chars += len(part.piece.text)
        if chars >= GROUP_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def _encode_group(tokenizer: Tokenizer, group: list[Part]) -> list[np.ndarray]:
    try:
        ids = tokenizer.encode_batch([part.piece.text for part in group])
    except ValueError:
        for part in group:  # which one was it?
            try:
                tokenizer.encode(part.piece.text)
            except ValueError as error:
                where = f"{part.piece.source}, from character {part.piece.start} on"
                raise ValueError(f"{where}: {error}") from None
        raise
    return [np.asarray(x, np.uint32) for x in ids]


# --- the folder and the screen --------------------------------------------------------


def _counts(prepared: Prepared) -> str:
    return (
        f"{len(prepared.train):,} training and {len(prepared.val):,} validation "
        f"tokens, vocabulary {prepared.tokenizer.vocab_size:,}"
    )


def _key(identity: dict) -> str:
    return files.digest(json.dumps(identity, sort_keys=True))[:12]
