"""Interactive figures of a sweep; plotly is imported when one is drawn."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_jax.report import optimum
from gpt_jax.report import results as tables
from gpt_jax.report.looks import (
    BEST_FIRST,
    BLUE,
    GREY,
    RED,
    area,
    colour_bar,
    colours,
    dash,
    dress,
    has_legend,
    plotly,
    reverse,
    symbol,
    title,
)
from gpt_jax.report.results import Axis, Results, Row
from gpt_jax.report.scales import (
    band_of,
    best_label,
    best_of_each,
    can_stand,
    clip,
    curve_range,
    diverged,
    drawn,
    interesting,
    last_step,
    of,
    place,
    positive,
    spent,
    stairs,
    worst_end,
)


def curves(out: Path, results: Results, axis: Axis | None):
    """Returns the metric over steps: a line a setting, coloured by an axis.

    Where a setting has several seeds the line is their mean, the band its standard
    error.
    """
    figure = plotly().Figure()
    rows = drawn(results)
    colour = colours(results, axis)
    named: set[str] = set()
    for row in reversed(rows):  # the best are drawn last, on top
        found = band_of(out, results, row)
        if not found.steps:
            continue
        best = row["name"] == results["best"]
        shade = RED if best else colour(row)
        if found.error.any():
            figure.add_scatter(**area(found, shade), name=row["name"])
        word = tables.brief(of(row, axis)) if axis and has_legend(axis) else ""
        figure.add_scatter(
            x=found.steps,
            y=found.mean.tolist(),
            mode="lines+markers" if len(found.steps) == 1 else "lines",
            line={"color": shade, "width": 3.2 if best else 1.6, "dash": dash(row)},
            opacity=1 if best or len(rows) <= 20 else 0.7,
            name=best_label(row, word) if best else word or row["name"],
            legendgroup=f"best {word}" if best else word,
            showlegend=best or bool(word and word not in named),
            hovertemplate=f"<b>{row['name']}</b> ({row['status']})<br>step %{{x:,}}: "
            f"%{{y:.4f}}<extra></extra>",
        )
        named.add("" if best else word)
    if axis and axis.numeric and any(row["value"] is not None for row in rows):
        figure.add_scatter(**colour_bar(results, axis))
    figure.update_xaxes(title="step", range=[0, last_step(rows)])
    figure.update_yaxes(title=results["title"], range=curve_range(out, results))
    figure = dress(figure, height=440)
    # Beside the colours of a number line there is no room.
    place = {} if has_legend(axis) else {"orientation": "h", "x": 0, "y": 1.1}
    return figure.update_layout(legend={"traceorder": "reversed", **place})


def slices(results: Results, axes: list[Axis]):
    """Returns the result over each axis: a panel a key, a point a setting.

    A line joins the best of each value where all values were crossed with the others.
    """
    from plotly import subplots

    across, down = tables.panels(len(axes))
    figure = subplots.make_subplots(
        rows=down, cols=across, shared_yaxes=True,
        horizontal_spacing=0.04, vertical_spacing=0.22 / max(1, down - 0.5),
    )  # fmt: skip
    joined = tables.crossed(results, *axes)
    ends = interesting(results, pad=0.12)
    top = worst_end(results, ends)
    for index, axis in enumerate(axes):
        where: Any = {"row": index // across + 1, "col": index % across + 1}
        rows = [row for row in tables.valued(results) if can_stand(row, axis)]
        x, y = [place(row, axis) for row in rows], [row["value"] for row in rows]
        if joined and axis.numeric:
            best = best_of_each(results, axis, rows)
            figure.add_scatter(
                x=list(best), y=list(best.values()), mode="lines", showlegend=False,
                line={"color": BLUE, "width": 1.6}, hoverinfo="skip", **where,
            )  # fmt: skip
        figure.add_scatter(
            x=x, y=y, mode="markers", showlegend=False, **_bars(rows),
            marker={"size": 8, "color": BLUE, "opacity": 0.65,
                    "symbol": [symbol(row) for row in rows],
                    "line": {"width": 1, "color": "white"}},
            text=[_hover(row, results) for row in rows],
            hovertemplate="%{text}<extra></extra>", **where,
        )  # fmt: skip
        if lost := diverged(results, axis, x):
            figure.add_scatter(x=lost, y=[top] * len(lost), **_crosses(), **where)
        for row in rows[:1]:
            if row["name"] == results["best"]:
                figure.add_scatter(
                    x=[place(row, axis)], y=[row["value"]], mode="markers",
                    marker={"size": 14, "symbol": "star", "color": RED,
                            "line": {"width": 1, "color": "white"}},
                    showlegend=False, hoverinfo="skip", **where,
                )  # fmt: skip
        apart = 0.16 if across > 1 else 0.06
        figure.update_xaxes(title=title(axis), **_axis(axis, x, apart), **where)
    figure.update_yaxes(range=ends)
    figure.update_yaxes(title=results["title"], col=1)
    return dress(figure, height=330 * down + 20)


def interaction(results: Results, axes: list[Axis]):
    """Returns a line for each value of one axis over another, its optimum marked.

    At each place stands the best of the settings there. Where a third axis was crossed
    with them, each of its values has a panel. None unless two axes were crossed, the
    one with a few values and the other a number line.
    """
    from plotly import subplots

    if (found := optimum.find(results, axes)) is None:
        return None
    along, by, over, panels = found
    titles = [f"{over.label} {tables.brief(p.of)}" for p in panels] if over else None
    figure = subplots.make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=titles,
    )
    for col, panel in enumerate(panels, start=1):
        for line in panel.lines:
            marks = [
                "star" if i == line.star else "circle" for i in range(len(line.xs))
            ]
            figure.add_scatter(
                x=line.xs,
                y=line.ys,
                mode="lines+markers",
                name=f"{by.label} {tables.brief(line.of)}",
                legendgroup=tables.brief(line.of),
                showlegend=col == 1,
                line={"color": line.colour, "width": 2.2},
                marker={
                    "size": [13 if mark == "star" else 6 for mark in marks],
                    "symbol": marks,
                    "line": {"width": 1, "color": "white"},
                },
                row=1,
                col=col,
            )
        shown = [x for line in panel.lines for x in line.xs]
        apart = 0.06 * len(panels)
        figure.update_xaxes(title=title(along), **_axis(along, shown, apart), col=col)
    figure.update_yaxes(range=interesting(results, pad=0.1))
    figure.update_yaxes(title=results["title"], col=1)
    figure = dress(figure, height=400)
    return figure.update_layout(margin={"t": 36}) if over else figure


def tradeoffs(results: Results):
    """Returns the result over what a run costs, its Pareto front joined.

    A menu chooses the cost; None where no cost differs between settings.
    """
    costs = spent(results)
    if not costs:
        return None
    figure, first = plotly().Figure(), next(iter(costs))
    for key in costs:
        rows, ahead = tables.valued(results), tables.front(results, key)
        rows = [row for row in rows if tables.cost(row, key) is not None]
        figure.add_scatter(
            x=[tables.cost(row, key) for row in rows], y=[row["value"] for row in rows],
            mode="markers", showlegend=False, visible=key == first,
            marker={"size": 8, "color": BLUE, "opacity": 0.5},
            text=[_hover(row, results) for row in rows],
            hovertemplate="%{text}<br>%{x:.4~g}<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[tables.cost(row, key) for row in ahead],
            y=[row["value"] for row in ahead],
            mode="lines+markers", showlegend=False, visible=key == first,
            line={"color": RED, "width": 1.6, "shape": "hv"},
            marker={"size": 9}, text=[_hover(row, results) for row in ahead],
            hovertemplate="%{text}<br>%{x:.4~g}<extra></extra>",
        )  # fmt: skip
    buttons = [
        {
            "label": told,
            "method": "update",
            "args": [
                {"visible": [key == other for other in costs for _ in range(2)]},
                {"xaxis.title.text": told, **_scale(results, key, "xaxis.")},
            ],
        }
        for key, told in costs.items()
    ]
    scale = _scale(results, first)
    figure.update_xaxes(title=costs[first], tickformat="~s", **scale)
    figure.update_yaxes(title=results["title"], range=interesting(results, pad=0.1))
    figure = dress(figure, height=400)
    menu = {
        "buttons": buttons,
        "x": 1,
        "xanchor": "right",
        "y": 1.12,
        "showactive": True,
    }
    return figure.update_layout(updatemenus=[menu]) if len(costs) > 1 else figure


def schedules(results: Results):
    """Returns the numbers that each member's weights were trained with, over steps.

    The best one is red. None where points do not evolve.
    """
    from plotly import subplots

    if not (evolved := results["evolved"]):
        return None
    keys = list(next(iter(evolved.values()))[0][1])
    figure = subplots.make_subplots(rows=1, cols=len(keys), horizontal_spacing=0.09)
    for column, key in enumerate(keys, start=1):
        for name in reversed(evolved):  # the best is drawn last, on top
            steps, values = stairs(results, name, key)
            best = name == next(iter(evolved))
            figure.add_scatter(
                x=steps, y=values, mode="lines", showlegend=False, name=name,
                line={"color": RED if best else BLUE, "width": 3.2 if best else 1.2,
                      "shape": "hv"},
                opacity=1 if best else 0.5, row=1, col=column,
                hovertemplate=f"<b>{name}</b><br>from step %{{x:,}}: %{{y:.4~g}}"
                "<extra></extra>",
            )  # fmt: skip
        figure.update_yaxes(title=key, type="log", row=1, col=column)
    figure.update_xaxes(title="step")
    return dress(figure, height=380)


def _scale(results: Results, cost: str, prefix: str = "") -> dict[str, Any]:
    """Returns the settings of an axis of a cost: logarithmic where that is possible."""
    log = positive(results, cost)
    return {f"{prefix}type": "log" if log else "linear",
            f"{prefix}dtick": "D2" if log else None}  # fmt: skip


def importances(shares: dict[str, float], axes: list[Axis]):
    """Returns a bar for each key that is told from chance."""
    named = {axis.key: title(axis) for axis in axes}
    found = list(shares.items())[::-1]
    figure = plotly().Figure()
    figure.add_bar(
        y=[named[key] for key, _ in found],
        x=[share for _, share in found],
        orientation="h",
        marker={"color": BLUE},
        text=[f"{share:.0%}" for _, share in found],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
    )
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_layout(bargap=0.45)
    return dress(figure, height=90 + 46 * len(found))


def parallel(results: Results, axes: list[Axis]):
    """Returns parallel coordinates: a line a setting through all of its values."""
    rows = tables.valued(results)
    dimensions = [_dimension(axis, rows) for axis in axes]
    low, high = clip(results)
    shown = [min(max(row["value"], low), high) for row in rows]
    dimensions.append({"label": results["metric"], "values": shown})
    scale = BEST_FIRST if results["direction"] == "minimize" else reverse(BEST_FIRST)
    figure = plotly().Figure()
    figure.add_parcoords(
        dimensions=dimensions,
        line={"color": shown, "colorscale": scale, "showscale": False},
        labelfont={"size": 13},
    )
    figure = dress(figure, height=380)
    return figure.update_layout(margin={"l": 70, "r": 60, "t": 60, "b": 30})


def _bars(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns error bars of the mean's interval, where there is one."""
    if not any(row["low"] is not None for row in rows):
        return {}
    reach = [0 if row["low"] is None else row["high"] - row["value"] for row in rows]
    return {"error_y": {"array": reach, "thickness": 1, "width": 3, "color": GREY}}


