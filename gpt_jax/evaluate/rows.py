"""Tables and JSON out; and how far a long evaluation is."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


def write(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, whole or not at all."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    save(path, text)


def save(path: str | Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def table(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table whose columns are aligned."""
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    wide = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    ruler = ["-" * width for width in wide]
    return "\n".join(
        "| " + " | ".join(map(str.ljust, line, wide)) + " |"
        for line in (list(heads), ruler, *cells)
    )


@contextlib.contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how many of `total` things are done.

    Returns:
      A function that is told how many more there are.
    """
    console = Console(stderr=True, soft_wrap=True)
    began = said = time.monotonic()
    done = 0
    columns = ("{task.description}", bars.BarColumn(), bars.MofNCompleteColumn())
    with bars.Progress(
        *columns,
        bars.TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as drawn:
        task = drawn.add_task(what, total=total)

        def show(more: int) -> None:
            nonlocal done, said
            done += more
            drawn.advance(task, more)
            now = time.monotonic()
            if not console.is_terminal and now - said >= LINE_SECONDS:
                said = now
                line = _line(what, done, total, now - began)
                console.print(line, highlight=False, markup=False)

        yield show


def _line(what: str, done: int, total: int | None, seconds: float) -> str:
    if not total:
        return f"{what}: {done:,}"
    left = seconds / max(done, 1) * (total - done)
    return f"{what}: {done:,} of {total:,}, {left:.0f} s left"
