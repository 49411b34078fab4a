"""What a reader of the page may choose: the numbers of its curves, and its script."""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.report import looks, scales
from gpt_jax.report import results as tables
from gpt_jax.report.results import Axis, Results, Row

MOST_NUMBERS = 400_000  # of all curves, in the page
ALONG = {  # what curves may be drawn over
    "step": "step",
    "tokens": "tokens",
    "bytes": "bytes of text",
    "flops": "FLOPs",
    "seconds": "seconds",
}
NOT_MEASURED = ("step", "tokens", "seconds")


def controls(results: Results, axes: list[Axis], data: dict[str, Any]) -> str:
    """Returns the fields above the curves, as HTML."""
    by = {"": "nothing", **{axis.key: axis.label for axis in axes}}
    along = {key: ALONG[key] for key in ALONG if key in data["along"]}
    shown = {name: name for name in data["metrics"]}
    shown |= {results["metric"]: results["title"]}
    first = axes[0].key if axes else ""
    fields = [
        _choice("metric", "metric", shown, results["metric"]),
        _choice("along", "over", along, "step"),
        _choice("by", "coloured by", by, first),
        "<label>smoothing <input id=smooth type=range min=0 max=0.98 step=0.02 value=0>"
        "</label>",
        "<label><input id=logx type=checkbox> log x</label>",
        "<label><input id=logy type=checkbox> log y</label>",
        '<label>only <input id=only placeholder="words of a name"></label>',
    ]
    return f"<div class=controls>{''.join(fields)}</div>"


