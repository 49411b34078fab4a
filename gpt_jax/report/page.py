"""report.html: one self-contained file, plotly's script inlined."""

import html
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gpt_jax import files
from gpt_jax.criterion import Criterion
from gpt_jax.report import explore, figures, optimum, pictures, scales
from gpt_jax.report import results as tables
from gpt_jax.report.importance import importance
from gpt_jax.report.results import Axis, Results, Row

STYLE = """
:root { --ink:#1F2933; --soft:#65707F; --line:#E3E7ED; --blue:#3B6FB6; --red:#D1495B; }
* { box-sizing:border-box }
body { margin:0; background:#F6F7F9; color:var(--ink);
  font:15px/1.5 Inter,system-ui,"Segoe UI",Helvetica,Arial,sans-serif }
main { max-width:1120px; margin:0 auto; padding:36px 24px 80px }
h1 { font-size:28px; margin:0 0 4px; letter-spacing:-.01em }
h2 { font-size:18px; margin:0 0 2px }
p { margin:0 0 8px } .soft { color:var(--soft) }
section { background:#fff; border:1px solid var(--line); border-radius:12px;
  padding:20px 24px; margin-top:20px }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(160px,1fr));
  gap:14px; margin-top:22px }
.card { background:#fff; border:1px solid var(--line); border-radius:12px;
  padding:14px 18px }
.card b { display:block; font-size:22px; letter-spacing:-.01em; overflow-wrap:anywhere }
.card span { color:var(--soft); font-size:13px }
.card.best b { color:var(--red) }
.command { display:flex; gap:12px; align-items:flex-start; margin-top:10px }
pre { flex:1; margin:0; padding:12px 14px; background:#F1F3F6; border-radius:8px;
  white-space:pre-wrap; overflow-wrap:anywhere;
  font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace }
pre span { display:inline-block }
button { border:1px solid var(--line); background:#fff; border-radius:8px;
  padding:8px 14px; font:inherit; cursor:pointer }
button:hover { border-color:var(--blue); color:var(--blue) }
.controls { display:flex; flex-wrap:wrap; gap:8px 18px; margin:10px 0 2px;
  font-size:13px; color:var(--soft); align-items:center }
.controls label { display:flex; gap:6px; align-items:center }
.controls select,.controls input { font:inherit; color:var(--ink);
  accent-color:var(--blue) }
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100% }
th,td { text-align:left; padding:6px 12px 6px 0; border-bottom:1px solid var(--line);
  white-space:nowrap; font-variant-numeric:tabular-nums }
th { color:var(--soft); font-weight:600; font-size:13px; cursor:pointer }
td.number,th.number { text-align:right }
th.why:not(:first-child) { padding-left:18px }
td.why { white-space:normal; color:var(--soft); font-size:13px; min-width:200px;
  padding-left:18px }
tr.best td { font-weight:600; color:var(--red) }
tr.of-failed td,tr.of-diverged td,tr.of-pruned td { color:var(--soft) }
a { color:var(--blue) }
.tag { display:inline-block; border-radius:99px; padding:0 9px; font-size:12.5px }
.done { background:#E4F2EA; color:#2D6A4F } .pruned { background:#EEF1F5; color:#566 }
.diverged,.failed { background:#FBE7EA; color:#A4283B }
.running,.waiting { background:#E7EEF9; color:#2B4C9B }
"""

SCRIPT = """
for (const button of document.querySelectorAll("button.copy"))
  button.onclick = async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "copied";
    setTimeout(() => button.textContent = "copy", 1500);
  };
for (const table of document.querySelectorAll("table.sorts"))
  table.querySelectorAll("th").forEach((head, column) => head.onclick = () => {
    const up = head.dataset.up = head.dataset.up === "1" ? "0" : "1";
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)], number = x !== "" && y !== "" && !isNaN(x - y);
      if ((x === "") !== (y === "")) return x === "" ? 1 : -1;
      return (number ? x - y : x.localeCompare(y)) * (up === "1" ? 1 : -1);
    });
    table.tBodies[0].append(...rows);
  });
"""

SIZES = {"parameters": "parameters", "tokens": "tokens", "flops": "FLOPs"}
MOST_ROWS = 2000  # of the table; results.csv has all


def write(out: Path, results: Results) -> str:
    """Writes the tables, report.html and pictures.

    Returns:
      "", or what to do where plotly, which the page needs, is not installed.
    """
    axes = tables.axes(results)
    shares = importance(results, axes)
    axes.sort(key=lambda axis: -shares.get(axis.key, 0.0))
    tables.tables(out, results)
    tables.curves(out, results)
    pictures.write(out, results, axes)
    if missing := needs():
        return missing
    body = sections(out, results, axes, shares)
    save(out / "report.html", f"Sweep {results['sweep']}", body)
    return ""


def needs() -> str:
    """Returns what to do where plotly is not installed, else ""."""
    if importlib.util.find_spec("plotly") is None:
        return "is not written, it needs the package plotly: pip install plotly"
    return ""


