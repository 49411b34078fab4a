"""Token shards on disk: written piece by piece, checked, read as one sequence.

A folder of tokens holds flat files of unsigned integers (`shard-00000.bin`, ...), the
ends of its documents (`documents.npy`) and `index.json`, which describes the rest.
"""

import array
import bisect
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax import files, stores

FORMAT = 1  # of index.json and of the files that it names
FLUSH_TOKENS = 1 << 20  # written at once
AT_ONCE = 16  # parts that are read from a store together


class Piece(NamedTuple):
    """The ids of a document, or of a part of one; `ends` is true for its last part."""

    ids: np.ndarray
    ends: bool


@dataclass(frozen=True)
class Shard:
    """One flat file of tokens."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What a folder of tokens holds; the contents of its index.json.

    Attributes:
      tokens: how many there are, those between documents included.
      documents: how many there are; empty ones are not counted and not stored.
      dtype: of the shards, uint16 or uint32.
      vocab_size: every id is below it.
      eos_id: the id between two documents; None = they follow each other directly.
      shards: the files in order.
      documents_sha256: of documents.npy, int64 [documents]: where each ends.
      meta: what the writer wants to remember.
    """

    tokens: int
    documents: int
    dtype: str
    vocab_size: int
    eos_id: int | None
    shards: tuple[Shard, ...]
    documents_sha256: str
    meta: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 of the contents: equal for equal tokens, whatever made them."""
        parts = [self.dtype, self.documents_sha256, *(s.sha256 for s in self.shards)]
        return files.digest("\n".join(parts))


# --- writing --------------------------------------------------------------------------


def write(
    documents: Iterable[np.ndarray | Piece],
    folder: str | Path,
    *,
    vocab_size: int,
    eos_id: int | None,
    meta: dict[str, Any],
    shard_tokens: int,
) -> Index:
    """Writes documents as token shards; the folder appears when all is written.

    Args:
      documents: the ids of each document, or Pieces of long ones.
      folder: must not exist yet.
      vocab_size: ids at or above it are refused; above 65,536 the shards are uint32.
      eos_id: written between two documents; None writes nothing there.
      meta: goes into index.json as it is.
      shard_tokens: the most tokens in one file.

    Raises:
      ValueError: the folder exists, an id is outside the vocabulary, or there is not
        one token.
    """
    writer = Writer(
        folder, vocab_size=vocab_size, eos_id=eos_id, shard_tokens=shard_tokens
    )
    try:
        for item in documents:
            writer.add(item if isinstance(item, Piece) else Piece(item, ends=True))
        return writer.finish(meta)
    finally:
        writer.close()


class Writer:
    """Writes what `write` writes, piece by piece, and gives up at `close`.

    See `write` for the arguments and errors. Only `finish` makes the folder appear.
    `leave` is given each shard that is finished, and may take it away.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vocab_size: int,
        eos_id: int | None,
        shard_tokens: int,
        leave: Callable[[Path], object] = lambda file: None,
    ):
        self.folder, self.leave = Path(folder), leave
        if self.folder.exists():
            raise ValueError(
                f"{folder} exists already; delete it or choose another folder"
            )
        self.partial = files.begin_folder(self.folder)
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.tokens = 0
        self.ends = array.array("q")
        self.inside = False  # a document has begun and not ended
        self.held: list[np.ndarray] = []
        self.held_tokens = 0
        self.done: list[Shard] = []
        self.file, self.hash, self.in_file = None, hashlib.sha256(), 0

    def add(self, piece: Piece) -> None:
        """Appends a document or a part of one; an empty document leaves no trace."""
        if len(piece.ids):
            if not self.inside and self.ends and self.eos_id is not None:
                self._append(np.array([self.eos_id]))
            self._append(np.asarray(piece.ids))
            self.inside = True
        if piece.ends and self.inside:
            self.ends.append(self.tokens)
            self.inside = False

    def finish(self, meta: dict[str, Any]) -> Index:
        """Writes what is held and the index, and gives the folder its name."""
        self.add(Piece(np.empty(0, self.dtype), ends=True))
        if not self.ends:
            raise ValueError("there is no text to write: every document is empty")
        self._flush()
        self._finish_shard()
        np.save(self.partial / "documents.npy", np.array(self.ends, np.int64))
        index = Index(
            tokens=self.tokens,
            documents=len(self.ends),
            dtype=self.dtype.name,
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
            shards=tuple(self.done),
            documents_sha256=files.digest_of(self.partial / "documents.npy"),
            meta=meta,
        )
        text = json.dumps({"format": FORMAT, **asdict(index)}, indent=1)
        (self.partial / "index.json").write_text(text + "\n", encoding="utf-8")
        files.finish_folder(self.partial, self.folder)
        return index

    def close(self) -> None:
        """Removes what is not finished."""
        if self.file is not None:
            self.file.close()
        files.drop_folder(self.partial)

    def _append(self, ids: np.ndarray) -> None:
        low, high = ids.min(), ids.max()
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"document {len(self.ends)} holds the id {low if low < 0 else high}, "
                f"which is not in the vocabulary of {self.vocab_size} tokens; was it "
                "encoded by another tokenizer?"
            )
        self.held.append(ids.astype(self.dtype))
        self.held_tokens += len(ids)
        self.tokens += len(ids)
        if self.held_tokens >= FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        ids = np.concatenate(self.held) if self.held else np.empty(0, self.dtype)
        self.held, self.held_tokens = [], 0
        while len(ids):
            if self.file is None:
                self.file = (self.partial / self.name).open("wb")
            now, ids = np.split(ids, [self.shard_tokens - self.in_file])
            stored = now.astype(self.dtype.newbyteorder("<")).tobytes()
            self.file.write(stored)
            self.hash.update(stored)
            self.in_file += len(now)
            if self.in_file == self.shard_tokens:
                self._finish_shard()

    @property
    def name(self) -> str:
        return f"shard-{len(self.done):05}.bin"

    def _finish_shard(self) -> None:
        if self.file is None:
            return
        self.file.close()
        self.leave(self.partial / self.name)
        self.done.append(Shard(self.name, self.in_file, self.hash.hexdigest()))
        self.file, self.hash, self.in_file = None, hashlib.sha256(), 0


