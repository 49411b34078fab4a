"""From the text of a conversation to ids: what a person wrote stays plain text."""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any


def names_of(tokenizer) -> list[str]:
    """Returns the special tokens, the longest first."""
    return sorted((n for n in tokenizer.specials if len(n) > 1), key=len, reverse=True)


def unused(text: str) -> str:
    """Returns a character for private use that a text does not hold."""
    held = set(text)
    free = (c for c in map(chr, range(0xE000, 0xF900)) if c not in held)
    if not (found := next(free, "")):
        raise ValueError(
            "the messages hold every character for private use, U+E000 to U+F8FF; one "
            "must be free to mark what is no special token: leave one out"
        )
    return found


def texts(value: Any) -> Iterator[str]:
    """Yields every text within lists, tuples and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts(one)


def broken(value: Any, tokenizer, guard: str) -> Any:
    """Returns the same with the names of special tokens in texts broken by `guard`."""
    if isinstance(value, Mapping):
        pairs = value.items()
        return {
            broken(key, tokenizer, guard): broken(one, tokenizer, guard)
            for key, one in pairs
        }
    if isinstance(value, list | tuple):
        found = [broken(one, tokenizer, guard) for one in value]
        named = hasattr(value, "_fields")  # a NamedTuple
        return type(value)(*found) if named else type(value)(found)
    if isinstance(value, str):
        for name in names_of(tokenizer):
            value = value.replace(name, name[0] + guard + name[1:])
    return value


def encode_whole(text: str, spans, opening: list[int], tokenizer, guard: str):
    """Returns the ids of a text and the weight of each, by where they lie in it.

    The text is encoded as one: what stands on both sides of the beginning of an answer
    may be one token, and what follows a special token does not begin a text.
    """
    pieces = _pattern(tokenizer).split(text)
    marks = [*opening, *(tokenizer.specials[p.strip()] for p in pieces[1::2])]
    joint = tokenizer.JOINT
    joined, places, at = joint * len(opening), [], 0
    for number, piece in enumerate(pieces):
        plain = joint if number % 2 else piece.replace(guard, "")
        for edge in sorted({edge for span in spans for edge in span[:2]}):
            if at <= edge < at + len(piece) or (
                edge == at and number == len(pieces) - 1
            ):
                before = piece[: edge - at].replace(guard, "")
                # An answer that ends within a special token's own space has that too.
                inside = (len(joint) if edge > at else 0) if number % 2 else len(before)
                places.append((edge, len(joined) + inside))
        joined, at = joined + plain, at + len(piece)
    moved = dict(places) | {len(text): len(joined)}
    found, offsets = tokenizer.encode_joined(joined)
    named = iter(marks)
    ids = [next(named) if i < 0 else i for i in found]
    answer = [0] * len(ids)
    for start, stop, weight in spans:
        for n, (begin, end) in enumerate(offsets):
            if begin < moved[stop] and end > moved[start]:
                answer[n] = weight
    return ids, answer


def encode_parts(text: str, spans, opening: list[int], tokenizer, guard: str):
    """Returns the same where each part of a text is encoded alone."""
    ids, answer = list(opening), [0] * len(opening)
    for part, weight in _parts(text, spans, tokenizer):
        found = _encode(part, tokenizer, guard)
        ids += found
        answer += [weight] * len(found)
    return ids, answer


def _parts(text: str, spans, tokenizer):
    """Yields (part of the text, its weight in a span and 0 between them).

    A span takes the whitespace behind it where the special token at its end does.
    """
    last = 0
    for start, stop, weight in spans:
        yield text[last:start], 0
        ends = [m for m in _pattern(tokenizer).finditer(text, start) if m.end() >= stop]
        last = ends[0].end() if ends and ends[0].start() < stop else stop
        yield text[start:last], weight
    yield text[last:], 0


def _encode(text: str, tokenizer, guard: str) -> list[int]:
    """Returns the ids of a text in which the names of special tokens are these."""
    ids: list[int] = []
    for number, piece in enumerate(_pattern(tokenizer).split(text)):
        if number % 2:
            ids.append(tokenizer.specials[piece.strip()])
        elif piece:
            ids += tokenizer.encode(piece.replace(guard, ""))
    return ids


@lru_cache(maxsize=8)
def _pattern(tokenizer) -> re.Pattern[str]:
    """Returns what matches the special tokens, with the whitespace that they take."""
    added = tokenizer.backend.get_added_tokens_decoder()
    parts = []
    for name in names_of(tokenizer):
        token = added[tokenizer.specials[name]]
        # Whitespace is tried from its beginning alone: from each of its characters,
        # a long run of it that no token follows would take quadratic time.
        left = r"(?:(?<!\s)\s+)?" * token.lstrip
        right = r"\s*" * token.rstrip
        parts.append(f"{left}{re.escape(name)}{right}")
    return re.compile(f"({'|'.join(parts) or '(?!)'})")
