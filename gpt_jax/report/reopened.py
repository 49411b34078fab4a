"""One page of steps that were executed again: what stands out, and in which example.

It looks like a run's page and needs nothing: see run.py, whose curves it draws.
"""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax import files
from gpt_jax.reopen import Reopened
from gpt_jax.reopen.instruments import Example, Frame
from gpt_jax.report.page import SCRIPT, STYLE
from gpt_jax.report.run import DRAW, MORE_STYLE

SPIKE = 6.0  # deviations above the median from which a number stands out
MAD = 1.4826  # of a normal distribution, the deviation in median absolute deviations
SHOWN = 3  # examples of the step that stands out, with their text
MOST_TOKENS = 2000  # of such a text
NAMED = 5  # rows of a table that are named as standing out
TITLES = {
    "grad_norms": ("Gradients", "norm of each weight's gradient, before clipping"),
    "update_ratio": ("Updates", "norm of a step's change over that of the weight"),
    "attention": (
        "Attention",
        "entropy of each head's attention in the worst example of a step, nats",
    ),
}


def write(found: Reopened, path: str | Path) -> Path:
    """Writes the page."""
    body = [
        _head(found),
        _cards(found),
        _list("What stands out", findings(found.frames)),
        _curves(found.frames),
        *(_heat(name, found.frames) for name in TITLES),
        _examples(peak(found.frames)),
        _table(found.frames),
    ]
    drawn = json.dumps(curves(found.frames)).replace("</", "<\\/")
    name = html.escape(found.folder.resolve().name)
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}, reopened</title>"
        f"<style>{STYLE}{MORE_STYLE}{OWN_STYLE}</style></head><body>"
        f"<main>{''.join(body)}</main><div id=tip hidden></div>"
        f'<script type="application/json" id="curves">{drawn}</script>'
        f"<script>{SCRIPT}{DRAW}</script></body></html>\n"
    )
    path = Path(path)
    files.write(path, text)
    return path


def peak(frames: Sequence[Frame]) -> Frame:
    """Returns the frame of the largest loss; one that is not finite is the largest."""
    losses = [f.loss if math.isfinite(f.loss) else math.inf for f in frames]
    return frames[int(np.argmax(losses))]


def above(value: float, others: Sequence[float]) -> float:
    """Returns by how many deviations a number lies above the median of others.

    The deviation is robust, from the median absolute one, and at least a hundredth of
    the median: others that are all but equal make nothing stand out. nan where there
    are fewer than three finite others.
    """
    known = np.array([x for x in others if math.isfinite(x)])
    if len(known) < 3:
        return math.nan
    middle = float(np.median(known))
    spread = MAD * float(np.median(np.abs(known - middle)))
    return (value - middle) / max(spread, abs(middle) / 100, 1e-30)


def findings(frames: Sequence[Frame]) -> list[str]:
    """Returns what stands out, one sentence each: which step, weights, examples."""
    at = peak(frames)
    others = [f for f in frames if f is not at]
    middle = np.median([f.loss for f in others]) if others else math.nan
    far = above(at.loss, [f.loss for f in others])
    told = [
        f"The largest loss is {at.loss:.4f}, at step {at.step:,}; the median of the "
        f"other steps is {middle:.4f}."
    ]
    if skipped := [f"{f.step:,}" for f in frames if f.skipped]:
        told.append(f"Updates left out (not finite, or spikes): {', '.join(skipped)}.")
    if not far >= SPIKE:
        return [*told, "No loss stands out from the others."]
    told[0] += f" That is {far:.0f} deviations above it."
    told += _of_examples(at, others)
    for name, (title, _) in TITLES.items():
        rows = at.tables.get(name, {})
        ratios = {
            row: value / usual
            for row, value in rows.items()
            if (usual := _usual(name, row, others)) > 0
        }
        top = sorted(ratios, key=lambda row: -ratios[row])[:NAMED]
        if top and ratios[top[0]] > 2:
            said = ", ".join(f"{row} {ratios[row]:.1f} times" for row in top)
            told.append(f"{title} at that step, against their median: {said}.")
    return told