# --- reading --------------------------------------------------------------------------


class Far:
    """The ids of a shard in a store: a slice of it is what is read."""

    def __init__(self, address: str, dtype: np.dtype):
        self.blob, self.dtype = stores.Blob(address), dtype
        self.nbytes = self.blob.size

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.nbytes // self.dtype.itemsize)
        if stop <= start:
            return np.empty(0, self.dtype)
        ends = (start * self.dtype.itemsize, stop * self.dtype.itemsize)
        return np.frombuffer(self.blob.read(*ends), self.dtype)


class Tokens:
    """A read-only sequence of token ids over shards, memory-mapped or in a store.

    Attributes:
      far: they are in a store: reading takes its time, and several at once no longer.
    """

    def __init__(self, folder: Any, index: Index):
        self.folder, self.index = folder, index
        self.far = files.is_address(folder)
        dtype = np.dtype(index.dtype).newbyteorder("<")
        self.starts = [0]
        self.maps, self.paths = [], []
        for shard in index.shards:
            self.starts.append(self.starts[-1] + shard.tokens)
            self.paths.append(str(folder / shard.name))
            if self.far:
                self.maps.append(Far(self.paths[-1], dtype))
                continue
            # A plain view: slices of np.memmap itself are several times slower.
            self.maps.append(np.asarray(np.memmap(self.paths[-1], dtype, mode="r")))

    def __len__(self) -> int:
        return self.index.tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """Returns the ids of a slice with step 1, as they are stored.

        Raises:
          ValueError: a shard became shorter since it was opened; reading its map where
            it no longer reaches would end the process without a word (SIGBUS).
        """
        start, stop, step = part.indices(len(self))
        assert step == 1, "tokens are read forwards, one after the other"
        first = self._shard_of(start)
        for i in range(first, self._shard_of(max(stop - 1, start)) + 1):
            if not self.far:
                self._refuse_cut(i)
        begin = self.starts[first]
        pieces = [self.maps[first][start - begin : max(stop - begin, 0)]]
        for i in range(first + 1, len(self.maps)):
            if self.starts[i] >= stop:
                break
            pieces.append(self.maps[i][: stop - self.starts[i]])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def several(self, parts: Sequence[slice]) -> list[np.ndarray]:
        """Returns the ids of several slices; from a store they come together."""
        if not self.far:
            return [self[part] for part in parts]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self.__getitem__, parts))

    def documents(self) -> np.ndarray:
        """Returns int64 [documents]: the position behind each document's last id."""
        path = self.folder / "documents.npy"
        if self.far:
            return np.load(io.BytesIO(path.read_bytes()))
        return np.load(path, mmap_mode="r")

    def where(self, position: int) -> str:
        """Returns the path of the shard that holds a position."""
        return str(self.folder / self.index.shards[self._shard_of(position)].name)

    def check(self, ids: np.ndarray) -> None:
        """Raises a ValueError that names the damaged shard if ids from here are bad."""
        if ids.max() >= self.index.vocab_size:
            for i, ids_of_shard in enumerate(self.maps):
                if ids_of_shard[:].max() >= self.index.vocab_size:
                    raise self._bad_id(i)

    def verify(self) -> None:
        """Reads every file and compares it with its sha256 in the index.

        Raises:
          ValueError: names the first file that was changed since it was written, and
            where it holds an id outside the vocabulary.
        """
        named = [(shard.name, shard.sha256) for shard in self.index.shards]
        for i, (name, digest) in enumerate(
            [*named, ("documents.npy", self.index.documents_sha256)]
        ):
            if files.digest_of(self.folder / name) == digest:
                continue
            if i < len(self.maps) and self.maps[i].max() >= self.index.vocab_size:
                raise self._bad_id(i)
            raise ValueError(
                f"{self.folder / name} was changed after it was written (its sha256 "
                f"differs from index.json); delete {self.folder} and prepare it again"
            )

    def _shard_of(self, position: int) -> int:
        found = bisect.bisect_right(self.starts, position) - 1
        return min(max(found, 0), len(self.maps) - 1)

    def _refuse_cut(self, i: int) -> None:
        try:
            size = os.stat(self.paths[i]).st_size
        except FileNotFoundError:
            return  # its map stays whole, so the run can go on
        if size < self.maps[i].nbytes:
            raise ValueError(
                f"{self.paths[i]} was cut to {size:,} of {self.maps[i].nbytes:,} bytes "
                f"while it was read; delete {self.folder} and prepare it again"
            )

    def _bad_id(self, i: int) -> ValueError:
        ids = self.maps[i][:]
        at = int((ids >= self.index.vocab_size).argmax())
        return ValueError(
            f"{self.folder / self.index.shards[i].name} is damaged: at byte "
            f"{at * ids.dtype.itemsize} it holds the id {ids[at]}, but the vocabulary "
            f"has {self.index.vocab_size}; delete {self.folder} and prepare it again"
        )


