"""Pictures of a run, as PNG files."""

import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax import files, metrics

log = logging.getLogger(__name__)

TRAIN, BEST = "#4C72B0", "#C44E52"
MANY = 100  # points from which on the training loss is also drawn smoothed


class Picture(type(Path())):
    """The path of a PNG file; a notebook shows the picture."""

    def _repr_png_(self) -> bytes:
        return self.read_bytes()


def of_run(folder: str | Path) -> None:
    """Draws what a run has to show; a picture that cannot be drawn ends nothing."""
    try:
        if not rewards(folder):
            loss(folder)
        margins(folder)
    except Exception as error:  # whatever fonts, disks and other people's code raise
        why = f"{type(error).__name__}: {error}"
        log.warning("the picture of %s could not be drawn: %s", folder, why)


def loss(folder: str | Path) -> Picture | None:
    """Draws training and validation loss of a run into `folder/loss.png`.

    Steps stand below, training tokens above, nats per target at the side. Below it, of
    a run that records it, the share of known words in what it wrote.

    Returns:
      The file's path; None when no loss was recorded yet.

    Raises:
      FileNotFoundError: the folder has no record.
    """
    folder = Path(folder)
    rows = metrics.read(folder)
    train, val = _curve(rows, "train_loss"), _curve(rows, "val_loss")
    if not (np.isfinite(train[1]).any() or np.isfinite(val[1]).any()):
        return None
    words = _curve(rows, "sample_words")
    known = len(words[0]) > 0
    figure = empty(height=7 if known else 5)
    heights = (3, 1) if known else (1,)
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)
    axes = panels[0, 0]
    _draw_train(axes, *train)
    _draw_val(axes, *val, since=metrics.since(rows))
    _dress(axes, rows, folder.resolve().name)
    if known:
        _draw_words(panels[1, 0], *words)
        panels[1, 0].set_xlim(axes.get_xlim())
    return save(figure, folder / "loss.png")


def confusion(
    path: str | Path, labels: Sequence[str], table_CC: Sequence[Sequence[int]]
) -> None:
    """Draws a confusion matrix into a PNG file.

    Args:
      path: the file.
      labels: the classes.
      table_CC: counts by right class (rows) and given class (columns); the colour is
        the share of its row.
    """
    counts_CC = np.asarray(table_CC)
    shares_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    side = max(3.5, 0.7 * len(labels) + 1.5)  # inches
    figure = _matplotlib()(figsize=(side, side), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares_CC, cmap="Blues", vmin=0.0, vmax=1.0)
    for (row, column), count in np.ndenumerate(counts_CC):
        ink = "white" if shares_CC[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=ink)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="given class", ylabel="right class")
    save(figure, Path(path))


def margins(folder: str | Path) -> Picture | None:
    """Draws what a run learnt of preferences into `folder/margins.png`.

    Above, the rewards of chosen and of rejected answers and the margin between them,
    on training (thin) and validation pairs; below, the share of pairs whose chosen
    answer has the higher reward.

    Returns:
      The file's path; None when no margin was recorded.

    Raises:
      FileNotFoundError: the folder has no record.
    """
    folder = Path(folder)
    rows = metrics.read(folder)
    if not any("val_margin" in row for row in rows):
        return None
    figure = empty(height=7)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, color in (
        ("chosen_reward", "#55A868"),
        ("rejected_reward", BEST),
        ("margin", "0.3"),
    ):
        above.plot(*_curve(rows, f"train_{name}"), color=color, lw=0.8, alpha=0.5)
        label, curve = name.replace("_", " "), _curve(rows, f"val_{name}")
        above.plot(*curve, color=color, lw=1.6, marker="o", ms=4, label=label)
    below.plot(*_curve(rows, "train_accuracy"), color=TRAIN, lw=0.8, alpha=0.5)
    curve = _curve(rows, "val_accuracy")
    below.plot(*curve, color=TRAIN, lw=1.6, marker="o", ms=4, label="accuracy")
    above.set_title(folder.resolve().name, fontweight="bold", pad=10, parse_math=False)
    above.set_ylabel("reward (nats, times beta)")
    below.set_ylabel("share of pairs")
    below.set_ylim(-0.02, 1.02)
    below.set_xlabel("step")
    for axes in (above, below):
        _quiet(axes)
        axes.spines[["top", "right"]].set_visible(False)
    return save(figure, folder / "margins.png")


