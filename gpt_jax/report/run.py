"""report.html of one run: its curves, its samples, its facts, what to do next.

It looks like a sweep's page and needs nothing: its curves are drawn by its own script.
"""

import html
import json
import logging
import math
import platform
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax import commands, configs, files, metrics, model, runs, screen, tokenizers
from gpt_jax.report.page import SCRIPT, STYLE

log = logging.getLogger(__name__)

MACHINE = "machine.json"  # where and with what a run was last trained
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
SENSITIVITY = "sensitivity.json"  # what experiments.sensitivity has found
MOST_POINTS = 1500  # of a curve; of more, each point is a mean
# Title, unit, and the numbers that are drawn.
CURVES = (
    ("Loss", "nats a token", ("train_loss", "val_loss")),
    ("Bits per byte", "bits", ("train_bpb", "val_bpb")),
    ("Reward", "", ("train_reward", "val_accuracy")),
    ("Margin", "nats, times beta", ("train_margin", "val_margin")),
    ("Right", "share", ("train_accuracy", "val_accuracy")),
    ("Learning rate", "", ("lr",)),
    ("Gradient norm", "before clipping", ("grad_norm",)),
    ("Speed", "tokens a second", ("tokens_per_second",)),
    ("Updates skipped", "so far", ("skipped",)),
    ("Words of the samples that are words", "share", ("sample_words",)),
)
# What a parameter is a part of, by its path; the first that fits.
PARTS = (
    ("embedding of tokens", r"^embed/"),
    ("embedding of positions", r"^positions/"),
    ("attention", r"/attn/"),
    ("MLPs", r"/mlp/"),
    ("norms", r"norm|post\d"),
    ("head", r"^(head|classifier)/"),
)
# Keys that say where and how often, and not what is trained.
WHERE = re.compile(rf"({'|'.join(runs.WHERE)})")


def note_machine(folder: str | Path) -> None:
    """Notes which machine and versions a run has just been trained with."""
    devices = jax.devices()
    named = re.search(r"model name\s*:\s*(.+)", files.cpu())
    processor = named[1] if named else platform.machine()
    found = {
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processor": f"{processor}, {screen.count(files.cores(), 'core')}",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }
    files.write_json(Path(folder) / MACHINE, found)


def of_run(folder: str | Path) -> Path | None:
    """Notes the machine and writes the page; one that cannot be made ends nothing.

    Returns:
      The page's path; None where there is none.
    """
    try:
        note_machine(folder)
        return write(folder)
    except Exception as error:  # whatever disks and other people's files raise
        why = f"{type(error).__name__}: {error}"
        log.warning("the report of %s could not be written: %s", folder, why)
        return None


def write(folder: str | Path, path: str | Path | None = None) -> Path:
    """Writes the page, by default as report.html in the run folder.

    Raises:
      ValueError: the folder is no run.
      FileNotFoundError: the run has no record.
    """
    folder = Path(folder)
    config = runs.read_config(folder)
    rows = metrics.read(folder)
    tokenizer = tokenizers.load(folder / "tokenizer.json")
    cfg = runs.model_config(config, tokenizer, runs.read_classes(folder))
    body = [
        _head(folder, config, rows),
        _cards(cfg, rows),
        *_curves(rows),
        _sensitivity(folder),
        _samples(folder, rows),
        _next(folder, config),
        _facts(folder, config, cfg, tokenizer),
    ]
    data = json.dumps(curves(rows)).replace("</", "<\\/")
    name = html.escape(folder.resolve().name)
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Run {name}</title><style>{STYLE}{MORE_STYLE}</style></head><body>"
        f"<main>{''.join(body)}</main><div id=tip hidden></div>"
        f'<script type="application/json" id="curves">{data}</script>'
        f"<script>{SCRIPT}{DRAW}</script></body></html>\n"
    )
    path = Path(path) if path else folder / "report.html"
    files.write(path, text)
    return path


