"""How a sweep's figures look: colours, dashes, axes; the same in HTML and in PNG."""

import itertools
import math
from collections.abc import Callable
from typing import Any

from gpt_jax.report import results as tables
from gpt_jax.report.results import Axis, Band, Results, Row
from gpt_jax.report.scales import can_stand, of

MOST_WORDS = 10  # that colours stand for
BLUE, RED, GREY = "#3B6FB6", "#D1495B", "#B8BEC8"
INK, FAINT = "#1F2933", "#E6E9EE"
SHADES = [[0, "#2B4C9B"], [0.35, "#3C9DB5"], [0.7, "#8BC34A"], [1, "#F2B134"]]
BEST_FIRST = [[0, RED], [0.12, "#7B4F94"], [0.35, BLUE], [1, "#CBD6E6"]]
# None is the red of the best.
PALETTE = (
    *("#3B6FB6", "#E08E45", "#4C9F70", "#8F6BB3", "#2AA7B8"),
    *("#C8A415", "#7A8794", "#A0522D", "#D77FB3", "#5B8C2A"),
)
DASHES = ("solid", "dash", "dashdot", "longdash")  # dotted ones were stopped early
FONT = {"family": "Inter, system-ui, Segoe UI, Helvetica, Arial", "color": INK}


def colours(results: Results, axis: Axis | None) -> Callable[[Row], str]:
    """Returns the colour of a setting; those that did not come to an end are grey."""
    if axis is None:
        return lambda row: BLUE if row["status"] in ("done", "running") else GREY
    if axis.numeric:
        write = math.log10 if axis.log else float
        known = [write(of(row, axis)) for row in tables.valued(results)] or [0.0]
        low, span = min(known), (max(known) - min(known)) or 1.0

        def shaded(row: Row) -> str:
            value = of(row, axis)
            ended = row["status"] not in ("diverged", "failed")
            if not (ended or row["value"] is not None) or not can_stand(row, axis):
                return GREY
            return shade((write(value) - low) / span)

        return shaded

    def worded(row: Row) -> str:
        if row["status"] in ("diverged", "failed") and row["value"] is None:
            return GREY
        return PALETTE[axis.values.index(of(row, axis))] if has_legend(axis) else BLUE

    return worded


def has_legend(axis: Axis | None) -> bool:
    """Whether colours stand for words, which a legend tells."""
    return bool(axis and not axis.numeric and len(axis.values) <= MOST_WORDS)


def dash(row: Row) -> str:
    """Returns how a curve is drawn: dotted where it was stopped before its end."""
    return "solid" if row["status"] in ("done", "running") else "dot"


def title(axis: Axis) -> str:
    """Returns what an axis is called, with the keys that move with it."""
    more = axis.tied[0] if len(axis.tied) == 1 else f"{len(axis.tied)} more"
    return f"{axis.label} (with {more})" if axis.tied else axis.label


def shade(share: float) -> str:
    """Returns the colour at a place, 0 to 1, of the scale."""
    colours = [(at, _rgb(text)) for at, text in SHADES]
    share = min(max(share, 0.0), 1.0)
    for (a, one), (b, two) in itertools.pairwise(colours):
        if share <= b:
            part = (share - a) / (b - a)
            mixed = [round(x + part * (y - x)) for x, y in zip(one, two)]
            return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})"
    return SHADES[-1][1]


def style(number: int) -> tuple[str, str]:
    """Returns the colour and the dash of a line; forty are different."""
    dashes = DASHES[number // len(PALETTE) % len(DASHES)]
    return PALETTE[number % len(PALETTE)], dashes


def area(found: Band, colour: str) -> dict[str, Any]:
    """Returns the band of a mean's standard error."""
    above, below = found.mean + found.error, found.mean - found.error
    return {
        "x": [*found.steps, *found.steps[::-1]],
        "y": [*above, *below[::-1]],
        "fill": "toself",
        "fillcolor": colour,
        "opacity": 0.16,
        "mode": "lines",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def colour_bar(results: Results, axis: Axis) -> dict[str, Any]:
    """Returns a trace of no points that shows which colour is which value."""
    write = math.log10 if axis.log else float
    shown = [of(row, axis) for row in tables.valued(results)]
    low, span = write(min(shown)), (write(max(shown)) - write(min(shown))) or 1.0
    at = tables.ticks(axis, shown, apart=0.07)
    return {
        "x": [None],
        "y": [None],
        "mode": "markers",
        "showlegend": False,
        "hoverinfo": "skip",
        "marker": {
            "colorscale": SHADES,
            "cmin": 0,
            "cmax": 1,
            "color": [0],
            "colorbar": {
                "title": {"text": title(axis), "side": "top"},
                "tickvals": [(write(value) - low) / span for value in at],
                "ticktext": [tables.brief(value) for value in at],
                "thickness": 12,
                "outlinewidth": 0,
                "len": 0.9,
            },
        },
    }


def dress(figure, *, height: int):
    """Gives a figure the look that all share; returns it."""
    figure.update_layout(
        template="none",
        font=FONT,
        height=height,
        margin={"l": 64, "r": 24, "t": 16, "b": 56},
        paper_bgcolor="white",
        plot_bgcolor="white",
        hovermode="closest",
        hoverlabel={"bgcolor": "white", "font": FONT},
        legend={"x": 1.02, "y": 1},
    )
    figure.update_xaxes(gridcolor=FAINT, linecolor=GREY, ticks="outside",
                        tickcolor=GREY, zeroline=False, automargin=True)  # fmt: skip
    figure.update_yaxes(gridcolor=FAINT, zeroline=False, automargin=True)
    return figure


def plotly():
    """Returns plotly's figures, loaded when one is drawn."""
    import plotly.graph_objects

    return plotly.graph_objects


def symbol(row: Row) -> str:
    """Returns the mark of a setting: an open one where seeds of it are missing."""
    return "circle" if row["status"] == "done" else "circle-open"


def _rgb(text: str) -> tuple[int, ...]:
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def reverse(scale: list) -> list:
    """Returns a scale of colours from its other end."""
    return [[1 - at, colour] for at, colour in reversed(scale)]
