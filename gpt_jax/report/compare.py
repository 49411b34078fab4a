"""Any run folders side by side: a table, curves, and what the seeds say.

Runs whose configs differ in the seed only are one setting, tried several times. Two
settings that share seeds are compared in pairs: data order and first weights are then
the same, and what they add to both sides cancels.
"""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax import files, runs
from gpt_jax.report import page
from gpt_jax.report import results as tables
from gpt_jax.report.figures import FONT, PALETTE, dress, plotly
from gpt_jax.report.results import Curve

SEED = "seed"
ABSENT = "(absent)"


class Run(NamedTuple):
    """A run: its folder, its evaluations, and its config as dotted keys."""

    folder: Path
    curve: Curve
    keys: dict[str, Any]


class Setting(NamedTuple):
    """Runs that differ in the seed only.

    Attributes:
      name: what sets it apart from the others.
      runs: seed -> run.
      values: seed -> the metric, at the best or the last evaluation.
      mean, error: of the values; the standard error of the mean, nan for one seed.
    """

    name: str
    runs: dict[int, Run]
    values: dict[int, float]
    mean: float
    error: float


class Pair(NamedTuple):
    """Setting b against setting a, over the seeds that both have.

    Attributes:
      a, b: their names.
      seeds: how many they share.
      difference, error: mean of b - a and its standard error.
      low, high: 95 % confidence interval of the difference (Student's t).
    """

    a: str
    b: str
    seeds: int
    difference: float
    error: float
    low: float
    high: float


class Comparison(NamedTuple):
    """What `compare` found, best setting first."""

    metric: str
    settings: list[Setting]
    pairs: list[Pair]


def compare(
    folders: Sequence[Path], metric: str, *, direction: str, at: str
) -> Comparison:
    """Returns the settings of run folders, and their paired differences.

    Args:
      folders: run folders.
      metric: a name in metrics.jsonl.
      direction: minimize or maximize it.
      at: "best" or "last" evaluation.

    Raises:
      ValueError: a folder is no run, lacks the metric, or is there twice.
    """
    found = [_open(Path(folder), metric) for folder in folders]
    if not found:
        raise ValueError("there are no runs to compare")
    settings = _settings(found, direction, at)
    sign = 1 if direction == "minimize" else -1
    settings.sort(key=lambda s: (math.isnan(s.mean), sign * s.mean))
    pairs = [_pair(settings[0], other) for other in settings[1:]]
    return Comparison(metric, settings, [pair for pair in pairs if pair.seeds >= 2])


def lines(found: Comparison) -> list[str]:
    """Returns the comparison as lines for a terminal."""
    width = max(len(setting.name) for setting in found.settings)
    text = [f"{'':{width}s}  seeds  {found.metric}"]
    for setting in found.settings:
        text.append(
            f"{setting.name:{width}s}  {len(setting.values):5d}  {_said(setting)}"
        )
    for pair in found.pairs:
        text.append("")
        text.append(_sentence(pair, found.metric))
    return text


def write(out: Path, found: Comparison) -> None:
    """Writes compare.csv, compare.json, compare.html and compare.png."""
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["setting", "seed", found.metric, "steps", "run"])
    for setting in found.settings:
        for seed, run in setting.runs.items():
            steps = run.curve.steps[-1]
            rows.writerow([setting.name, seed, setting.values[seed], steps, run.folder])
    (out / "compare.csv").write_text(text.getvalue(), encoding="utf-8")
    files.write(out / "compare.json", json.dumps(_plain(found), indent=1) + "\n")
    _picture(out / "compare.png", found)
    page.save(out / "compare.html", "Comparison", _body(found))


def _open(folder: Path, metric: str) -> Run:
    config = runs.read_config(folder)
    curve = tables.curve(folder, metric)
    if not curve.values:
        raise ValueError(
            f"{folder} has no {metric!r} in its metrics.jsonl: it was not evaluated, "
            f"or another --metric is meant"
        )
    return Run(folder, curve, runs.flat(config))


def _settings(found: list[Run], direction: str, at: str) -> list[Setting]:
    groups: dict[str, dict[int, Run]] = {}
    names = _names(found)
    for run, name in zip(found, names):
        seeds = groups.setdefault(name, {})
        seed = run.keys[SEED]
        if seed in seeds:
            raise ValueError(
                f"{run.folder} and {seeds[seed].folder} have the same config and seed: "
                f"leave one of them out"
            )
        seeds[seed] = run
    choose = min if direction == "minimize" else max
    settings = []
    for name, seeds in groups.items():
        values = {
            seed: choose(run.curve.values) if at == "best" else run.curve.values[-1]
            for seed, run in sorted(seeds.items())
        }
        mean, error = _mean(list(values.values()))
        settings.append(Setting(name, dict(sorted(seeds.items())), values, mean, error))
    return settings


def _names(found: list[Run]) -> list[str]:
    """Returns what sets each run apart, the seed left out: lr=0.001, d_model=64."""
    where = "|".join(runs.WHERE)
    keys = sorted({key for run in found for key in run.keys} - {SEED})
    keys = [key for key in keys if not re.fullmatch(where, key)]
    differ = [
        key
        for key in keys
        if len({repr(run.keys.get(key, ABSENT)) for run in found}) > 1
    ]
    if not differ:
        return ["all"] * len(found)
    last = [key.removesuffix(".name").rpartition(".")[2] for key in differ]
    short = {k: s if last.count(s) == 1 else k for k, s in zip(differ, last)}
    return [
        ", ".join(f"{short[key]}={run.keys.get(key, ABSENT)}" for key in differ)
        for run in found
    ]


