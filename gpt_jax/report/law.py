"""scaling.html: a miniseries, its law, the line of best compute, what was predicted."""

import html
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.report import page
from gpt_jax.scaling import SURE, Law, Point, optimal

WIDE = 30.0  # how far beyond the largest run the line of best compute goes


def write(out: Path, found: Mapping[str, Any]) -> str:
    """Writes the page of what `scaling.climb` has found.

    Returns:
      "", or what to do where plotly, which the page needs, is not installed.
    """
    if missing := page.needs():
        return missing
    points = [Point(*one) for one in found["points"]]
    law, laws = Law(**found["law"]), [Law(*one) for one in found["laws"]]
    body = [
        _head(found, points),
        _cards(found),
        page.section(
            "Loss over tokens",
            "A point is a run that has decayed, a line the law for its size. The star "
            "is the run that was held out, its bar what was predicted for it.",
            _curves(found, points, law),
        ),
        page.section(
            "Where compute is best spent",
            "Parameters and tokens of the least loss for each compute 6 N D, with the "
            "95 % interval of the parameters. Beyond the points it is a guess.",
            _optimum(points, law, laws),
        ),
        _table(found),
    ]
    page.save(out / "scaling.html", f"Scaling {out.name}", "".join(body))
    return ""


def _head(found: Mapping[str, Any], points: list[Point]) -> str:
    sizes = len({point.parameters for point in points})
    return (
        "<h1>Scaling law</h1><p class=soft>L(N, D) = E + A / N<sup>alpha</sup> + B / "
        f"D<sup>beta</sup>, fitted to {len(points)} runs of {sizes} sizes (Hoffmann et "
        "al. 2022, section 3.3)</p>"
    )


def _cards(found: Mapping[str, Any]) -> str:
    one = found["held_out"]
    low, high = one["interval"]
    cards = [("best", f"{one['predicted']:.4f}", "predicted for the run held out")]
    cards.append(("", f"{low:.4f} to {high:.4f}", "its 95 % interval"))
    if "loss" in one:
        inside = "inside" if low <= one["loss"] <= high else "outside"
        cards.append(("", f"{one['loss']:.4f}", f"the truth, {inside}"))
    return "<div class=cards>" + "".join(
        f'<div class="card {kind}"><b>{html.escape(value)}</b>'
        f"<span>{html.escape(label)}</span></div>"
        for kind, value, label in cards
    ) + "</div>"  # fmt: skip


def _curves(found: Mapping[str, Any], points: list[Point], law: Law) -> Any:
    graph = importlib.import_module("plotly.graph_objects")
    drawn, one = graph.Figure(), found["held_out"]
    tokens = [point.tokens for point in points]
    reach = np.geomspace(min(tokens) / 1.3, max(*tokens, one["tokens"]) * 1.3, 60)
    sizes = sorted({point.parameters for point in points})
    for place, size in enumerate([*sizes, one["parameters"]]):
        ink = f"hsl({210 + 130 * place / len(sizes):.0f},55%,48%)"
        mine = [point for point in points if point.parameters == size]
        name = f"{size:,.0f}"
        drawn.add_scatter(
            x=reach, y=law(size, reach), mode="lines", name=name,
            line={"color": ink, "width": 1.4}, showlegend=not mine,
        )  # fmt: skip
        drawn.add_scatter(
            x=[point.tokens for point in mine], y=[point.loss for point in mine],
            mode="markers", name=name, marker={"color": ink, "size": 8},
            showlegend=bool(mine),
        )  # fmt: skip
    low, high = one["interval"]
    value = one["predicted"]
    bars = {"array": [high - value], "arrayminus": [value - low], "color": "#D1495B"}
    drawn.add_scatter(
        x=[one["tokens"]], y=[value], mode="markers", name="predicted",
        marker={"color": "#D1495B", "symbol": "line-ew-open", "size": 14},
        error_y={"type": "data", "symmetric": False, **bars},
    )  # fmt: skip
    if "loss" in one:
        drawn.add_scatter(
            x=[one["tokens"]], y=[one["loss"]], mode="markers", name="truth",
            marker={"color": "#D1495B", "symbol": "star", "size": 13},
        )  # fmt: skip
    drawn.update_layout(
        template="plotly_white", height=430, legend_title_text="parameters",
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
    )  # fmt: skip
    drawn.update_xaxes(type="log", title="training tokens")
    drawn.update_yaxes(title="val_loss")
    return drawn


def _optimum(points: list[Point], law: Law, laws: list[Law]) -> Any:
    graph = importlib.import_module("plotly.graph_objects")
    spent = [6 * point.parameters * point.tokens for point in points]
    flops = np.geomspace(min(spent), max(spent) * WIDE, 40)
    each = np.array([[optimal(one, c)[0] for c in flops] for one in laws])
    low, high = np.percentile(each, SURE, axis=0)
    best = [optimal(law, c) for c in flops]
    drawn = graph.Figure()
    drawn.add_scatter(
        x=[*flops, *flops[::-1]], y=[*high, *low[::-1]], fill="toself",
        fillcolor="rgba(59,111,182,.15)", line={"width": 0}, showlegend=False,
    )  # fmt: skip
    for name, values in zip(("parameters", "tokens"), zip(*best)):
        drawn.add_scatter(x=flops, y=values, mode="lines", name=name)
    drawn.add_scatter(
        x=spent, y=[point.parameters for point in points], mode="markers",
        marker={"color": "#65707F", "size": 5}, name="the runs",
    )  # fmt: skip
    drawn.update_layout(
        template="plotly_white", height=380, margin={"l": 60, "r": 20, "t": 20, "b": 50}
    )
    drawn.update_xaxes(type="log", title="compute, FLOPs")
    drawn.update_yaxes(type="log")
    return drawn


def _table(found: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{name}</th><td class=number>{value:.4g}</td><td class=number>"
        f"{found['intervals'][name][0]:.4g} to {found['intervals'][name][1]:.4g}</td>"
        "</tr>"
        for name, value in found["law"].items()
    )
    heads = "<th></th><th class=number>value</th><th class=number>95 % interval</th>"
    return (
        f"<section><h2>The law</h2><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></section>"
    )
