"""Where the optimum of one number lies, for each value of another."""

from typing import Any, NamedTuple

from gpt_jax.report import results as tables
from gpt_jax.report.looks import PALETTE, shade
from gpt_jax.report.results import Axis, Results, Row
from gpt_jax.report.scales import best_of_each, of

PANELS = 4  # beside each other, of an axis that was crossed with two others


class Line(NamedTuple):
    """The best results over one axis at one value of another.

    Attributes:
      of: that value.
      xs, ys: places and results.
      star: which of them is the best.
      colour: of the line.
    """

    of: Any
    xs: list
    ys: list
    star: int
    colour: str


class Panel(NamedTuple):
    """The lines at one value of a third axis; of all settings where there is none."""

    of: Any
    lines: list[Line]


class Optima(NamedTuple):
    """What shows where the optimum lies.

    Attributes:
      along: the axis to draw along.
      by: that of the lines.
      over: that of the panels, if there is one.
      panels: those.
    """

    along: Axis
    by: Axis
    over: Axis | None
    panels: list[Panel]


def find(results: Results, axes: list[Axis]) -> Optima | None:
    """Returns the valleys over one axis by another, in panels by a third.

    None unless two axes were crossed, the one with a few values and the other a number
    line.
    """
    if (found := interacting(results, axes)) is None:
        return None
    along, by, over = found
    rows, panels = tables.valued(results), []
    for value in over.values if over else [None]:
        here = [row for row in rows if of(row, over) == value] if over else rows
        panels.append(Panel(value, _lines(results, along, by, here)))
    return Optima(along, by, over, panels)


def _lines(results: Results, along: Axis, by: Axis, rows: list[Row]) -> list[Line]:
    choose, lines = min if results["direction"] == "minimize" else max, []
    for number, value in enumerate(by.values):
        at = [row for row in rows if of(row, by) == value]
        best = best_of_each(results, along, at)
        if not best:
            continue
        xs, ys = list(best), list(best.values())
        share = number / max(1, len(by.values) - 1)
        colour = shade(share) if by.numeric else PALETTE[number % len(PALETTE)]
        lines.append(Line(value, xs, ys, ys.index(choose(ys)), colour))
    return lines


def told(results: Results, axes: list[Axis]) -> str:
    """Returns the best place of each line in words; "" where there are none."""
    if (found := find(results, axes)) is None:
        return ""
    along, by, over, panels = found

    def star(line: Line) -> str:
        end = line.star in (0, len(line.xs) - 1)
        more = ", an end of the row: widen it" if end and len(line.xs) > 1 else ""
        value = tables.brief(line.xs[line.star])
        return f"{tables.brief(line.of)}: {value} ({line.ys[line.star]:.4f}{more})"

    parts = []
    for panel in panels:
        where = f" with {over.label} {tables.brief(panel.of)}" if over else ""
        lines = "; ".join(map(star, panel.lines))
        parts.append(f"Best {along.label} by {by.label}{where}: {lines}")
    return ". ".join(parts)


def interacting(
    results: Results, axes: list[Axis]
) -> tuple[Axis, Axis, Axis | None] | None:
    """Returns the axis to draw along, the one with a line for each value, and a third.

    A number line makes better lines than words, and the third has a panel a value.
    """
    lines = [axis for axis in axes if axis.numeric and len(axis.values) > 2]
    along = max(lines, key=lambda axis: len(axis.values), default=None)
    if along is None:
        return None
    few = [
        axis
        for axis in axes
        if axis is not along
        and len(axis.values) <= 8
        and tables.crossed(results, along, axis)
    ]
    if not few:
        return None
    by = max(few, key=lambda axis: (axis.numeric, len(axis.values)))
    third = (
        axis
        for axis in few
        if axis is not by
        and 1 < len(axis.values) <= PANELS
        and tables.crossed(results, along, by, axis)
    )
    return along, by, next(third, None)