def _of_examples(at: Frame, others: Sequence[Frame]) -> list[str]:
    """Returns whether some examples of a step are to blame, or all of them."""
    losses = [example.loss for example in at.examples]
    finite = [loss for loss in losses if math.isfinite(loss)]
    usual = [
        float(np.median([e.loss for e in f.examples])) for f in others if f.examples
    ]
    if not finite or not usual:
        return []
    middle = float(np.median(finite))
    bad = [
        example
        for example in at.examples
        if above(example.loss, [x.loss for f in others for x in f.examples]) >= SPIKE
    ]
    if bad and len(bad) <= len(losses) / 2:
        worst = bad[0]
        share = ""
        if math.isfinite(worst.grad_norm):
            share = f"; alone its gradient is {worst.grad_norm:.1f} times the step's"
        place = f" ({worst.where})" if worst.where else ""
        return [
            f"It is the data: {len(bad)} of {len(losses)} examples stand out, first "
            f"number {worst.number:,}{place} with a loss of {worst.loss:.4f}, where "
            f"the median of the others is {middle:.4f}{share}."
        ]
    return [
        f"It is the weights, not the data: half of the examples of that step have a "
        f"loss above {middle:.4f}, in other steps above {np.median(usual):.4f}; look "
        "at the updates before it."
    ]


def _usual(name: str, row: str, frames: Sequence[Frame]) -> float:
    found = [f.tables[name][row] for f in frames if row in f.tables.get(name, {})]
    return float(np.median(found)) if found else 0.0


def curves(frames: Sequence[Frame]) -> list[dict[str, Any]]:
    """Returns what is drawn, as `run.curves` does."""
    steps = [frame.step for frame in frames]

    def line(name: str, values: Sequence[float]) -> dict[str, Any]:
        kept = [(x, y) for x, y in zip(steps, values) if math.isfinite(y)]
        return {"name": name, "x": [x for x, _ in kept], "y": [y for _, y in kept]}

    found = [
        ("Loss", "nats a target", [line("loss", [f.loss for f in frames])]),
        ("Gradient norm", "", [line("grad_norm", [f.grad_norm for f in frames])]),
        ("Learning rate", "", [line("lr", [f.lr for f in frames])]),
    ]

    def of(table: str, *names: str) -> list[dict[str, Any]]:
        there = [n for n in names if n in frames[0].tables.get(table, {})]
        return [line(n, [f.tables[table][n] for f in frames]) for n in there]

    found += [
        ("Loss of single tokens", "nats", of("per_token_loss", "median", "largest")),
        ("Gradient noise", "squared norms", of("noise_scale", "signal", "noise")),
    ]
    return [
        {"title": title, "unit": unit, "lines": lines}
        for title, unit, lines in found
        if any(one["x"] for one in lines)
    ]


def noise_scale(frames: Sequence[Frame]) -> float | None:
    """Returns the gradient noise scale over all steps, in examples; None = not looked.

    The ratio of the means: see `reopen.instruments.noise_of`.
    """
    tables = [f.tables["noise_scale"] for f in frames if "noise_scale" in f.tables]
    if not tables:
        return None
    noise, signal = (
        np.nanmean([t[key] for t in tables]) for key in ("noise", "signal")
    )
    return float(noise / signal) if signal > 0 else math.nan


def _head(found: Reopened) -> str:
    name = html.escape(found.folder.resolve().name)
    first, last = found.frames[0].step, found.frames[-1].step
    back = f"the checkpoint of step {found.began:,}" if found.began else "its start"
    how = "to the bit" if not found.off else f"within {found.off:.2g}, relative"
    met = (
        f"{len(found.met)} logged lines were met {how}"
        if found.met
        else "no line was logged on the way, so nothing could be compared"
    )
    told = (
        f"Task {found.task}, steps {first:,} to {last:,} executed again from {back}; "
        f"{met}."
    )
    return f"<h1>{name}, reopened</h1><p class=soft>{html.escape(told)}</p>"


def _cards(found: Reopened) -> str:
    at = peak(found.frames)
    cards = [("best", f"{at.loss:.4f}", f"largest loss, at step {at.step:,}")]
    norms = [f.grad_norm for f in found.frames]
    cards.append(("", f"{max(norms):.3g}", "largest gradient norm"))
    if (scale := noise_scale(found.frames)) is not None:
        text = f"{scale:.3g}" if math.isfinite(scale) else "beyond the batch"
        cards.append(("", text, "gradient noise scale, examples"))
    return "<div class=cards>" + "".join(
        f'<div class="card {kind}"><b>{html.escape(value)}</b>'
        f"<span>{html.escape(label)}</span></div>"
        for kind, value, label in cards
    ) + "</div>"  # fmt: skip


