"""Lines of the benchmark as JSONL, as a Markdown table, and as a picture."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benches.match import met
from gpt_jax import files, screen

BEGIN, END = "<!-- bench -->", "<!-- end of bench -->"
OURS, PEER = "#C44E52", "#4C72B0"


def append(path: str | Path, line: Mapping[str, Any]) -> None:
    """Adds a line to a JSONL file."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read(path: str | Path) -> list[dict[str, Any]]:
    """Returns the newest line of each row and shape, in order of first appearance.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not one of ours.
    """
    lines: dict[tuple[str, str], dict] = {}
    for number, text in enumerate(Path(path).read_text("utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            lines[line["row"], line["shape"]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is not a line of the benchmark: {text[:60]!r}"
            ) from error
    return list(lines.values())


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Returns a Markdown table; a number that was not measured is a dash."""
    heads = ("row", "shape", "gpt_jax", "peer", "ratio", "goal", "peer is")
    rows: list[list[str]] = []
    notes: list[str] = []
    for line in lines:
        cells = [line["row"], line["shape"], _value(line, "ours"), _value(line, "peer")]
        cells += [_ratio(line), _goal(line), line["peer_name"] or ""]
        if line["note"]:
            notes += [line["note"]] if line["note"] not in notes else []
            cells[2] += f" [{notes.index(line['note']) + 1}]"
        rows.append(cells)
    below = [f"[{i}] {note}<br>" for i, note in enumerate(notes, start=1)]
    return "\n".join([screen.table(heads, rows), *([""] if below else []), *below])


def ceilings(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of what the machine can do and how near rows come."""
    heads = ("row", "shape", "of the matmul ceiling", "of the memory ceiling")
    rows = []
    for line in lines:
        share = line.get("roofline", {})
        if share:
            shown = [
                f"{share[k]:.0%}" if k in share else "" for k in ("flops", "bytes")
            ]
            rows.append([line["row"], line["shape"], *shown])
    return screen.table(heads, rows)


def machine(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns a sentence on the machine and the versions of the newest line."""
    newest = max(lines, key=lambda line: line["date"])
    found = newest["machine"]
    loads = [line.get("others_cpu") or 0.0 for line in lines]
    used: dict[str, str] = dict(found["versions"])
    for line in lines:
        for facts in line.get("facts", {}).values():
            used |= facts["versions"]
    names = ", ".join(f"{name} {version}" for name, version in sorted(used.items()))
    return (
        f"{found['device']}, {found['cores']} cores, {found['memory_gb']:g} GB; "
        f"float32 matmul {found['gflops']:,.0f} GFLOP/s, memory copy "
        f"{found['gbytes_s']:.1f} GB/s (measured); Python {found['python']}, {names}; "
        f"other processes used up to {max(loads):.1f} cores meanwhile; "
        f"{newest['date'][:10]}."
    )


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns everything that stands between the marks of docs/performance.md."""
    return "\n\n".join([machine(lines), table(lines), ceilings(lines)])


def rewrite(path: str | Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Puts `page(lines)` between the marks of a Markdown file.

    Raises:
      ValueError: the file lacks one of the marks; nothing was written.
    """
    files.write_between(path, BEGIN, END, page(lines))


def plot(lines: Iterable[Mapping[str, Any]], path: str | Path) -> bool:
    """Draws validation loss against wall time, ours and the peer's, as a PNG.

    Of several races the one with the most evaluations.

    Returns:
      False when no line holds both curves; then nothing is written.
    """
    found = [x for x in lines if "curve" in x.get("extra", {}).get("peer", {})]
    if not found:
        return False
    from matplotlib.figure import Figure

    line = max(found, key=lambda line: len(line["extra"]["peer"]["curve"]))
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names = {"ours": "gpt_jax", "peer": line["peer_name"]}
    for which, color in (("ours", OURS), ("peer", PEER)):
        curve = line["extra"][which]["curve"]
        seconds, _, loss = zip(*curve, strict=True)
        label = f"{names[which]}: {seconds[-1]:.0f} s, {curve[-1][1]:,} steps"
        axes.plot(seconds, loss, color=color, lw=1.6, marker="o", ms=3, label=label)
    axes.axhline(line["extra"]["ours"]["stop_at"], color="0.5", lw=0.8, ls="--")
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the process was launched")
    axes.set_ylabel("validation loss (nats per character)")
    axes.grid(color="0.9", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["right", "top"]].set_visible(False)
    axes.legend(frameon=False)
    path = Path(path)
    with files.draft(path) as part:
        figure.savefig(part, format="png")
    return True


def _value(line: Mapping[str, Any], which: str) -> str:
    value = line[which]
    if value is None:
        return "–"
    spread = line["spread"].get(which)
    shown = f"{_number(value)} {line['unit']}"
    return f"{shown} ± {spread:.0%}" if spread is not None else shown


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _ratio(line: Mapping[str, Any]) -> str:
    if line["ratio"] is None:
        return "–"
    spread = line["spread"].get("ratio", 0.0)
    return f"**{line['ratio']:.2f}** ± {spread:.0%}"


def _goal(line: Mapping[str, Any]) -> str:
    if line["goal"] is None:
        return ""
    sign, unit = ("≥", "") if line["peer_name"] else ("≤", f" {line['unit']}")
    mark = {True: " yes", False: " no", None: ""}[met(line)]
    return f"{sign} {line['goal']:g}{unit}{mark}"


def sentence(line: Mapping[str, Any]) -> str:
    """Returns what came out of one row, for the screen."""
    parts = [f"{line['row']} {line['shape']}: gpt_jax {_value(line, 'ours')}"]
    if line["peer_name"]:
        parts.append(f"{line['peer_name']} {_value(line, 'peer')}")
        parts.append(f"ratio {_ratio(line)}")
    goal = f" (goal {_goal(line)})" if line["goal"] else ""
    return ", ".join(parts) + goal + (f" [{line['note']}]" if line["note"] else "")
