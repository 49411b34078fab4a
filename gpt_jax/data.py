"""Token shards on disk, windows over them, and batches in a seekable random order.

A folder of tokens holds flat files of unsigned integers (`shard-00000.bin`, ...), the
ends of its documents (`documents.npy`) and `index.json`, which describes the rest.
Nothing here knows JAX: batches are numpy arrays.
"""

import array
import bisect
import functools
import hashlib
import json
import math
import os
import queue
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

Batch = dict[str, np.ndarray]

FORMAT = 1  # of index.json and of the files that it names
FLUSH_TOKENS = 1 << 20  # written at once
PREFETCH = 8  # batches made ahead of the one in use
DIGESTED = 64  # examples hashed at once
SHUFFLE_ROUNDS = 4  # of grain's index shuffle: its own choice
JOIN_SECONDS = 1.0  # the longest wait for the thread that makes batches to end


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
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Examples(Protocol):
    """What batches are made of: a random-access sequence of dicts of arrays.

    An optional `take(indices)` returns many examples stacked, faster than one by one;
    an optional `where(index)` says in words where an example is stored.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, np.ndarray]: ...


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
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        vocab_size: int,
        eos_id: int | None,
        shard_tokens: int,
    ):
        self.folder = Path(folder)
        if self.folder.exists():
            raise ValueError(
                f"{folder} exists already; delete it or choose another folder"
            )
        self.partial = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
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
            documents_sha256=_sha256(self.partial / "documents.npy"),
            meta=meta,
        )
        text = json.dumps({"format": FORMAT, **asdict(index)}, indent=1)
        (self.partial / "index.json").write_text(text + "\n")
        os.replace(self.partial, self.folder)
        return index

    def close(self) -> None:
        """Removes what is not finished."""
        if self.file is not None:
            self.file.close()
        shutil.rmtree(self.partial, ignore_errors=True)

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
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.done.append(Shard(self.name, self.in_file, self.hash.hexdigest()))
        self.file, self.hash, self.in_file = None, hashlib.sha256(), 0


# --- reading --------------------------------------------------------------------------


class Tokens:
    """A read-only sequence of token ids over memory-mapped shards."""

    def __init__(self, folder: Path, index: Index):
        self.folder, self.index = folder, index
        dtype = np.dtype(index.dtype).newbyteorder("<")
        self.starts = [0]
        self.maps, self.paths = [], []
        for shard in index.shards:
            self.starts.append(self.starts[-1] + shard.tokens)
            self.paths.append(str(folder / shard.name))
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
            self._refuse_cut(i)
        begin = self.starts[first]
        pieces = [self.maps[first][start - begin : max(stop - begin, 0)]]
        for i in range(first + 1, len(self.maps)):
            if self.starts[i] >= stop:
                break
            pieces.append(self.maps[i][: stop - self.starts[i]])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def documents(self) -> np.ndarray:
        """Returns int64 [documents]: the position behind each document's last id."""
        return np.load(self.folder / "documents.npy", mmap_mode="r")

    def where(self, position: int) -> str:
        """Returns the path of the shard that holds a position."""
        return str(self.folder / self.index.shards[self._shard_of(position)].name)

    def check(self, ids: np.ndarray) -> None:
        """Raises a ValueError that names the damaged shard if ids from here are bad."""
        if ids.max() >= self.index.vocab_size:
            for i, ids_of_shard in enumerate(self.maps):
                if ids_of_shard.max() >= self.index.vocab_size:
                    raise self._bad_id(i)

    def verify(self) -> None:
        """Reads every file and compares it with its sha256 in the index.

        Raises:
          ValueError: names the first file that was changed since it was written, and
            where it holds an id outside the vocabulary.
        """
        files = [(shard.name, shard.sha256) for shard in self.index.shards]
        for i, (name, digest) in enumerate(
            [*files, ("documents.npy", self.index.documents_sha256)]
        ):
            if _sha256(self.folder / name) == digest:
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
        ids = self.maps[i]
        at = int((ids >= self.index.vocab_size).argmax())
        return ValueError(
            f"{self.folder / self.index.shards[i].name} is damaged: at byte "
            f"{at * ids.dtype.itemsize} it holds the id {ids[at]}, but the vocabulary "
            f"has {self.index.vocab_size}; delete {self.folder} and prepare it again"
        )


def open(folder: str | Path) -> Tokens:
    """Opens a folder that `write` made.

    Raises:
      FileNotFoundError: the folder, its index or one of its shards is missing.
      ValueError: the index is not one of ours, or a file has the wrong size.
    """
    folder = Path(folder)
    path = folder / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no tokens: {path} is missing")
    try:
        fields = json.loads(path.read_text())
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