def _list(title: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<section><h2>{html.escape(title)}</h2><ul>{items}</ul></section>"


def _curves(frames: Sequence[Frame]) -> str:
    drawn = "".join(
        f"<figure><figcaption><b>{html.escape(one['title'])}</b> "
        f"<span class=soft>{html.escape(one['unit'])}</span></figcaption>"
        f'<svg class=curve role=img aria-label="{html.escape(one["title"])}"></svg>'
        "</figure>"
        for one in curves(frames)
    )
    axis = (
        "<label><input type=checkbox id=logx> steps on a logarithmic axis</label>"
        "<label><input type=checkbox id=zero> from 0</label>"
    )
    return (
        "<section><h2>Step by step</h2><p class=soft>Point at a curve to read it.</p>"
        f"<div class=controls>{axis}</div><div class=curves>{drawn}</div></section>"
    )


def _heat(name: str, frames: Sequence[Frame]) -> str:
    """Returns a table of rows over steps, coloured by how far each is off its row."""
    if name not in frames[0].tables:
        return ""
    title, unit = TITLES[name]
    head = "".join(f"<th class=number>{frame.step}</th>" for frame in frames)
    lines = []
    for row in frames[0].tables[name]:
        values = [frame.tables[name][row] for frame in frames]
        cells = "".join(_cell(value, values) for value in values)
        lines.append(f"<tr><th>{html.escape(row)}</th>{cells}</tr>")
    return (
        f"<section><h2>{html.escape(title)}</h2><p class=soft>{html.escape(unit)}. Red "
        "is above the row's median, blue below; full colour is four times.</p>"
        f"<div class=scroll><table class=heat><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _cell(value: float, values: Sequence[float]) -> str:
    middle = float(np.median([x for x in values if math.isfinite(x)] or [0.0]))
    strength = 0.0
    if math.isfinite(value) and value > 0 and middle > 0:
        strength = max(-1.0, min(1.0, math.log2(value / middle) / 2))
    ink = "209,73,91" if strength > 0 or not math.isfinite(value) else "59,111,182"
    alpha = abs(strength) if math.isfinite(value) else 1.0
    return f'<td style="background:rgba({ink},{alpha:.2f})">{value:.2g}</td>'


def _examples(at: Frame) -> str:
    blocks = []
    for place, example in enumerate(at.examples[:SHOWN]):
        where = f", {example.where}" if example.where else ""
        norm = ""
        if math.isfinite(example.grad_norm):
            norm = f", gradient {example.grad_norm:.2f} times the step's"
        summary = f"Example {example.number:,}{where}: loss {example.loss:.4f}{norm}"
        opened = "" if place else " open"
        blocks.append(
            f"<details{opened}><summary>{html.escape(summary)}</summary>"
            f"<pre>{_text(example)}</pre></details>"
        )
    told = f"The worst of {len(at.examples)} examples of step {at.step:,}."
    if any(example.losses for example in at.examples):
        told += " The redder a token, the larger its loss; point at one to read it."
    return (
        f"<section><h2>What it read</h2><p class=soft>{html.escape(told)}</p>"
        f"{''.join(blocks)}</section>"
    )


def _text(example: Example) -> str:
    if not example.tokens:
        return "<span class=soft>no text</span>"
    shown = []
    losses: Sequence[float] = example.losses or [0.0] * len(example.tokens)
    for token, loss in list(zip(example.tokens, losses))[:MOST_TOKENS]:
        if not example.losses:
            shown.append(html.escape(token))
            continue
        alpha = max(0.0, min(1.0, loss / 12))
        shown.append(
            f'<i style="background:rgba(209,73,91,{alpha:.2f})" '
            f'title="{loss:.2f} nats">{html.escape(token)}</i>'
        )
    if len(example.tokens) > MOST_TOKENS:
        shown.append(f"\n[the first {MOST_TOKENS:,} of {len(example.tokens):,} tokens]")
    return "".join(shown)


def _table(frames: Sequence[Frame]) -> str:
    heads = ("step", "loss", "gradient", "worst example", "its loss", "its gradient")
    head = "".join(f"<th class=number>{text}</th>" for text in heads)
    lines = "".join(_row(frame, frame is peak(frames)) for frame in frames)
    return (
        "<section><h2>Every step</h2><div class=scroll><table class=sorts><thead><tr>"
        f"{head}</tr></thead><tbody>{lines}</tbody></table></div></section>"
    )


def _row(frame: Frame, best: bool) -> str:
    worst = frame.examples[0] if frame.examples else None
    cells: list[Any] = [frame.step, f"{frame.loss:.4f}", f"{frame.grad_norm:.4g}"]
    if worst:
        norm = f"{worst.grad_norm:.2f}" if math.isfinite(worst.grad_norm) else ""
        cells += [worst.number, f"{worst.loss:.4f}", norm]
    made = "".join(f"<td class=number>{cell}</td>" for cell in cells)
    return f"<tr{' class=best' if best else ''}>{made}</tr>"


OWN_STYLE = """
ul { margin:6px 0 0; padding-left:20px } li { margin:4px 0 }
table.heat { font-size:11.5px } .heat th { cursor:auto; font-size:11.5px }
.heat td { text-align:right; padding:2px 5px; border-bottom:0 }
details pre i { font-style:normal; border-radius:2px }
"""
