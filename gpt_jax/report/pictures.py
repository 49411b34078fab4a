"""A sweep as PNG files, for pages that run no script.

curves.png, slices.png; optima.png where two keys were crossed, front.png with a cost,
schedules.png where points evolve.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_jax import files
from gpt_jax.report import looks, optimum, scales
from gpt_jax.report import results as tables
from gpt_jax.report.results import Axis, Results

LINES: dict[str, Any] = {"solid": "-", "dot": ":", "dash": "--", "dashdot": "-."}
LINES["longdash"] = (0, (8, 3))  # lengths of ink and of gap


def write(out: Path, results: Results, axes: list[Axis]) -> None:
    """Draws what there is to draw into `out`; the first axis gives curves a colour."""
    if scales.drawn(results):
        coloured = axes[0] if axes else None
        save(out / "curves.png", _curves(out, results, coloured))
    if results["evolved"]:
        save(out / "schedules.png", _schedules(results))
    elif axes and len(tables.valued(results)) >= 2:
        save(out / "slices.png", _slices(results, axes))
        if (found := optimum.find(results, axes)) is not None:
            save(out / "optima.png", _optima(results, found))
        if results["cost"] and results["cost"] in scales.spent(results):
            save(out / "front.png", _front(results, results["cost"]))


def empty(width: float, height: float):
    """Returns a figure; without pyplot there is no global state."""
    from matplotlib.figure import Figure  # imported late: it takes half a second

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def dress(axes) -> None:
    """Gives a panel the look that all share."""
    axes.grid(color="0.9", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def rgb(text: str):
    """Returns a colour that plotly writes rgb(1,2,3) as matplotlib takes it."""
    if text.startswith("#"):
        return text
    return tuple(int(part) / 255 for part in text[4:-1].split(","))


def save(path: Path, figure) -> None:
    """Writes a picture whole or not at all."""
    with files.draft(path) as part:
        figure.savefig(part, format="png")


def _curves(out: Path, results: Results, axis: Axis | None):
    figure = empty(9 if axis else 8, 5)
    panel = figure.add_subplot()
    rows, colour = scales.drawn(results), looks.colours(results, axis)
    labels: dict[str, Any] = {}
    for row in reversed(rows):
        found = scales.band_of(out, results, row)
        if not found.steps:
            continue
        best = row["name"] == results["best"]
        ink = looks.RED if best else rgb(colour(row))
        low, high = found.mean - found.error, found.mean + found.error
        if found.error.any():
            panel.fill_between(found.steps, low, high, color=ink, alpha=0.15, lw=0)
        (line,) = panel.plot(
            found.steps, found.mean, LINES[looks.dash(row)], color=ink,
            lw=2.4 if best else 1.2, marker="o" if len(found.steps) == 1 else None,
        )  # fmt: skip
        word = ""
        if axis and looks.has_legend(axis):
            word = tables.brief(tables.at(row, axis.key))
        if best:
            labels[scales.best_label(row, word)] = line
        elif word:
            labels.setdefault(word, line)
    panel.set_ylim(*scales.curve_range(out, results))
    panel.set_xlim(0, scales.last_step(rows))
    panel.set_title(f"Sweep {results['sweep']}", fontweight="bold")
    panel.set_xlabel("step")
    panel.set_ylabel(results["title"])
    dress(panel)
    if axis and axis.numeric and tables.valued(results):
        _colour_bar(figure, panel, results, axis)
    if labels:
        words, lines = list(labels)[::-1], list(labels.values())[::-1]
        if looks.has_legend(axis):
            figure.legend(lines, words, frameon=False, loc="outside right upper")
        else:
            panel.legend(lines, words, frameon=False, loc="upper right")
    return figure


def _colour_bar(figure, panel, results: Results, axis: Axis) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    shown = [tables.at(row, axis.key) for row in tables.valued(results)]
    shades = LinearSegmentedColormap.from_list(
        "shades", [rgb(looks.shade(i / 50)) for i in range(51)]
    )
    high = max(shown) if max(shown) > min(shown) else min(shown) + 1
    norm = (LogNorm if axis.log else Normalize)(min(shown), high)
    bar = figure.colorbar(ScalarMappable(norm, shades), ax=panel, pad=0.02)
    _ticks(bar.ax.yaxis, tables.ticks(axis, shown, apart=0.06))
    bar.set_label(looks.title(axis))
    bar.outline.set_visible(False)


def _slices(results: Results, axes: list[Axis]):
    across, down = tables.panels(len(axes))
    figure = empty(4 * across + 0.5, 3.2 * down)
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for panel in grid.flat[len(axes) :]:
        panel.set_visible(False)
    for panel, axis in zip(grid.flat, axes):
        _slice(panel, results, axis, tables.crossed(results, *axes))
    grid[0, 0].set_ylim(*scales.interesting(results, pad=0.12))
    for row_of_panels in grid:
        row_of_panels[0].set_ylabel(results["title"])
    return figure


def _slice(panel, results: Results, axis: Axis, joined: bool) -> None:
    """Draws the result over one key."""
    rows = [row for row in tables.valued(results) if scales.can_stand(row, axis)]
    if not axis.numeric:  # words stand in their order, whoever is drawn first
        words = [tables.brief(value, 14) for value in axis.values]
        panel.set_xticks(range(len(words)), words)
        panel.set_xlim(-0.5, len(words) - 0.5)
        if sum(map(len, words)) > 36:
            panel.tick_params(axis="x", rotation=30)

    def x(row):
        return scales.place(row, axis)

    if joined and axis.numeric:
        best = scales.best_of_each(results, axis, rows)
        panel.plot(list(best), list(best.values()), color=looks.BLUE, lw=1.2)
    sure = [row for row in rows if row["low"] is not None]
    ends = [[row[end] for row in sure] for end in ("low", "high")]
    panel.vlines([x(row) for row in sure], *ends, color="0.75", lw=1)
    for whole, edge, fill in (
        (True, "white", looks.BLUE),
        (False, looks.BLUE, "none"),
    ):
        own = [row for row in rows if (row["status"] == "done") == whole]
        at, values = [x(row) for row in own], [row["value"] for row in own]
        panel.scatter(at, values, s=26, alpha=0.7, edgecolor=edge, color=fill)
    lost = scales.diverged(results, axis, [x(row) for row in rows])
    top = scales.worst_end(results, scales.interesting(results, pad=0.12))
    panel.scatter(lost, [top] * len(lost), s=28, marker="x", color="0.6", lw=1)
    for row in rows[:1]:
        if row["name"] == results["best"]:
            panel.scatter(
                [x(row)], [row["value"]], s=150, marker="*", color=looks.RED, zorder=3
            )
    if axis.log:
        panel.set_xscale("log")
    if axis.numeric and rows:
        _ticks(panel.xaxis, tables.ticks(axis, [x(row) for row in rows], apart=0.17))
    panel.set_xlabel(looks.title(axis))
    dress(panel)


def _optima(results: Results, found: optimum.Optima):
    """Draws the valley of each line and a star where it is deepest."""
    along, by, over, panels = found
    figure = empty(8 if len(panels) == 1 else 5 * len(panels), 4.6)
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(drawn, panels, strict=True):
        for line in panel.lines:
            ink = rgb(line.colour)
            label = f"{by.label} {tables.brief(line.of)}"
            axes.plot(line.xs, line.ys, "-o", color=ink, lw=1.8, ms=4, label=label)
            best = line.xs[line.star], line.ys[line.star]
            axes.scatter(*best, s=170, marker="*", color=ink, edgecolor="w", zorder=3)
        axes.set_ylim(*scales.interesting(results, pad=0.1))
        if along.log:
            axes.set_xscale("log")
        shown = [x for line in panel.lines for x in line.xs]
        _ticks(axes.xaxis, tables.ticks(along, shown, apart=0.08 * len(panels)))
        if over:
            axes.set_title(f"{over.label} {tables.brief(panel.of)}")
        axes.set_xlabel(looks.title(along))
        dress(axes)
    figure.suptitle(f"Sweep {results['sweep']}", fontweight="bold")
    drawn[0].set_ylabel(results["title"])
    drawn[0].legend(frameon=False)
    return figure


def _schedules(results: Results):
    """Draws the numbers that each member's weights were trained with."""
    evolved = results["evolved"]
    keys = list(next(iter(evolved.values()))[0][1])
    figure = empty(7 * len(keys), 4)
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for panel, key in zip(panels, keys):
        for name in reversed(evolved):
            best = name == next(iter(evolved))
            ink = looks.RED if best else looks.BLUE
            style = {
                "color": ink,
                "lw": 2.4 if best else 1,
                "alpha": 1 if best else 0.5,
            }
            panel.step(*scales.stairs(results, name, key), where="post", **style)
        panel.set_yscale("log")
        panel.set_xlabel("step")
        panel.set_ylabel(key)
        dress(panel)
    figure.suptitle(f"Sweep {results['sweep']}", fontweight="bold")
    return figure