class Windows:
    """Every window of a text as an example; random access.

    Window i reads seq_len + 1 ids from i * stride on: `tokens` int32 [T] are all but
    the last, `targets` int32 [T] all but the first, `mask` float32 [T] is 1.

    Args:
      tokens: Tokens, or an array of ids.
      seq_len: T, the tokens of a window.
      stride: tokens between the starts of two windows.
      tail: adds a last window of what is left, padded with 0 where mask is 0; with
        stride = seq_len every token but the first is then a target exactly once.

    Raises:
      ValueError: there is not enough text for one window.
    """

    def __init__(
        self, tokens: Tokens | np.ndarray, *, seq_len: int, stride: int, tail: bool
    ):
        if seq_len < 1 or stride < 1:
            raise ValueError(
                f"seq_len is {seq_len} and stride is {stride}: both must be at least 1"
            )
        needed = 2 if tail else seq_len + 1
        if len(tokens) < needed:
            raise ValueError(
                f"the text has {len(tokens):,} tokens but a window of seq_len "
                f"{seq_len} needs {needed:,}; give more text or lower data.seq_len"
            )
        self.tokens, self.seq_len, self.stride = tokens, seq_len, stride
        # Window i has a target as long as its second token is there.
        last = len(tokens) - (2 if tail else seq_len + 1)
        self.count = last // stride + 1
        if tail and stride < seq_len:
            # The first window that reaches the end is the last one needed.
            full = max(len(tokens) - seq_len - 1, 0)
            self.count = min(self.count, -(-full // stride) + 1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        if not -self.count <= index < self.count:
            raise IndexError(f"window {index} of {self.count}")
        return {key: x[0] for key, x in self.take([index % self.count]).items()}

    def take(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Returns the windows of `indices`, stacked: arrays [len(indices), T].

        Raises:
          ValueError: an id is outside the vocabulary, because a shard was changed.
        """
        ids_BT1 = np.zeros((len(indices), self.seq_len + 1), np.int32)
        mask_BT = np.ones((len(indices), self.seq_len), np.float32)
        length = self.seq_len + 1
        for row, index in enumerate(indices):
            start = int(index) * self.stride
            piece = self.tokens[start : start + length]
            if len(piece) == length:
                ids_BT1[row] = piece
            else:
                ids_BT1[row, : len(piece)] = piece
                mask_BT[row, len(piece) - 1 :] = 0.0
        if isinstance(self.tokens, Tokens):
            self.tokens.check(ids_BT1)
        return {
            "tokens": np.ascontiguousarray(ids_BT1[:, :-1]),
            "targets": np.ascontiguousarray(ids_BT1[:, 1:]),
            "mask": mask_BT,
        }

    def where(self, index: int) -> str:
        """Returns where window `index` is stored."""
        where = getattr(self.tokens, "where", None)
        return where(index * self.stride) if where else "an array"


# --- batches --------------------------------------------------------------------------


def batches(
    examples: Examples,
    *,
    batch_size: int,
    accumulate: int,
    seed: int,
    start: int,
    rows: Sequence[int],
    timeout_s: float,
) -> "Batches":
    """Returns an endless iterator over shuffled batches, made ahead in a thread.

    Every epoch is a new permutation of the examples and epochs follow each other
    without a gap. Batch n depends on (seed, n) alone: `start=n` begins with it at once,
    and the processes of a run, each with its own rows, together see what a single one
    would.

    Args:
      examples: see Examples.
      batch_size: examples in a batch, over all micro-batches and processes.
      accumulate: A, the micro-batches of a batch; B is batch_size / A.
      seed: of the order.
      start: the number of the first batch.
      rows: which examples of each micro-batch this process takes, from 0 to B.
      timeout_s: seconds after which a batch that has not come is an error.

    Returns:
      An iterator over dicts of arrays [A, len(rows), ...], with `close()`.

    Raises:
      ValueError: the numbers do not divide, or there are no examples.
    """
    if batch_size < 1 or batch_size % accumulate:
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of accumulate {accumulate}"
        )
    if not 1 <= len(examples) <= 1 << 32:
        raise ValueError(
            f"there are {len(examples):,} examples and from 1 to 2^32 can be shuffled; "
            "give more text, or with too many windows a larger data.stride"
        )
    micro_batch = batch_size // accumulate
    if start < 0 or not all(0 <= row < micro_batch for row in rows):
        raise ValueError(
            f"start {start} must not be negative and the rows {list(rows)} must be "
            f"below {micro_batch}"
        )
    order = _order(len(examples), seed)
    taken = [a * micro_batch + row for a in range(accumulate) for row in rows]

    def indices(n: int) -> list[int]:
        return order(n * batch_size + row for row in taken)

    def load(n: int) -> Batch:
        stacked = _take(examples, indices(n))
        return {key: _fold(x, accumulate) for key, x in stacked.items()}

    def where(n: int) -> str:
        find = getattr(examples, "where", None)
        return ", ".join(sorted({find(i) for i in indices(n)})) if find else "memory"

    return Batches(
        load, start=start, where=where, prefetch=PREFETCH, timeout_s=timeout_s
    )


def members(count: int, batch_size: int, seed: int, n: int) -> list[int]:
    """Returns which of `count` examples batch n holds, over all processes, in order."""
    return _order(count, seed)(range(n * batch_size, (n + 1) * batch_size))


def once(examples: Examples, *, batch_size: int, at_most: int = 0) -> Iterator[Batch]:
    """Yields every example exactly once and in order, as arrays [1, B, ...].

    A short last batch is filled up with zeros, so the filling has mask 0.

    Args:
      examples: what to go through.
      batch_size: B.
      at_most: so many examples only, evenly spaced over all of them; 0 = all.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    indices = np.arange(len(examples))
    if 0 < at_most < len(examples):
        indices = indices[:: math.ceil(len(examples) / at_most)]
    for first in range(0, len(indices), batch_size):
        chosen = indices[first : first + batch_size]
        stacked = _take(examples, chosen.tolist())
        if len(chosen) < batch_size:
            stacked = {key: _fill(x, batch_size) for key, x in stacked.items()}
        yield {key: x[None] for key, x in stacked.items()}


def digest(examples: Examples, *, at_most: int = 0) -> str:
    """Returns the sha256 of the examples that `once` goes through."""
    total = hashlib.sha256()
    for batch in once(examples, batch_size=DIGESTED, at_most=at_most):
        for name, x in sorted(batch.items()):
            total.update(f"{name} {x.dtype} {x.shape}\n".encode())
            total.update(np.ascontiguousarray(x).tobytes())
    return total.hexdigest()


class Batches:
    """Batches n, n + 1, ... made by one thread ahead of their use.

    The thread ends with `close()`, when nobody holds the iterator any more, and with
    the process. An error in it is raised to whoever asks for the batch.
    """

    def __init__(
        self,
        load: Callable[[int], Batch],
        *,
        start: int,
        where: Callable[[int], str],
        prefetch: int,
        timeout_s: float,
    ):
        self.next, self.where, self.timeout_s = start, where, timeout_s
        self.ready: queue.Queue = queue.Queue(maxsize=prefetch)
        self.stop = threading.Event()
        thread = threading.Thread(
            target=_fill_queue,  # a function: the thread must not hold this object
            args=(load, start, self.ready, self.stop),
            name="gpt_jax-batches",
            daemon=True,  # a source that stalls must not keep the process alive
        )
        thread.start()
        self.close = weakref.finalize(self, _end, thread, self.stop, self.ready)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.stop.is_set():
            raise StopIteration
        try:
            batch = self.ready.get(timeout=self.timeout_s)
        except queue.Empty:
            self.close()
            raise TimeoutError(
                f"batch {self.next} did not arrive within data_timeout_s = "
                f"{self.timeout_s:g} s: reading {self.where(self.next)} hangs"
            ) from None
        if isinstance(batch, Exception):
            self.close()
            raise batch
        self.next += 1
        return batch


def _fill_queue(load, n: int, ready: queue.Queue, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            ready.put(load(n))
        except Exception as error:  # the edge of the thread: raised by the consumer
            error.add_note(f"while batch {n} was made")
            ready.put(error)
            return
        n += 1


def _end(thread: threading.Thread, stop: threading.Event, ready: queue.Queue) -> None:
    stop.set()
    while True:  # makes room for the one batch that the thread may be holding
        try:
            ready.get_nowait()
        except queue.Empty:
            break
    # Grain's C++ aborts a process that ends while a thread is inside it. A thread that
    # hangs elsewhere is left behind; and this may be running in that very thread.
    if thread is not threading.current_thread():
        thread.join(timeout=JOIN_SECONDS)


def _order(length: int, seed: int) -> Callable[[Iterable[int]], list[int]]:
    """Returns the map from positions in the endless shuffled order to examples."""
    # Imported here because it is slow and writing tokens does not need it. MapDataset's
    # own shuffle gives such orders too, but takes ten times as long for an example.
    from grain.experimental import index_shuffle

    @functools.lru_cache(maxsize=4)
    def epoch_seed(epoch: int) -> int:
        # Mixed, so that epoch 1 of seed 1 is not epoch 0 of seed 2.
        return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])

    def example(position: int) -> int:
        epoch, index = divmod(position, length)
        return index_shuffle(
            index, max_index=length - 1, seed=epoch_seed(epoch), rounds=SHUFFLE_ROUNDS
        )

    return lambda positions: [example(position) for position in positions]


def _take(examples: Examples, indices: Sequence[int]) -> Batch:
    take = getattr(examples, "take", None)
    if take:
        return take(indices)
    rows = [examples[index] for index in indices]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _fold(x: np.ndarray, accumulate: int) -> np.ndarray:
    return x.reshape(accumulate, len(x) // accumulate, *x.shape[1:])


def _fill(x: np.ndarray, size: int) -> np.ndarray:
    full = np.zeros((size, *x.shape[1:]), x.dtype)
    full[: len(x)] = x
    return full


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
