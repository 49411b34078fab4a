"""A sweep as PNG files, for pages that run no script: curves.png and slices.png."""

from pathlib import Path

from gpt_jax import files
from gpt_jax.report import figures
from gpt_jax.report import results as tables
from gpt_jax.report.results import Results


def write(out: Path, results: Results) -> None:
    """Draws what there is to draw into `out`."""
    rows = [row for row in tables.ranked(results) if row["step"]]
    if rows:
        _save(out / "curves.png", *_curves(out, results, rows[: figures.MOST_CURVES]))
    if len(tables.done(results)) >= 2:
        _save(out / "slices.png", *_slices(results))


def _curves(out: Path, results: Results, rows: list) -> tuple:
    figure = _figure(8, 5)
    axes = figure.add_subplot()
    _, colour = figures.colours(results, rows)
    ends = []
    for row in reversed(rows):
        steps, values = tables.curve(out / row["name"], results["metric"])
        if not values:
            continue
        ends.append(values[-1])
        best = row["name"] == results["best"]
        style = "-" if row["status"] == "done" else ":"
        shade = figures.RED if best else _rgb(colour(row))
        label = f"best: {row['name']}" if best else None
        axes.plot(
            steps, values, style, color=shade, lw=2.4 if best else 1.2, label=label
        )
    axes.set_ylim(*figures.interesting(results, ends))
    axes.set_title(f"Sweep {results['sweep']}", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(results["metric"])
    axes.grid(color="0.9", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if results["best"]:
        axes.legend(frameon=False)
    return (figure,)


def _slices(results: Results) -> tuple:
    keys = list(tables.importance(results))
    across, down = tables.panels(len(keys))
    figure = _figure(4 * across + 0.5, 3.2 * down)
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    rows = tables.done(results)
    values = [row["value"] for row in rows]
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    for axes, key in zip(grid.flat, keys):
        points = [row["overrides"][key] for row in rows]
        x = points if tables.numeric(points) else [str(point) for point in points]
        axes.scatter(x, values, s=26, color=figures.BLUE, alpha=0.7, edgecolor="white")
        if tables.logarithmic(results, key, points):
            axes.set_xscale("log")
        for row in rows:
            if row["name"] == results["best"]:
                at = x[rows.index(row)]
                axes.scatter([at], [row["value"]], s=150, marker="*", color=figures.RED)
        axes.set_xlabel(results["keys"][key])
        axes.grid(color="0.9", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylim(*figures.interesting(results, values, pad=0.12))
    for row_of_axes in grid:
        row_of_axes[0].set_ylabel(results["metric"])
    return (figure,)


def _figure(width: float, height: float):
    # Imported late: it takes half a second. Without pyplot there is no global state.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _save(path: Path, figure) -> None:
    with files.draft(path) as part:
        figure.savefig(part, format="png")


def _rgb(text: str):
    """Returns a colour that plotly writes rgb(1,2,3) as matplotlib takes it."""
    if text.startswith("#"):
        return text
    return tuple(int(part) / 255 for part in text[4:-1].split(","))
