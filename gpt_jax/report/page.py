"""report.html: one self-contained file, plotly's script inlined."""

import html
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from gpt_jax import files
from gpt_jax.report import figures, pictures
from gpt_jax.report import results as tables
from gpt_jax.report.results import Results, Row

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
.scroll { overflow-x:auto } table { border-collapse:collapse; width:100% }
th,td { text-align:left; padding:6px 12px 6px 0; border-bottom:1px solid var(--line);
  white-space:nowrap; font-variant-numeric:tabular-nums }
th { color:var(--soft); font-weight:600; font-size:13px; cursor:pointer }
td.number,th.number { text-align:right }
td.why { white-space:normal; color:var(--soft); font-size:13px }
tr.best td { font-weight:600; color:var(--red) }
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

MOST_ROWS = 2000  # of the table; results.csv has all


def write(out: Path, results: Results) -> None:
    """Writes results.csv, results.json, report.html, curves.png and slices.png.

    Raises:
      ValueError: plotly is not installed.
    """
    tables.tables(out, results)
    pictures.write(out, results)
    save(out / "report.html", f"Sweep {results['sweep']}", sections(out, results))


def sections(out: Path, results: Results) -> str:
    """Returns the body of a sweep's report."""
    rows = tables.ranked(results)
    parts = [_head(results), _cards(results, rows), _command(results)]
    drawn = [row for row in rows if row["step"]]
    if drawn:
        text = (
            "Every line is a trial; red is the best, dotted ones were stopped early. "
            "Drag to zoom, double-click to go back."
        )
        parts.append(section("Curves", text, figures.curves(out, results)))
    if len(tables.done(results)) >= 2:
        parts += _comparisons(results)
    parts.append(_table(results, rows))
    return "".join(parts)


def _comparisons(results: Results) -> list[str]:
    """Returns the figures that need several finished trials."""
    metric, parts = results["metric"], []
    if (lines := figures.interaction(results)) is not None:
        parts.append(
            section("Where the optimum lies", "A star marks the best of a line.", lines)
        )
    text = f"{metric} over each key, the other keys as they come; the star is the best."
    parts.append(section("Slices", text, figures.slices(results)))
    if len(results["keys"]) > 1:
        text = (
            "How much each key decides whether a trial is among the best (PED-ANOVA)."
            if results["importance"]
            else "The share of the differences between trials (their ranks) that each "
            "key explains alone; what is missing to 100 % are combinations and chance."
        )
        parts.append(section("Importance", text, figures.importances(results)))
    if len(results["keys"]) > 2:
        text = "A line is a trial; drag along an axis to keep those that pass there."
        parts.append(section("All keys at once", text, figures.parallel(results)))
    return parts


def section(title: str, text: str, figure: Any) -> str:
    """Returns a titled figure."""
    drawn = figure.to_html(
        include_plotlyjs=False,
        full_html=False,
        config={"displayModeBar": False, "responsive": True},
    )
    words = f"<h2>{html.escape(title)}</h2><p class=soft>{html.escape(text)}</p>"
    return f"<section>{words}{drawn}</section>"


def save(path: Path, title: str, body: str) -> None:
    """Writes a page with plotly's script in it.

    Raises:
      ValueError: plotly is not installed.
    """
    if importlib.util.find_spec("plotly") is None:
        raise ValueError("a report needs the package plotly: pip install plotly")
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
    return (
        f"<h1>Sweep {html.escape(results['sweep'])}</h1>"
        f"<p class=soft>{results['size']} trials of {html.escape(results['config'])}"
        f"{also}{how}</p>"
    )


def _cards(results: Results, rows: list[Row]) -> str:
    best = next((row for row in rows if row["name"] == results["best"]), None)
    cards = []
    if best:
        cards += [("best", f"{best['value']:.4f}", f"best {results['metric']}")]
        for key, short in list(results["keys"].items())[:2]:
            value = best["overrides"][key]
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            cards.append(("", text, f"its {short}"))
    ended = [row for row in rows if row["status"] not in ("running", "waiting")]
    said = [
        f"{number} {status}"
        for status in tables.STATUSES
        if (number := sum(row["status"] == status for row in rows))
    ]
    cards.append(("", f"{len(ended)} of {results['size']}", ", ".join(said)))
    steps = sum(row["step"] for row in rows)
    wanted = sum(row["steps"] for row in ended)
    share = (
        f", {steps / wanted:.0%} of unpruned" if results["pruner"] and wanted else ""
    )
    time = _time(sum(row["seconds"] for row in rows))
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


def _table(results: Results, rows: list[Row]) -> str:
    keys = results["keys"]
    heads = ["status", *keys.values(), results["metric"], "at step", "steps", "time"]
    head = "".join(
        f"<th{' class=number' if index else ''}>{html.escape(text)}</th>"
        for index, text in enumerate(heads)
    )
    lines = []
    for row in rows[:MOST_ROWS]:
        cells = [f"<td><span class='tag {row['status']}'>{row['status']}</span></td>"]
        cells += [_cell(row["overrides"].get(key)) for key in keys]
        cells += [_cell(row["value"], "{:.4f}"), _cell(row["at"], "{:,}")]
        cells += [_cell(row["step"], "{:,}")]
        cells += [f"<td class=number data-value={row['seconds']:.1f}>"
                  f"{_time(row['seconds'])}</td>"]  # fmt: skip
        best = " class=best" if row["name"] == results["best"] else ""
        title = html.escape(row["name"])
        lines.append(f"<tr{best} title='{title}'>{''.join(cells)}</tr>")
        if row["status"] in ("failed", "diverged"):
            why = html.escape(row["reason"])
            span = len(heads) - 1
            lines.append(f"<tr><td></td><td class=why colspan={span}>{why}</td></tr>")
    return (
        "<section><h2>Trials</h2><p class=soft>Best first; click a head to sort.</p>"
        f"<div class=scroll><table class=sorts><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _cell(value: Any, form: str = "") -> str:
    if value is None:
        return "<td class=number></td>"
    text = form.format(value) if form else _brief(value)
    number = f" data-value={value}" if isinstance(value, int | float) else ""
    return f"<td class=number{number}>{html.escape(text)}</td>"


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) // 60 % 60} min"