def numbers(out: Path, results: Results, axes: list[Axis]) -> dict[str, Any]:
    """Returns what the script draws from, ready for JSON.

    Returns:
      "rows": of each setting its name, status, values of keys as the page writes them,
      "colour": by key, the colour that it has there, and "curves": metric -> [points
      along `along[i]`, means, errors]; "metrics" and "along": what there is.
    """
    rows = scales.drawn(results)
    palettes = {axis.key: looks.colours(results, axis) for axis in axes}
    records = {row["name"]: [tables.record(out / name) for name in _own(results, row)]
               for row in rows}  # fmt: skip
    names = list(dict.fromkeys(
        name for runs in records.values() for run in runs for line in run
        for name in line if name not in NOT_MEASURED
    ))  # fmt: skip
    names.sort(key=lambda name: (name != results["metric"], not name.startswith("val")))
    most = max(8, MOST_NUMBERS // max(1, 4 * len(rows) * len(names)))
    told = []
    for row in rows:
        per_token = {key: row[key] / row["tokens"] for key in ("bytes", "flops")
                     if row[key] and row["tokens"]}  # fmt: skip
        told.append({
            "name": row["name"],
            "status": row["status"],
            "best": row["name"] == results["best"],
            "dash": looks.dash(row),
            "keys": {axis.key: tables.brief(tables.at(row, axis.key)) for axis in axes},
            "colour": {key: colour(row) for key, colour in palettes.items()}
            | {"": looks.colours(results, None)(row)},
            "per_token": per_token,
            "curves": {name: _curve(records[row["name"]], name, most)
                       for name in names},
        })  # fmt: skip
    per_token = [key for key in ("bytes", "flops")
                 if all(key in row["per_token"] for row in told)]  # fmt: skip
    return {
        "metric": results["metric"],
        "title": results["title"],
        "range": scales.curve_range(out, results),
        "last": scales.last_step(rows),
        "red": looks.RED,
        "bars": {
            axis.key: looks.colour_bar(results, axis)
            for axis in axes
            if axis.numeric and tables.valued(results)
        },
        "words": [axis.key for axis in axes if looks.has_legend(axis)],
        "along": ["step", "tokens", "seconds", *per_token],
        "metrics": names,
        "rows": told,
    }


def script(data: dict[str, Any]) -> str:
    """Returns the data and the code that draws it anew, as HTML."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")  # nothing in it ends the element
    return (
        f'<script type="application/json" id=numbers>{text}</script>'
        f"<script>{SCRIPT}</script>"
    )


def _own(results: Results, row: Row) -> list[str]:
    status = {trial["name"]: trial["status"] for trial in results["trials"]}
    done = [name for name in row["trials"] if status[name] == "done"]
    return done or row["trials"]


def _curve(runs: list[list[dict]], name: str, most: int) -> list[Sequence]:
    """Returns steps, tokens, seconds, means and errors of a metric over seeds."""
    known = [{line["step"]: line for line in run if line.get(name) is not None}
             for run in runs]  # fmt: skip
    known = [run for run in known if run]
    steps = sorted(set.intersection(*map(set, known))) if known else []
    if len(steps) > most:
        places = np.unique(np.linspace(0, len(steps) - 1, most).astype(int))
        steps = [steps[place] for place in places]
    values = np.array([[run[step][name] for step in steps] for run in known], float)
    spread = np.zeros(len(steps))
    if len(known) > 1 and steps:
        spread = values.std(axis=0, ddof=1) / math.sqrt(len(known))

    def mean(key: str) -> list[float | None]:
        taken = [[run[step].get(key, 0) for step in steps] for run in known]
        return [_short(x) for x in np.mean(taken, axis=0)] if steps else []

    means = values.mean(axis=0) if steps else spread
    columns = [[_short(x) for x in column] for column in (means, spread)]
    return [steps, mean("tokens"), mean("seconds"), *columns]


def _short(value: float) -> float | None:
    """Returns a number of six digits, so that the page stays small."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _choice(name: str, text: str, choices: dict[str, str], chosen: str) -> str:
    options = "".join(
        f'<option value="{html.escape(key, quote=True)}"'
        f"{' selected' * (key == chosen)}>{html.escape(told)}</option>"
        for key, told in choices.items()
    )
    return f"<label>{text} <select id={name}>{options}</select></label>"


SCRIPT = """
(() => {
const data = JSON.parse(document.getElementById("numbers").textContent);
const at = id => document.getElementById(id), plot = at("curves");
const names = {step: "step", tokens: "tokens", bytes: "bytes of text",
  flops: "FLOPs", seconds: "seconds"};

// The mean of what was before, its weights falling; without a bias towards zero.
const smooth = (ys, share) => {
  let sum = 0, weight = 0;
  return ys.map(y => {
    if (y === null) return null;
    sum = share * sum + (1 - share) * y; weight = share * weight + 1 - share;
    return sum / weight;
  });
};
const places = (row, [steps, tokens, seconds], along) =>
  along === "step" ? steps : along === "seconds" ? seconds :
  along === "tokens" ? tokens : tokens.map(x => x * row.per_token[along]);
const passes = (row, words) => {
  const text = (row.name + " " + Object.values(row.keys).join(" ")).toLowerCase();
  return words.every(word => text.includes(word));
};

function draw() {
  const metric = at("metric").value, along = at("along").value, by = at("by").value;
  const share = +at("smooth").value;
  const words = at("only").value.toLowerCase().split(" ").filter(Boolean);
  const named = new Set(), traces = [];
  for (const row of [...data.rows].reverse()) {
    const curve = row.curves[metric];
    if (!curve[0].length || !passes(row, words)) continue;
    const xs = places(row, curve, along), ys = smooth(curve[3], share);
    const colour = row.best ? data.red : row.colour[by];
    const errors = smooth(curve[4], share);
    if (errors.some(x => x > 0)) traces.push({
      x: [...xs, ...[...xs].reverse()], mode: "lines", line: {width: 0},
      y: [...ys.map((y, i) => y + errors[i]),
          ...ys.map((y, i) => y - errors[i]).reverse()],
      fill: "toself", fillcolor: colour, opacity: .16, hoverinfo: "skip",
      showlegend: false});
    const word = data.words.includes(by) ? row.keys[by] : "";
    const label = row.best ? "best: " + (word || row.name) : word || row.name;
    traces.push({x: xs, y: ys, mode: xs.length > 1 ? "lines" : "lines+markers",
      name: label, line: {color: colour, width: row.best ? 3.2 : 1.6, dash: row.dash},
      opacity: row.best || data.rows.length <= 20 ? 1 : .7,
      legendgroup: label, showlegend: row.best || !!word && !named.has(word),
      hovertemplate: `<b>${row.name}</b> (${row.status})<br>%{x:,.4~g}: %{y:.4f}` +
        "<extra></extra>"});
    if (!row.best) named.add(word);
  }
  if (by in data.bars) traces.push(data.bars[by]);
  const logx = at("logx").checked, logy = at("logy").checked;
  const judged = metric === data.metric && !logy && !words.length;
  const layout = {...plot.layout};
  layout.xaxis = {...layout.xaxis, title: {text: names[along]},
    type: logx ? "log" : "linear", autorange: logx || along !== "step",
    range: logx || along !== "step" ? undefined : [0, data.last]};
  layout.yaxis = {...layout.yaxis,
    title: {text: metric === data.metric ? data.title : metric},
    type: logy ? "log" : "linear", autorange: !judged,
    range: judged ? data.range : undefined};
  Plotly.react(plot, traces, layout);
  for (const line of document.querySelectorAll("tr[data-text]"))
    line.hidden = !words.every(word => line.dataset.text.includes(word));
}
for (const id of ["metric", "along", "by", "smooth", "logx", "logy", "only"])
  at(id).addEventListener("input", draw);
})();
"""