def sections(
    out: Path, results: Results, axes: list[Axis], shares: dict[str, float]
) -> str:
    """Returns the body of a sweep's report; the first axis gives curves a colour."""
    parts = [_head(results), _cards(results), _command(results)]
    if scales.drawn(results):
        seeds = (
            "a setting, the mean over its seeds; the band is the standard error"
            if tables.has_seeds(results)
            else "a trial"
        )
        text = (
            f"Every line is {seeds}. Red is the best, dotted lines were stopped early, "
            "grey ones diverged or failed. Drag to zoom, double-click to go back."
        )
        drawn = figures.curves(out, results, axes[0] if axes else None)
        data = explore.numbers(out, results, axes)
        above = explore.controls(results, axes, data)
        parts.append(section("Curves", text, drawn, name="curves", above=above))
        parts.append(explore.script(data))
    if (found := figures.schedules(results)) is not None:
        text = (
            "The numbers that the weights of each member were trained with, those "
            "from before it became a copy included. Red is the best."
        )
        parts.append(section("What evolved", text, found))
    if axes and len(tables.valued(results)) >= 2 and not results["evolved"]:
        parts += _comparisons(results, axes, shares)
    parts.append(_table(results))
    return "".join(parts)


def _comparisons(
    results: Results, axes: list[Axis], shares: dict[str, float]
) -> list[str]:
    """Returns the figures that need several finished settings."""
    metric, parts = results["title"], []
    if (lines := figures.interaction(results, axes)) is not None:
        told = optimum.told(results, axes)
        text = f"A star marks the best of a line; other keys are at their best. {told}."
        parts.append(section("Where the optimum lies", text, lines))
    text = f"{metric} over each key, the other keys as they come; the star is the best."
    for axis in axes:
        if axis.tied:
            text += f" {' and '.join(axis.tied)} went with {axis.label}."
    if any(row["status"] == "diverged" for row in results["settings"]):
        text += " A cross marks settings that diverged."
    if tables.has_seeds(results):
        text += " A point is the mean of a setting's seeds, its bar the 95 % interval."
    parts.append(section("Slices", text, figures.slices(results, axes)))
    if (costs := figures.tradeoffs(results)) is not None:
        text = "The line is the Pareto front: what nothing is as good as for less."
        parts.append(section("What it costs", text, costs))
    if len(axes) > 1 and shares:
        text = (
            "How much of the differences in rank between settings a key explains, less "
            "what chance would. What is missing to 100 % is chance and combinations."
        )
        if chance := [axis.label for axis in axes if axis.key not in shares]:
            text += f" Not told from chance: {', '.join(chance)}."
        parts.append(section("Importance", text, figures.importances(shares, axes)))
    if len(axes) > 2:
        text = "A line is a setting; drag along an axis to keep those that pass there."
        parts.append(section("All keys at once", text, figures.parallel(results, axes)))
    return parts


def section(
    title: str, text: str, figure: Any, name: str | None = None, above: str = ""
) -> str:
    """Returns a titled figure, with a name for scripts and what stands above it."""
    drawn = figure.to_html(
        include_plotlyjs=False,
        full_html=False,
        div_id=name,
        config={"displayModeBar": False, "responsive": True},
    )
    words = f"<h2>{html.escape(title)}</h2><p class=soft>{html.escape(text)}</p>"
    return f"<section>{words}{above}{drawn}</section>"


def save(path: Path, title: str, body: str) -> None:
    """Writes a page with plotly's script in it; `needs` says whether that is there."""
    script = importlib.import_module("plotly.offline").get_plotlyjs()
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<script>{script}</script></head><body><main>{body}</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )
    files.write(path, text)


def _head(results: Results) -> str:
    fixed = ", ".join(f"{key}={value}" for key, value in results["fixed"].items())
    also = f" with {html.escape(fixed)}" if fixed else ""
    how = f", pruned by {results['pruner']['name']}" if results["pruner"] else ""
    counts = Criterion(at=results["at"]).words
    how += f"; of each the {counts} counts" if counts else ""
    return (
        f"<h1>Sweep {html.escape(results['sweep'])}</h1>"
        f"<p class=soft>{results['size']} trials of {html.escape(results['config'])}"
        f"{also}{how}</p>"
    )


