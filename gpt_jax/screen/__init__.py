"""What is shown: lines, progress, tables. No failure of a screen ends or changes a run.

A reader may go away, a log may lie on a full disk, a terminal may hang up or know no
Greek letters. What cannot be shown is dropped, and told once where that can be.
streams.py has stdout and stderr, progress.py what is drawn over and over, tables.py
numbers and columns.
"""

from gpt_jax.screen.progress import (
    Area,
    Progress,
    Show,
    Silence,
    counted,
    leave,
)
from gpt_jax.screen.streams import (
    Product,
    ReaderGone,
    Steady,
    Words,
    err,
    out,
    say,
    story,
    take_over,
)
from gpt_jax.screen.tables import clock, count, duration, size, table, visible, width

__all__ = [
    "Area",
    "Product",
    "Progress",
    "ReaderGone",
    "Show",
    "Silence",
    "Steady",
    "Words",
    "clock",
    "count",
    "counted",
    "duration",
    "err",
    "leave",
    "out",
    "say",
    "size",
    "story",
    "table",
    "take_over",
    "visible",
    "width",
]
