"""Sizes, times, counts and Markdown tables, as people read them."""

from collections.abc import Sequence
from typing import Any

# Control characters but tab and newline -> their pictures in Unicode.
SIGNS = {code: 0x2400 + code for code in range(32) if code not in b"\t\n"}
SIGNS |= {127: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def size(amount: float) -> str:
    """Returns bytes in the unit that people read: powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:,.4g} TB"


def duration(seconds: float) -> str:
    """Returns a time in the unit that people read."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def clock(seconds: float) -> str:
    """Returns a time as 1:02:03."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def count(number: int, noun: str, many: str = "") -> str:
    """Returns "1 program", "2 programs", "1,000 classes"."""
    return f"{number:,} {noun if number == 1 else many or f'{noun}s'}"


def table(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table whose columns are aligned, numbers to the right.

    Args:
      heads: of the columns.
      lines: their cells: anything with a text; floats with four digits behind the
        point, None as nothing.
    """
    cells = [[_cell(cell) for cell in line] for line in lines]
    right = [
        bool(lines) and all(isinstance(cell, int | float | None) for cell in column)
        for column in zip(*lines, strict=True)
    ] or [False] * len(heads)
    # Three dashes are the least that makes a column in Markdown.
    wide = [max(3, *map(width, column)) for column in zip(heads, *cells, strict=True)]
    ruler = [
        "-" * (most - 1) + ":" if number else "-" * most
        for most, number in zip(wide, right, strict=True)
    ]
    return "\n".join(
        "| " + " | ".join(map(_aligned, line, wide, right)) + " |"
        for line in (list(heads), ruler, *cells)
    )


def visible(text: str) -> str:
    """Returns a text for a terminal: what would command it is a sign instead.

    A model that has learnt little writes any byte, also those that clear the screen or
    switch to another set of letters.
    """
    return text.translate(SIGNS)


def width(text: str) -> int:
    """Returns the columns that a text takes on a terminal."""
    from rich.cells import cell_len

    return cell_len(text)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _aligned(text: str, columns: int, right: bool) -> str:
    space = " " * (columns - width(text))
    return space + text if right else text + space