def _crosses() -> dict[str, Any]:
    marker = {"symbol": "x-thin", "size": 8, "line": {"width": 1.5, "color": GREY}}
    told = {"hovertemplate": "diverged<extra></extra>", "showlegend": False}
    return {"mode": "markers", "marker": marker, **told}


def _hover(row: Row, results: Results) -> str:
    return f"<b>{row['name']}</b><br>{row['value']:.4f} {tables.of_seeds(row)}"


def _axis(axis: Axis, shown: list, apart: float) -> dict[str, Any]:
    """Returns the settings of an axis of a key's values."""
    if not axis.numeric:
        words = [tables.brief(value, 14) for value in axis.values]
        angle = {"tickangle": -30} if sum(map(len, words)) * apart > 5 else {}
        ends = {"range": [-0.5, len(words) - 0.5]}
        return {"tickvals": [*range(len(words))], "ticktext": words, **ends, **angle}
    if not shown:
        return {}
    at = tables.ticks(axis, shown, apart)
    return {
        "type": "log" if axis.log else "linear",
        "tickvals": at,
        "ticktext": [tables.brief(value) for value in at],
    }


def _dimension(axis: Axis, rows: list[Row]) -> dict[str, Any]:
    """Returns an axis of the parallel coordinates."""
    values = [of(row, axis) for row in rows]
    if axis.numeric and not (axis.log and min(values) <= 0):
        write = math.log10 if axis.log else float
        at = tables.ticks(axis, values, apart=0.07)
        return {
            "label": axis.label,
            "values": [write(value) for value in values],
            "tickvals": [write(value) for value in at],
            "ticktext": [tables.brief(value) for value in at],
        }
    return {
        "label": axis.label,
        "values": [axis.values.index(value) for value in values],
        "tickvals": list(range(len(axis.values))),
        "ticktext": [tables.brief(value, 16) for value in axis.values],
    }