def _cards(results: Results) -> str:
    best, trials = tables.best_of(results), results["trials"]
    cards = []
    if best:
        sure = f" {tables.of_seeds(best)}" if best["low"] is not None else ""
        cards += [("best", f"{best['value']:.4f}", f"best {results['title']}{sure}")]
        for key, short in list(results["keys"].items())[:2]:
            cards.append(("", tables.brief(tables.at(best, key)), f"its {short}"))
    ended = [row for row in trials if row["status"] not in ("running", "waiting")]
    said = [
        f"{number} {status}"
        for status in tables.STATUSES
        if (number := sum(row["status"] == status for row in trials))
    ]
    cards.append(("", f"{len(ended)} of {results['size']}", ", ".join(said)))
    steps = sum(row["step"] for row in trials)
    wanted = sum(row["steps"] for row in ended)
    share = (
        f", {steps / wanted:.0%} of unpruned" if results["pruner"] and wanted else ""
    )
    time = _time(sum(row["seconds"] for row in trials))
    cards.append(("", f"{steps:,}", f"steps trained{share}, {time} in all"))
    return "<div class=cards>" + "".join(
        f'<div class="card {kind}"><b>{html.escape(value)}</b>'
        f"<span>{html.escape(label)}</span></div>"
        for kind, value, label in cards
    ) + "</div>"  # fmt: skip


def _command(results: Results) -> str:
    if not results["command"]:
        return ""
    words = " ".join(  # a flag is not broken at its dashes
        f"<span>{html.escape(word)}</span>" for word in results["command"].split(" ")
    )
    return (
        "<section><h2>Train the best one</h2><div class=command>"
        f"<pre>{words}</pre>"
        "<button class=copy>copy</button></div></section>"
    )


def _table(results: Results) -> str:
    keys, seeded = results["keys"], tables.has_seeds(results)
    heads = ["status", *keys.values(), results["title"]]
    heads += ["95 % interval", "seeds"] if seeded else []
    sizes = {key: told for key, told in SIZES.items()
             if len({row[key] for row in results["settings"]}) > 1}  # fmt: skip
    heads += [*results["after"], "at step", "steps run", *sizes.values(), "time", "run"]
    told = any(row["reason"] for row in results["settings"])
    heads += ["why"] if told else []
    words = ("status", "why")
    head = "".join(
        f"<th class={'why' if text in words else 'number'}>{html.escape(text)}</th>"
        for text in heads
    )
    lines = []
    for row in results["settings"][:MOST_ROWS]:
        cells = [f"<td><span class='tag {row['status']}'>{row['status']}</span></td>"]
        cells += [_cell(tables.at(row, key)) for key in keys]
        cells += [_cell(row["value"], "{:.4f}")]
        if seeded:
            cells += [_interval(row), _cell(f"{row['n']} of {row['seeds']}")]
        cells += [_cell(row["after"][name], "{:.4g}") for name in results["after"]]
        cells += [_cell(row["at"], "{:,}"), _cell(row["step"], "{:,.0f}")]
        cells += [_amount(row[key]) for key in sizes]
        cells += [f"<td class=number data-value={row['seconds']:.1f}>"
                  f"{_time(row['seconds'])}</td>", _links(row)]  # fmt: skip
        if told:
            cells += [f"<td class=why>{html.escape(row['reason'])}</td>"]
        kind = "best" if row["name"] == results["best"] else f"of-{row['status']}"
        title = html.escape(row["name"], quote=True)
        text = html.escape(_words(row, keys), quote=True)
        lines.append(
            f'<tr class="{kind}" title="{title}" data-text="{text}">'
            f"{''.join(cells)}</tr>"
        )
    more = len(results["settings"]) - MOST_ROWS
    rest = f" {more:,} more are in results.csv." if more > 0 else ""
    what = "A row is a setting, the mean over its seeds. " if seeded else ""
    return (
        f"<section><h2>Trials</h2><p class=soft>{what}Best first; click a head to "
        f"sort.{rest}</p><div class=scroll><table class=sorts><thead><tr>{head}</tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _words(row: Row, keys: Mapping[str, str]) -> str:
    """Returns what the filter of the page looks for a word in."""
    values = [tables.brief(tables.at(row, key)) for key in keys]
    return " ".join([row["name"], *values]).lower()


def _interval(row: Row) -> str:
    if row["low"] is None:
        return "<td class=number></td>"
    reach = row["high"] - row["low"]
    text = f"{row['low']:.4f} to {row['high']:.4f}"
    return f"<td class=number data-value={reach}>{text}</td>"


def _links(row: Row) -> str:
    """Returns links to the run folders of a setting, which lie beside the page."""
    linked = [
        f'<a href="{quote(name)}/" title="{html.escape(name, quote=True)}">{text}</a>'
        for text, name in enumerate(row["trials"], start=1)
    ]
    return f"<td class=number>{' '.join(linked)}</td>"


def _amount(value: float | None) -> str:
    """Returns the cell of a large number: 786 K, 4.83 G."""
    if value is None:
        return _cell(None)
    return f"<td class=number data-value={value}>{tables.amount(value)}</td>"


def _cell(value: Any, form: str = "") -> str:
    if value is None:
        return "<td class=number></td>"
    text = form.format(value) if form else tables.brief(value)
    is_number = tables.numeric([value])
    number = f" data-value={value}" if is_number else ""
    return f"<td class=number{number}>{html.escape(text)}</td>"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) // 60 % 60} min"
