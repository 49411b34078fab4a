"""One of several known names: picked, or refused with the nearest one told."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def choose(what: str, value: Any, known: Iterable[Any]) -> Any:
    """Returns what a table holds at `value`, or `value` where `known` is no table.

    Raises:
      ValueError: `known` does not hold it; says what was wanted and found, and which
        known word is near.
    """
    if value in (words := list(known)):
        return known[value] if isinstance(known, Mapping) else value
    shown = ", ".join(word if isinstance(word, str) else repr(word) for word in words)
    raise ValueError(
        f"{what} {value!r} is not one of: {shown}{did_you_mean(value, words)}"
    )


def did_you_mean(value: Any, known: Iterable[Any]) -> str:
    """Returns "; did you mean adamw?" where a known word is near, else ""."""
    near = nearest(str(value), known)
    return f"; did you mean {near[0]}?" if near else ""


def nearest(word: str, known: Iterable[Any], count: int = 1) -> list[str]:
    """Returns the known words that are spelt most like `word`, best first."""
    lower = {str(name).lower(): str(name) for name in known}
    return [
        lower[name] for name in difflib.get_close_matches(word.lower(), lower, count)
    ]
