"""Windows over tokens, and batches in a seekable random order; shards.py stores tokens.

Nothing here knows JAX: batches are numpy arrays.
"""

import functools
import hashlib
import math
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from gpt_jax.data.shards import Index, Piece, Shard, Tokens, Writer, open, write

__all__ = ["Batch", "Batches", "Examples", "Index", "Piece", "Shard", "Tokens"]
__all__ += ["Windows", "Writer", "batches", "members", "once", "open", "write"]

Batch = dict[str, np.ndarray]

PREFETCH = 8  # batches made ahead of the one in use
DIGESTED = 64  # examples hashed at once
SHUFFLE_ROUNDS = 4  # of grain's index shuffle: its own choice
JOIN_SECONDS = 1.0  # the longest wait for the thread that makes batches to end


class Examples(Protocol):
    """What batches are made of: a random-access sequence of dicts of arrays.

    An optional `take(indices)` returns many examples stacked, faster than one by one;
    an optional `where(index)` says in words where an example is stored.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, np.ndarray]: ...


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
            has = f"has {len(tokens):,} token{'s' * (len(tokens) != 1)}"
            raise ValueError(
                f"the text to validate with {has}, of which the second is the first "
                "that can be predicted: raise data.val_fraction, or give more text"
                if tail
                else f"the text to learn from {has} but a window of seq_len {seq_len} "
                f"needs {needed:,}; give more text, lower data.seq_len (0 = "
                "model.context_length), or lower data.val_fraction"
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

        starts = [int(index) * self.stride for index in indices]
        parts = [slice(start, start + length) for start in starts]
        if isinstance(self.tokens, Tokens):
            pieces = self.tokens.several(parts)
        else:
            pieces = [self.tokens[part] for part in parts]
        for row, piece in enumerate(pieces):
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