def curves(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what is drawn: title, unit, and lines of (steps, values).

    Of more than MOST_POINTS points each that is drawn is the mean of several
    neighbours, which `each` counts.
    """
    found = []
    for title, unit, names in CURVES:
        lines = []
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            points = [(x, y) for x, y in points if y is not None]
            if not points or (name == "skipped" and not points[-1][1]):
                continue
            steps, values, each = _thinned(np.array(points, float))
            line = {"name": name, "x": steps, "y": values, "each": each}
            lines.append(line)
        if lines:
            found.append({"title": title, "unit": unit, "lines": lines})
    return found


def nearest(config) -> tuple[str, list[str]]:
    """Returns the config file that a run's config is nearest to, and what differs.

    Of keys that decide nothing that is computed, and of what a tokenizer or a text
    decides, nothing is said.
    """
    best = ("", [""] * 10_000)
    for name in commands.known(commands.CONFIGS):
        try:
            recipe = configs.load(name)
        except Exception:  # one that needs an option says so with any error
            continue
        if recipe.task.name != config.task.name:
            continue
        lines = [
            line
            for line in runs.difference(recipe, config)
            if not WHERE.fullmatch(line.partition(":")[0])
        ]
        if len(lines) < len(best[1]):
            best = (name, lines)
    return best if best[0] else ("", [])


def parts(cfg: model.GPTConfig) -> dict[str, int]:
    """Returns how many numbers each part of a model has."""
    found: Counter[str] = Counter()
    for path, weight in model.declared(replace(cfg, vocab_multiple=1)).items():
        of = (part for part, pattern in PARTS if re.search(pattern, path))
        found[next(of, "other")] += math.prod(weight.shape)
    names = [*(name for name, _ in PARTS), "other"]
    return {name: found[name] for name in names if found[name]}


def samples(folder: str | Path) -> list[tuple[int, list[str]]]:
    """Returns (step, texts) of samples.md."""
    path = Path(folder) / "samples.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.findall(r"^## Step (\d+)\n(.*?)^<!-- end -->\n", text, re.M | re.S)
    fence = re.compile(r"^````text\n(.*?)\n````$", re.M | re.S)
    return [(int(step), fence.findall(body)) for step, body in found]


def _thinned(points_N2: np.ndarray) -> tuple[list[int], list[float], int]:
    each = -(-len(points_N2) // MOST_POINTS)
    groups = [points_N2[i : i + each] for i in range(0, len(points_N2), each)]
    steps = [int(group[-1, 0]) for group in groups]
    return steps, [float(f"{group[:, 1].mean():.6g}") for group in groups], each


def _head(folder: Path, config, rows) -> str:
    ended = runs.ended(folder)
    last = max((row["step"] for row in rows), default=0)
    how = f"ended after step {last:,}: {ended[0]}" if ended else f"step {last:,}"
    told = f"Task {config.task.name}, {how} of {config.steps:,}."
    name = html.escape(folder.resolve().name)
    return f"<h1>Run {name}</h1><p class=soft>{html.escape(told)}</p>"


def _cards(cfg: model.GPTConfig, rows) -> str:
    cards = []

    def last(name: str):
        return next((r[name] for r in reversed(rows) if r.get(name) is not None), None)

    since = metrics.since(rows)
    losses = [
        (row["val_loss"], row["step"])
        for row in rows
        if row.get("val_loss") is not None and row["step"] >= since
    ]
    if losses:
        value, step = min(losses)
        cards.append(("best", f"{value:.4f}", f"best val_loss, at step {step:,}"))
    if (bits := last("val_bpb")) is not None:
        cards.append(("", f"{bits:.4f}", "last val_bpb, bits per byte"))
    if (right := last("val_accuracy")) is not None:
        cards.append(("", f"{right:.1%}", "last val_accuracy"))
    cards.append(("", f"{model.count(cfg):,}", "parameters"))
    if tokens := last("tokens"):
        cards.append(("", f"{tokens:,}", "tokens trained on"))
    if seconds := last("seconds"):
        cards.append(("", screen.duration(seconds), "of training"))
    return "<div class=cards>" + "".join(
        f'<div class="card {kind}"><b>{html.escape(value)}</b>'
        f"<span>{html.escape(label)}</span></div>"
        for kind, value, label in cards
    ) + "</div>"  # fmt: skip


def _curves(rows) -> list[str]:
    found = curves(rows)
    if not found:
        return ["<section><h2>Curves</h2><p class=soft>Nothing was recorded.</section>"]
    drawn = "".join(
        f"<figure><figcaption><b>{html.escape(one['title'])}</b> "
        f"<span class=soft>{html.escape(one['unit'])}</span></figcaption>"
        f'<svg class=curve role=img aria-label="{html.escape(one["title"])}"></svg>'
        "</figure>"
        for one in found
    )
    each = max(line["each"] for one in found for line in one["lines"])
    mean = f" A point is the mean of up to {each}." if each > 1 else ""
    axis = (
        "<label><input type=checkbox id=logx> steps on a logarithmic axis</label>"
        "<label><input type=checkbox id=zero> from 0</label>"
    )
    return [
        f"<section><h2>Curves</h2><p class=soft>Over steps.{mean} Point at one to read "
        f"it.</p><div class=controls>{axis}</div><div class=curves>{drawn}</div>"
        "</section>"
    ]


def _samples(folder: Path, rows) -> str:
    losses = {row["step"]: row["val_loss"] for row in rows if row.get("val_loss")}
    found = samples(folder)
    if not found:
        return ""
    blocks = []
    for number, (step, texts) in enumerate(found):
        loss = f", val_loss {losses[step]:.3f}" if step in losses else ""
        written = "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
        opened = " open" if number == len(found) - 1 else ""
        blocks.append(
            f"<details{opened}><summary>Step {step:,}{loss}</summary>"
            f"{written}</details>"
        )
    return (
        "<section><h2>What it wrote</h2><p class=soft>The same prompt at several steps."
        f"</p>{''.join(blocks)}</section>"
    )


def _sensitivity(folder: Path) -> str:
    """Returns what experiments.sensitivity has found, "" where it was not asked."""
    path = folder / SENSITIVITY
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    knobs = found["knobs"]
    means = [float(np.mean(knob["effects"])) for knob in knobs]
    reach = max((abs(mean) for mean in means), default=0.0) or 1.0
    lines = "".join(_knob(knob, mean / reach) for knob, mean in zip(knobs, means))
    return (
        "<section><h2>Which numbers matter</h2><p class=soft>Change of the final "
        f"{html.escape(found['metric'])} where a number doubles (of betas and momenta: "
        "what is missing to 1), by its slope; the interval is over seeds. Grey: it "
        "holds 0.</p><div class=scroll><table><thead><tr><th></th><th class=number>"
        "value</th><th class=number>change</th><th class=number>95 % interval</th>"
        f"<th></th></tr></thead><tbody>{lines}</tbody></table></div></section>"
    )


def _knob(knob: dict[str, Any], share: float) -> str:
    mean, sure = float(np.mean(knob["effects"])), knob["mean"]
    bounds = f"{sure['low']:+.4f} to {sure['high']:+.4f}" if sure else "one seed"
    known = bool(sure) and not sure["low"] <= 0 <= sure["high"]
    ink = ("var(--red)" if mean > 0 else "var(--blue)") if known else "var(--line)"
    bar = f"background:{ink};width:{max(1, round(120 * abs(share)))}px;height:10px"
    cells = (f"{knob['value']:g}", f"{mean:+.4f}", bounds)
    numbers = "".join(f"<td class=number>{cell}</td>" for cell in cells)
    key = html.escape(knob["key"])
    return f'<tr><th>{key}</th>{numbers}<td><div style="{bar}"></div></td></tr>'


def _next(folder: Path, config) -> str:
    run = f"--run={shlex.quote(str(folder))}"
    prompt = '--prompt="..."'
    if (folder / "classes.json").is_file():
        wanted = [f"{commands.typed('classify')} {run} --text=..."]
    else:
        first = "chat" if "template" in config.task else "sample"
        words = f" {prompt}" if first == "sample" else ""
        serve = f"{commands.typed('serve')} --runs={shlex.quote(str(folder))}"
        look = f"{commands.typed('look')} {run} {prompt}"
        wanted = [f"{commands.typed(first)} {run}{words}", look, serve]
    wanted.append(f"{commands.typed('doctor')} {run}")
    lines = "".join(
        "<div class=command><pre>"
        + " ".join(f"<span>{html.escape(word)}</span>" for word in line.split(" "))
        + "</pre><button class=copy>copy</button></div>"
        for line in wanted
    )
    return f"<section><h2>What next</h2>{lines}</section>"


def _facts(folder: Path, config, cfg: model.GPTConfig, tokenizer) -> str:
    recipe, lines = nearest(config)
    file = f"configs/{recipe}.py" if recipe else "no file of configs/ has this task"
    differing = [("nearest config", file)]
    differing += [tuple(line.split(": ", 1)) for line in lines]
    numbers = [(name, f"{n:,}") for name, n in parts(cfg).items()]
    data = [
        ("source", str(config.data.get("source", ""))),
        ("tokenizer", f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"),
        ("fingerprint", (runs.fingerprint_of(folder) or "not noted")[:16]),
    ]
    machine = [("machine", "not noted")]
    if (noted := folder / MACHINE).is_file():
        machine = [*json.loads(noted.read_text(encoding="utf-8")).items()]
    tables = (
        ("Config, as it differs from its file", differing),
        ("Parameters by part", numbers),
        ("Data", data),
        ("Machine and versions", machine),
    )
    drawn = "".join(
        f"<div><h3>{html.escape(title)}</h3><table>"
        + "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in table
        )
        + "</table></div>"
        for title, table in tables
    )
    return f"<section><h2>Facts</h2><div class=facts>{drawn}</div></section>"


MORE_STYLE = """
[hidden] { display:none !important }
.curves { display:grid; gap:18px 26px;
  grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr)) }