def _front(results: Results, cost: str):
    """Draws the result over a cost, and the Pareto front."""
    figure = empty(8, 4.6)
    panel = figure.add_subplot()
    rows, ahead = tables.valued(results), tables.front(results, cost)
    rows = [row for row in rows if tables.cost(row, cost) is not None]
    paid: list[Any] = [tables.cost(row, cost) for row in rows]
    values = [row["value"] for row in rows]
    panel.scatter(paid, values, s=30, alpha=0.6, color=looks.BLUE, edgecolor="w")
    xs: list[Any] = [tables.cost(row, cost) for row in ahead]
    ys = [row["value"] for row in ahead]
    panel.step(xs, ys, "-o", where="post", color=looks.RED, lw=1.6, ms=5)
    if scales.positive(results, cost):
        panel.set_xscale("log")
        axis = Axis(cost, cost, [], [], numeric=True, log=True)
        at = tables.ticks(axis, paid, apart=0.1)
        _ticks(panel.xaxis, at, tables.amount)
    panel.set_ylim(*scales.interesting(results, pad=0.1))
    panel.set_title(f"Sweep {results['sweep']}", fontweight="bold")
    panel.set_xlabel(scales.spent(results)[cost])
    panel.set_ylabel(results["title"])
    dress(panel)
    return figure


def _ticks(axis, at: list[float], write: Callable = tables.brief) -> None:
    """Sets the ticks of an axis, and none between them."""
    axis.set_ticks(at, labels=[write(value) for value in at])
    axis.set_ticks([], minor=True)