def open(folder: Any) -> Tokens:
    """Opens a folder that `write` made: a path, or a path of a store.

    Raises:
      FileNotFoundError: the folder, its index or one of its shards is missing.
      ValueError: the index is not one of ours, or a file has the wrong size.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no tokens: {path} is missing")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        found = fields.pop("format")
        shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
        index = Index(shards=shards, **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete {folder} and prepare it again"
        ) from None
    if found != FORMAT or index.dtype not in ("uint16", "uint32"):
        raise ValueError(
            f"{path} has format {found} and dtype {index.dtype}; this version reads "
            f"format {FORMAT} with uint16 or uint32: delete {folder} and prepare again"
        )
    if index.tokens != sum(shard.tokens for shard in shards) or not shards:
        raise ValueError(
            f"{path}: the counts of its shards do not add up to its tokens"
        )
    for shard in shards:
        # A name from a stranger must not lead out of the folder.
        if Path(str(shard.name)).name != shard.name:
            raise ValueError(f"{path} names {shard.name!r}, which is not beside it")
        file, size = folder / shard.name, shard.tokens * np.dtype(index.dtype).itemsize
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing, though {path} lists it; prepare the text again"
            )
        if file.stat().st_size != size:
            raise ValueError(
                f"{file} has {file.stat().st_size:,} bytes where {path} says {size:,}; "
                f"it is damaged: delete {folder} and prepare it again"
            )
    if not (folder / "documents.npy").is_file():
        raise FileNotFoundError(f"{folder / 'documents.npy'} is missing")
    return Tokens(folder, index)