def rewards(folder: str | Path) -> Picture | None:
    """Draws how a run that learns from rewards does into `folder/reward.png`.

    Above, the mean reward and the share of right answers, drawn and greedy; below, the
    share of groups that teach nothing and the entropy of a token.

    Returns:
      The file's path; None when no reward was recorded.

    Raises:
      FileNotFoundError: the folder has no record.
    """
    folder = Path(folder)
    rows = metrics.read(folder)
    if not any("train_reward" in row for row in rows):
        return None
    figure = empty(height=7)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_train(above, *_curve(rows, "train_reward"), label="mean reward")
    right = _curve(rows, "val_accuracy")
    above.plot(*right, color=BEST, lw=1.6, marker="o", ms=4, label="held out, greedy")
    above.set_title(folder.resolve().name, fontweight="bold", pad=10, parse_math=False)
    above.set_ylabel("share of right answers")
    above.set_ylim(-0.02, 1.02)
    silent = _curve(rows, "train_no_signal")
    below.plot(*silent, color="0.45", lw=1.4, label="groups without a signal")
    entropy = _curve(rows, "train_entropy")
    below.plot(*entropy, color="#55A868", lw=1.4, label="entropy of a token (nats)")
    below.set_xlabel("step")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        _quiet(axes)
        axes.spines[["top", "right"]].set_visible(False)
    return save(figure, folder / "reward.png")


@functools.cache
def _matplotlib() -> Any:
    """Returns matplotlib's Figure: without pyplot there is no global state.

    Imported late: it takes half a second. Without a home folder it makes a temporary
    one, which is worth none of its lines.
    """

    def worth(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return "cache directory" not in said and "mkdir -p" not in said

    logging.getLogger("matplotlib").addFilter(worth)
    from matplotlib.figure import Figure

    return Figure


def empty(height: float) -> Any:
    """Returns an empty figure of 8 inches by `height`."""
    figure = _matplotlib()
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)  # inches
    return figure(figsize=(8, height), dpi=150, layout=layout)


def _quiet(axes) -> None:
    """Puts a light grid behind the curves and their names without a frame."""
    axes.grid(color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)


def save(figure, path: Path) -> Picture:
    """Writes a figure whole or not at all."""
    with files.draft(path) as part:
        figure.savefig(part, format="png")
    return Picture(path)


def _curve(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values of a number; null becomes nan, a gap in the curve."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    values = [math.nan if value is None else value for _, value in points]
    return np.array([step for step, _ in points]), np.array(values, float)


def _draw_train(
    axes, steps: np.ndarray, values: np.ndarray, label: str = "training"
) -> None:
    finite = np.isfinite(values)
    if not finite.any():
        return
    marker = "o" if finite.sum() == 1 else ""
    if finite.sum() < MANY:
        axes.plot(steps, values, color=TRAIN, lw=1.6, marker=marker, label=label)
        return
    axes.plot(steps, values, color=TRAIN, lw=0.8, alpha=0.3)
    steps, values = steps[finite], values[finite]
    width = max(3, len(values) // 25) | 1
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    middle = steps[width // 2 : width // 2 + len(smooth)]
    axes.plot(middle, smooth, color=TRAIN, lw=1.8, label=f"{label} (moving average)")


def _draw_val(axes, steps: np.ndarray, values: np.ndarray, since: int) -> None:
    """Draws the losses; those before `since`, of other data, faintly and as no best."""
    old = steps < since
    axes.plot(steps[old], values[old], color=BEST, lw=0.8, alpha=0.4)
    steps, values = steps[~old], values[~old]
    if not np.isfinite(values).any():
        return
    best = int(np.nanargmin(values))
    axes.plot(
        steps,
        values,
        color=BEST,
        lw=1.6,
        marker="o",
        ms=4,
        label="validation",
        zorder=3,
    )
    axes.plot(
        steps[best : best + 1],
        values[best : best + 1],
        ls="",
        marker="o",
        ms=9,
        mfc="none",
        mec=BEST,
        label=f"best: {values[best]:.4f} at step {steps[best]:,}",
    )


def _draw_words(axes, steps: np.ndarray, shares: np.ndarray) -> None:
    label = "words of the samples that the text has"
    axes.plot(steps, shares, color="#55A868", lw=1.6, marker="o", ms=4, label=label)
    axes.set_ylabel("share")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("step")
    _quiet(axes)
    axes.spines[["top", "right"]].set_visible(False)


def _dress(axes, rows: list[dict[str, Any]], title: str) -> None:
    """Adds everything that is not a curve."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    axes.set_title(title, fontweight="bold", pad=10, parse_math=False)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per target)")
    last = max(row["step"] for row in rows)
    axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    round_numbers = [1, 2, 5, 10]
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=8, steps=round_numbers, integer=True, min_n_ticks=1)
    )
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _quiet(axes)
    axes.spines["right"].set_visible(False)
    # A step always has the same number of tokens, so the axes differ by one factor.
    known = [
        row["tokens"] / row["step"] for row in rows if row.get("tokens") and row["step"]
    ]
    if not known:
        axes.spines["top"].set_visible(False)
        return
    factor = known[-1]
    top = axes.secondary_xaxis(
        "top", functions=(lambda step: step * factor, lambda tokens: tokens / factor)
    )
    top.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=round_numbers))
    top.xaxis.set_major_formatter(EngFormatter(sep=""))
    top.set_xlabel("training tokens")
