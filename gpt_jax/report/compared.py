"""A comparison of runs as tables, a page and a picture."""

import csv
import html
import io
import json
import os
from pathlib import Path
from urllib.parse import quote

from gpt_jax import files
from gpt_jax.report import compare, looks, page, pictures, scales
from gpt_jax.report import results as tables
from gpt_jax.report.compare import Comparison, Run, Setting
from gpt_jax.report.results import Band

MOST_NAMES = 20  # in the legend of the picture
NAME = 44  # characters of one there


def write(out: Path, found: Comparison) -> str:
    """Writes compare.csv, compare.json, compare.png and compare.html.

    Returns:
      "", or what to do where plotly, which the page needs, is not installed.
    """
    files.write(out / "compare.csv", _csv(found))
    text = json.dumps(compare.plain(found), indent=1)
    files.write(out / "compare.json", f"{text}\n")
    pictures.save(out / "compare.png", _picture(found))
    if missing := page.needs():
        return missing
    page.save(out / "compare.html", "Comparison", _body(out, found))
    return ""


def _csv(found: Comparison) -> str:
    """Returns a row for each run, with all keys that differ."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    columns = ["setting", "run", "state", "seed", "value", "evaluated_at"]
    rows.writerow([*columns, *found.differ])
    for setting in found.settings:
        for seed, run in setting.runs.items():
            value = "" if run.value is None else run.value
            last = run.curve.steps[-1] if run.curve.steps else ""
            keys = [_plain(run, key) for key in found.differ]
            told = [setting.name, run.folder, run.state, seed, value, last]
            rows.writerow([*told, *keys])
    return text.getvalue()


def _plain(run: Run, key: str):
    value = run.keys.get(key)
    return "" if value is None else tables.at({"overrides": {key: value}}, key)


def _band(setting: Setting) -> Band:
    own = compare.counted(setting.runs)
    return tables.band(run.curve for run in own.values())


def _body(out: Path, found: Comparison) -> str:
    count = len(found.settings)
    number = sum(len(setting.runs) for setting in found.settings)
    runs = f"{number} runs, {html.escape(found.metric)}"
    parts = [
        f"<h1>{count} setting{'s' * (count > 1)} compared</h1><p class=soft>{runs}</p>"
    ]
    parts += [f"<p>{html.escape(note)}</p>" for note in found.notes]
    seeded = any(len(setting.runs) > 1 for setting in found.settings)
    text = "Mean over the seeds; the band is the standard error. " if seeded else ""
    text += "Dotted lines are not done. Click a name to hide it."
    parts.append(page.section("Curves", text, _figure(found)))
    against = {pair.b: compare.lead(pair) for pair in found.pairs}
    rows = "".join(_row(out, one, against.get(one.name, "")) for one in found.settings)
    less = [f"less {found.pairs[0].a}"] if found.pairs else [""]
    heads = ["run", "", "told by", found.metric, "seeds", *less, ""]
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    what = "Best first" + ("; mean and 95 % interval. " if seeded else ". ")
    what += html.escape(" ".join(compare.sentences(found)))
    parts.append(
        f"<section><h2>Settings</h2><p class=soft>{what}</p><div class=scroll>"
        f"<table class=sorts><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
        "</table></div></section>"
    )
    return "".join(parts)


def _row(out: Path, setting: Setting, less: str) -> str:
    links = [
        f'<a href="{quote(os.path.relpath(run.folder, out))}/">{number}</a>'
        for number, run in enumerate(setting.runs.values(), start=1)
    ]
    value = "" if setting.mean is None else setting.mean.value
    mark = compare.mark(setting)
    tag = (
        f"<span class='tag {setting.state}'>{html.escape(mark)}</span>" if mark else ""
    )
    return (
        f"<tr><td>{html.escape(setting.name)}</td><td>{' '.join(links)}</td>"
        f"<td>{html.escape(setting.told)}</td>"
        f"<td data-value='{value}'>{compare.said(setting)}</td>"
        f"<td>{len(setting.runs)}</td><td data-value='{less.split(' ')[0]}'>{less}</td>"
        f"<td>{tag}</td></tr>"
    )


def _style(setting: Setting, index: int) -> tuple[str, str]:
    colour, dash = looks.style(index)
    return colour, dash if setting.state == "done" else "dot"


def _figure(found: Comparison):
    figure = looks.plotly().Figure()
    for index, setting in enumerate(found.settings):
        band, (colour, dash) = _band(setting), _style(setting, index)
        if not band.steps:
            continue
        group = {"legendgroup": str(index)}
        if band.error.any():
            figure.add_scatter(**looks.area(band, colour), **group)
        figure.add_scatter(
            x=band.steps, y=band.mean, mode="lines", name=setting.name, **group,
            line={"color": colour, "width": 2.2, "dash": dash},
        )  # fmt: skip
    figure.update_xaxes(title="step", rangemode="tozero")
    figure.update_yaxes(title=found.metric, range=_range(found))
    height = 460 + 18 * max(0, len(found.settings) - 16)
    return looks.dress(figure, height=height)


def _range(found: Comparison) -> list[float] | None:
    """Returns the range of the metric in which the settings that are done differ."""
    values = [s.mean.value for s in found.settings if s.state == "done" and s.mean]
    best = _band(found.settings[0])
    if not values or not best.steps:
        return None
    late = [y for x, y in zip(best.steps, best.mean) if x >= best.steps[-1] / 6]
    low, high = scales.clip_values([*values], found.direction)
    low, high = min([low, *late]), max([high, *late])
    room = 0.06 * (high - low) or 0.05 * max(abs(high), 0.1)
    return [low - room, high + room]


def _picture(found: Comparison):
    figure = pictures.empty(10, max(5, 0.28 * min(len(found.settings), MOST_NAMES)))
    panel = figure.add_subplot()
    for index, setting in enumerate(found.settings):
        band, (colour, dash) = _band(setting), _style(setting, index)
        if not band.steps:
            continue
        low, high = band.mean - band.error, band.mean + band.error
        panel.fill_between(band.steps, low, high, color=colour, alpha=0.2, lw=0)
        name = tables.brief(setting.name, NAME)
        label = f"{name} ({len(setting.runs)})" if len(setting.runs) > 1 else name
        panel.plot(
            band.steps, band.mean, pictures.LINES[dash], color=colour, lw=1.8,
            label=label if index < MOST_NAMES else None,
        )  # fmt: skip
    if ends := _range(found):
        panel.set_ylim(*ends)
    panel.set_xlim(left=0)
    panel.set_xlabel("step")
    panel.set_ylabel(found.metric)
    pictures.dress(panel)
    more = len(found.settings) - MOST_NAMES
    title = f"the best {MOST_NAMES} of {len(found.settings)}" if more > 0 else None
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, title=title)
    return figure
