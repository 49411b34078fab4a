"""How much of a text was copied: its longest spans that stand in another text.

The other text may be large (the training data); it is read once, a few million
characters at a time. A first pass with rolling hashes (Karp and Rabin 1987) leaves only
what shares `least` characters with the short texts; on that little rest a suffix array
(Manber and Myers 1990) finds every longest match exactly.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

CHUNK = 1 << 22  # characters hashed at a time
SIEVE_BITS = 22  # of the table that a hash is looked up in first
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64


class Match(NamedTuple):
    """Where one text was copied from the other.

    Attributes:
      text: the text that was looked for.
      length_N: for each of its characters, how many from there on stand together in
        the other text; 0 where they are fewer than `least`.
    """

    text: str
    length_N: np.ndarray

    @property
    def longest(self) -> str:
        """The longest span that was copied, the first of equals."""
        start = int(self.length_N.argmax()) if len(self.length_N) else 0
        return self.text[start : start + int(self.length_N[start : start + 1].sum())]

    def covered(self, least: int) -> int:
        """Returns how many characters lie in copied spans of at least that length."""
        size = len(self.text)
        starts = np.flatnonzero(self.length_N >= least)
        edge = np.zeros(size + 1, np.int64)
        np.add.at(edge, starts, 1)
        np.add.at(edge, starts + self.length_N[starts], -1)
        return int((np.cumsum(edge)[:size] > 0).sum())


def find(texts: Sequence[str], others: Iterable[str], *, least: int) -> list[Match]:
    """Returns where each text was copied from any of the others.

    Args:
      texts: what was written; short (memory grows with it and with what is copied).
      others: whole documents; each is read once.
      least: copies shorter than so many characters are chance and not looked for.

    Raises:
      ValueError: `least` is below 1.
    """
    if least < 1:
        raise ValueError(f"the least length of a copy is {least}: it must be above 0")
    written = [_codes(text) for text in texts]
    grams = [_hashes(codes, least) for codes in written]
    wanted = np.unique(np.concatenate([np.empty(0, np.uint64), *grams]))
    shared = {span for other in others for span in _shared(other, wanted, least)}
    lengths = _longest([_codes(span) for span in sorted(shared)], written)
    return [
        Match(text, np.where(length_N >= least, length_N, 0))
        for text, length_N in zip(texts, lengths, strict=True)
    ]


def summary(matches: Sequence[Match], thresholds: Sequence[int]) -> dict:
    """Returns the longest span over all texts and the shares that were copied.

    Returns:
      texts, characters; longest (characters), its text; median_longest over the texts;
      copied: for each threshold, the share of characters in copied spans so long.
    """
    characters = sum(len(match.text) for match in matches)
    longest = max((match.longest for match in matches), key=len, default="")
    sizes = [len(match.longest) for match in matches]
    return {
        "texts": len(matches),
        "characters": characters,
        "longest": len(longest),
        "longest_text": longest,
        "median_longest": float(np.median(sizes)) if sizes else 0.0,
        "copied": {
            least: sum(match.covered(least) for match in matches) / max(characters, 1)
            for least in thresholds
        },
    }


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _hashes(code_N: np.ndarray, size: int) -> np.ndarray:
    """Returns a hash of every `size` characters in a row, modulo 2^64."""
    count = len(code_N) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    # Horner by doubling: the hash of 2 n characters is that of n and that of the next.
    hash_N, power, done = code_N.astype(np.uint64), BASE, 1
    whole, filled = None, 0
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        while True:
            if size & done:
                part = hash_N[filled:][:count]
                whole = part if whole is None else whole[:count] * power + part
                filled += done
            if filled == size:
                break
            hash_N = hash_N[:-done] * power + hash_N[done:]
            power, done = power * power, 2 * done
    assert whole is not None
    return whole * BASE  # the sieve reads high bits, which this mixes


def _shared(other: str, wanted: np.ndarray, size: int) -> Iterator[str]:
    """Yields the stretches of a text all of whose `size` characters are wanted."""
    sieve = np.zeros(1 << SIEVE_BITS, bool)
    sieve[wanted >> np.uint64(64 - SIEVE_BITS)] = True
    begun = -1  # where an unfinished stretch began
    for first in range(0, len(other) - size + 1, CHUNK):
        last = min(first + CHUNK, len(other) - size + 1)
        hash_N = _hashes(_codes(other[first : last + size - 1]), size)
        near = np.flatnonzero(sieve[hash_N >> np.uint64(64 - SIEVE_BITS)])
        hit = first + near[np.isin(hash_N[near], wanted)]
        if begun >= 0 and (not len(hit) or hit[0] != first):
            yield other[begun : first + size - 1]
            begun = -1
        breaks = np.flatnonzero(np.diff(hit) != 1)
        starts = np.concatenate([hit[:1], hit[breaks + 1]])
        ends = np.concatenate([hit[breaks], hit[-1:]]) + 1
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            start, begun = (begun, -1) if begun >= 0 else (start, -1)
            if end == last:
                begun = start
            else:
                yield other[start : end + size - 1]
    if begun >= 0:
        yield other[begun:]


def _longest(parts: list[np.ndarray], texts: list[np.ndarray]) -> list[np.ndarray]:
    """Returns, for every place of every text, its longest match in any of the parts.

    All are joined with a separator of its own between each two. In a sorted list of
    all suffixes the best partner of a suffix is the nearest one, above or below, that
    begins in a part.
    """
    pieces = [*parts, *texts]
    separators = np.arange(len(pieces), dtype=np.int64)
    joined = [np.append(piece + len(pieces), i) for piece, i in zip(pieces, separators)]
    code_N = np.concatenate([np.empty(0, np.int64), *joined])
    bounds = np.cumsum([0, *map(len, joined)])
    border = int(bounds[len(parts)])
    names = _names(code_N, max(map(len, texts), default=0))
    order = np.argsort(names[-1], kind="stable")
    in_part = order < border
    place = np.arange(len(order))
    above = np.maximum.accumulate(np.where(in_part, place, -1))
    below = np.minimum.accumulate(np.where(in_part, place, len(order))[::-1])[::-1]
    best = np.zeros(len(code_N), np.int64)
    for partner in (above, below):
        ok = ~in_part & (partner >= 0) & (partner < len(order))
        mine, other = order[ok], order[partner[ok]]
        best[mine] = np.maximum(best[mine], _common(names, mine, other))
    starts = bounds[len(parts) : -1]
    return [best[s : s + len(text)] for s, text in zip(starts, texts, strict=True)]


def _names(code_N: np.ndarray, longest: int) -> list[np.ndarray]:
    """Returns ranks of the stretches of 1, 2, 4, ... characters at each place.

    Equal stretches have equal ranks, and ranks order like the stretches. The last ranks
    are of stretches longer than any match (prefix doubling: Manber and Myers 1990).
    """
    names = [np.unique(code_N, return_inverse=True)[1].astype(np.int64)]
    size = 1
    while size <= longest and len(code_N):
        rank = names[-1]
        beyond = np.append(rank[size:] + 1, np.zeros(min(size, len(rank)), np.int64))
        pair = rank * (len(rank) + 1) + beyond[: len(rank)]
        names.append(np.unique(pair, return_inverse=True)[1].astype(np.int64))
        size *= 2
    return names


def _common(names: list[np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns how many characters the suffixes at places a and b begin with alike."""
    length = np.zeros(len(a), np.int64)
    for level in range(len(names) - 1, -1, -1):
        rank = names[level]
        i, j = a + length, b + length
        inside = (i < len(rank)) & (j < len(rank))
        same = np.zeros(len(a), bool)
        same[inside] = rank[i[inside]] == rank[j[inside]]
        length += same * (1 << level)
    return length