def _mean(values: list[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, s / sqrt(n)."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def _pair(a: Setting, b: Setting) -> Pair:
    shared = sorted(a.values.keys() & b.values.keys())
    differences = [b.values[seed] - a.values[seed] for seed in shared]
    if len(shared) < 2:
        return Pair(a.name, b.name, len(shared), math.nan, math.nan, math.nan, math.nan)
    from scipy import stats  # JAX brings it; half a second

    mean, error = _mean(differences)
    reach = float(stats.t.ppf(0.975, len(shared) - 1)) * error
    return Pair(
        a.name, b.name, len(shared), mean, error, mean - reach, mean + reach
    )  # fmt: skip


def _said(setting: Setting) -> str:
    if math.isnan(setting.error):
        return f"{setting.mean:.4f}"
    return f"{setting.mean:.4f} +- {setting.error:.4f}"


def _sentence(pair: Pair, metric: str) -> str:
    sure = pair.low > 0 or pair.high < 0
    verdict = (
        "more than chance" if sure else "no more than what the seeds do by themselves"
    )
    return (
        f"{pair.b} against {pair.a}: {metric} {pair.difference:+.4f} +- "
        f"{pair.error:.4f} in {pair.seeds} pairs of one seed, 95 % within "
        f"[{pair.low:+.4f}, {pair.high:+.4f}]: {verdict}"
    )


def _plain(found: Comparison) -> dict:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "metric": found.metric,
        "settings": [
            {
                "name": setting.name,
                "values": setting.values,
                "mean": setting.mean,
                "standard_error": number(setting.error),
                "runs": {seed: str(run.folder) for seed, run in setting.runs.items()},
            }
            for setting in found.settings
        ],
        "pairs": [pair._asdict() for pair in found.pairs],
    }


def _band(setting: Setting) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Returns steps, mean and standard error where all seeds were evaluated."""
    curves = [dict(zip(*run.curve)) for run in setting.runs.values()]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])
    spread = np.zeros(len(steps))
    if len(curves) > 1:
        spread = values.std(axis=0, ddof=1) / len(curves) ** 0.5
    return steps, values.mean(axis=0), spread


def _body(found: Comparison) -> str:
    import html

    parts = [f"<h1>{len(found.settings)} settings compared</h1>"]
    runs_ = sum(len(setting.runs) for setting in found.settings)
    parts.append(f"<p class=soft>{runs_} runs, {html.escape(found.metric)}</p>")
    seeds = any(len(setting.runs) > 1 for setting in found.settings)
    text = "Mean over the seeds; the band is the standard error." if seeds else ""
    parts.append(page.section("Curves", text, _figure(found)))
    rows = "".join(
        f"<tr><td>{html.escape(setting.name)}</td><td class=number>{len(setting.runs)}"
        f"</td><td class=number>{_said(setting)}</td></tr>"
        for setting in found.settings
    )
    parts.append(
        "<section><h2>Settings</h2><p class=soft>Best first.</p><div class=scroll>"
        "<table class=sorts><thead><tr><th>setting</th><th class=number>seeds</th>"
        f"<th class=number>{html.escape(found.metric)}</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )
    if found.pairs:
        said = "".join(
            f"<p>{html.escape(_sentence(pair, found.metric))}.</p>"
            for pair in found.pairs
        )
        parts.append(f"<section><h2>In pairs of one seed</h2>{said}</section>")
    return "".join(parts)


def _figure(found: Comparison):
    figure = plotly().Figure()
    for index, setting in enumerate(found.settings):
        steps, mean, spread = _band(setting)
        colour = PALETTE[index % len(PALETTE)]
        if spread.any():
            figure.add_scatter(
                x=[*steps, *steps[::-1]], y=[*(mean + spread), *(mean - spread)[::-1]],
                fill="toself", fillcolor=colour, opacity=0.18, mode="lines",
                line={"width": 0}, hoverinfo="skip", showlegend=False,
            )  # fmt: skip
        figure.add_scatter(x=steps, y=mean, mode="lines", name=setting.name,
                           line={"color": colour, "width": 2.2})  # fmt: skip
    figure.update_xaxes(title="step", rangemode="tozero")
    figure.update_yaxes(title=found.metric)
    figure = dress(figure, height=460)
    legend = {"orientation": "h", "x": 0, "y": -0.22, "font": FONT}
    return figure.update_layout(legend=legend)


def _picture(path: Path, found: Comparison) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for index, setting in enumerate(found.settings):
        steps, mean, spread = _band(setting)
        colour = PALETTE[index % len(PALETTE)]
        axes.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2)
        label = f"{setting.name} ({len(setting.runs)})"
        axes.plot(steps, mean, color=colour, lw=1.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(found.metric)
    axes.grid(color="0.9", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if len(found.settings) <= 12:
        axes.legend(frameon=False)
    with files.draft(path) as part:
        figure.savefig(part, format="png")