figure { margin:0; min-width:0 } svg.curve { width:100%; height:230px; display:block }
svg text { font:11.5px system-ui,sans-serif; fill:var(--soft) }
details { border-top:1px solid var(--line); padding:8px 0 }
summary { cursor:pointer; font-weight:600 } details pre { margin:8px 0 }
h3 { font-size:14px; margin:14px 0 4px }
.facts { display:grid; gap:6px 30px;
  grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr)) }
.facts table { table-layout:fixed } .facts th { cursor:auto; font-weight:500 }
.facts th, .facts td { white-space:normal; overflow-wrap:anywhere; font-size:13px;
  vertical-align:top }
#tip { position:fixed; z-index:3; pointer-events:none; background:var(--ink);
  color:#fff; border-radius:6px; padding:5px 9px; font-size:13px; white-space:pre-line }
@media (max-width:600px) { main { padding:20px 10px 60px }
  section { padding:16px 12px } }
"""

DRAW = """
const drawn = JSON.parse(document.getElementById("curves").textContent);
const INKS = ["#3B6FB6", "#D1495B"], tip = document.getElementById("tip");
function part(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}
const brief = v => v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3
  ? v.toExponential(1).replace("e+", "e") : String(Number(v.toPrecision(3)));
function draw(svg, one) {
  const W = svg.clientWidth || 460, H = 230, right = 8, top = 22, low = H - 24;
  const log = document.getElementById("logx").checked, across = s => log ? Math.log10(s + 1) : s;
  const xs = one.lines.flatMap(l => l.x), ys = one.lines.flatMap(l => l.y).sort((a, b) => a - b);
  const a = across(Math.min(...xs)), b = across(Math.max(...xs));
  let min = ys[0], max = ys[ys.length - 1];
  if (document.getElementById("zero").checked) min = Math.min(0, min);
  if (max === min) { max += Math.abs(max) * 0.1 || 1; min -= Math.abs(min) * 0.1 || 0; }
  const marks = [0, 1, 2, 3, 4].map(k => min + (max - min) * k / 4);
  const left = Math.max(52, 14 + 7.5 * Math.max(...marks.map(v => brief(v).length)));
  const x = s => left + (b > a ? (across(s) - a) / (b - a) : 0.5) * (W - left - right);
  const y = v => low - (v - min) / (max - min) * (low - top);
  svg.setAttribute("viewBox", `0 0 ${W} ${H}`);
  svg.replaceChildren();
  for (let k = 0; k <= 4; k++) {
    const v = marks[k];
    svg.append(part("line", { x1: left, x2: W - right, y1: y(v), y2: y(v), stroke: "#E3E7ED" }),
      part("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, brief(v)));
    const s = Math.round(log ? 10 ** (a + (b - a) * k / 4) - 1 : a + (b - a) * k / 4);
    svg.append(part("text", { x: x(s), y: H - 6, "text-anchor": k === 4 ? "end" : k ? "middle" : "start" }, s.toLocaleString("en")));
  }
  let place = left;
  one.lines.forEach((line, n) => {
    const ink = INKS[one.lines.length === 1 ? 0 : n];
    const path = line.x.map((s, i) => `${i ? "L" : "M"}${x(s).toFixed(1)} ${y(line.y[i]).toFixed(1)}`).join("");
    svg.append(part("path", { d: path, fill: "none", stroke: ink, "stroke-width": n ? 2 : 1.3, "stroke-linejoin": "round" }));
    if (line.x.length < 60) line.x.forEach((s, i) => svg.append(part("circle", { cx: x(s), cy: y(line.y[i]), r: 3, fill: ink })));
    const label = part("text", { x: place, y: 12, style: `fill:${ink}` }, line.name);
    svg.append(label);
    place += label.getComputedTextLength() + 16;
  });
  svg.onmousemove = event => {
    const box = svg.getBoundingClientRect(), at = event.clientX - box.left;
    const near = line => line.x.reduce((best, s, i) => Math.abs(x(s) - at) < Math.abs(x(line.x[best]) - at) ? i : best, 0);
    tip.textContent = one.lines.map(line => { const i = near(line); return `step ${line.x[i].toLocaleString("en")}: ${line.name} ${line.y[i]}`; }).join("\\n");
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${event.clientY + 16}px`;
  };
  svg.onmouseleave = () => tip.hidden = true;
}
const all = () => document.querySelectorAll("svg.curve").forEach((svg, n) => draw(svg, drawn[n]));
for (const name of ["logx", "zero"]) { const box = document.getElementById(name); if (box) box.onchange = all; }
addEventListener("resize", all);
all();
"""  # noqa: E501
