"""A sweep's results as rows, axes and curves; its CSV files and results.json.

A row is a setting: trials that differ in the seed alone. What a setting's row has is
told in `sweep.run._setting`.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax import files, metrics, screen

Results = dict[str, Any]
Row = dict[str, Any]

# Columns after the keys that were swept. None has the name of a config key.
OF_SETTINGS = {
    "mean": "value",
    "standard_error": "error",
    "low": "low",
    "high": "high",
    "n": "n",
    "seeds": "seeds",
    "at_step": "at",
    "parameters": "parameters",
    "run_steps": "step",
    "run_tokens": "tokens",
    "run_bytes": "bytes",
    "run_flops": "flops",
    "run_seconds": "seconds",
    "reason": "reason",
}
OF_TRIALS = {
    "value": "value",
    "at_step": "at",
    "last": "last",
    "parameters": "parameters",
    "run_steps": "step",
    "run_tokens": "tokens",
    "run_bytes": "bytes",
    "run_flops": "flops",
    "run_seconds": "seconds",
    "crashes": "crashes",
    "reason": "reason",
}
STATUSES = ("done", "pruned", "diverged", "failed", "running", "waiting")
ABSENT = "–"  # of a key that a setting's config does not have
POWERS = ("", "K", "M", "G", "T", "P", "E")
ROOM = 28  # characters of a value in a label


class Curve(NamedTuple):
    """Evaluations of a run: steps and values."""

    steps: list[int]
    values: list[float]


class Band(NamedTuple):
    """The mean of several curves where all have values, and its standard error."""

    steps: list[int]
    mean: np.ndarray
    error: np.ndarray


class Axis(NamedTuple):
    """What is drawn along: a key that differs between settings.

    Attributes:
      key: the dotted key.
      label: its short name.
      tied: short names of the keys that always move with it.
      values: the different values, in order; words stand after numbers.
      numeric: whether the values lie on a number line.
      log: whether that is better read as a logarithmic one.
    """

    key: str
    label: str
    tied: list[str]
    values: list[Any]
    numeric: bool
    log: bool


def tables(out: Path, results: Results) -> None:
    """Writes results.csv, a row a setting, trials.csv, and results.json."""
    keys = results["keys"]
    # No key of a config is called by the names of the other columns but this one.
    after = results["after"]
    settings = [
        [
            *(row["name"], row["status"], *_point(row, keys)),
            *(*_told(row, OF_SETTINGS.values()), *_told(row["after"], after)),
        ]
        for row in results["settings"]
    ]
    columns = ["setting", "status", *keys, *OF_SETTINGS, *after]
    _write_csv(out / "results.csv", columns, settings)
    trials = [
        [
            *(row["name"], row["setting"], row["status"], row["seed"]),
            *(
                *_point(row, keys),
                *_told(row, OF_TRIALS.values()),
                *_told(row["after"], after),
            ),
        ]
        for row in results["trials"]
    ]
    columns = ["trial", "setting", "status", "seed", *keys, *OF_TRIALS, *after]
    _write_csv(out / "trials.csv", columns, trials)
    files.write(out / "results.json", json.dumps(results, indent=1) + "\n")


def curves(out: Path, results: Results) -> None:
    """Writes curves.csv: a row for each line of each trial's record."""
    rows = [
        [trial["name"], trial["setting"], trial["seed"], line]
        for trial in results["trials"]
        for line in record(out / trial["name"])
    ]
    names = dict.fromkeys(name for *_, line in rows for name in line)
    lines = [
        [*told, *("" if line.get(name) is None else line[name] for name in names)]
        for *told, line in rows
    ]
    _write_csv(out / "curves.csv", ["trial", "setting", "seed", *names], lines)


def summary(results: Results) -> str:
    """Returns the sentence that a sweep ends with."""
    count = [(s, sum(r["status"] == s for r in results["trials"])) for s in STATUSES]
    said = ", ".join(f"{number} {status}" for status, number in count if number)
    best = best_of(results)
    if best is None:
        return f"{said}; no trial is done"
    where = f"at step {best['at']}" if best["n"] == 1 else f"{of_seeds(best)}"
    whole = "" if best["status"] == "done" else f" ({best['status']} in part)"
    value = f"{results['metric']} {best['value']:.4f} {where}"
    return (
        f"{said}; best: {best['name']}, {value}{whole}"
        + _told_front(results)
        + (_told_schedule(results))
    )


def _told_schedule(results: Results) -> str:
    """Returns the lines of the numbers of the best one where they evolved; else ""."""
    changes = next(iter(results["evolved"].values()), [])
    lines = [
        f"  from step {step}: "
        + ", ".join(f"{key.removeprefix('hyper.')} {brief(numbers[key])}"
                    for key in numbers)
        for step, numbers in changes
    ]  # fmt: skip
    head = "the numbers that its weights were trained with:"
    return "\n".join(["", head, *lines]) if lines else ""


def _told_front(results: Results) -> str:
    """Returns the lines of what nothing beats for less; "" without a cost."""
    if not (name := results["cost"]):
        return ""
    rows = front(results, name)
    lines = [f"  {row['value']:.4f}  {cost(row, name):.4g}  {row['name']}"
             for row in rows]  # fmt: skip
    head = f"nothing is as good for less ({results['metric']}, {name}):"
    return "\n".join(["", head, *lines])


def of_seeds(row: Row) -> str:
    """Returns what a mean over seeds is worth, in words; "" for one seed."""
    if row["low"] is None:
        return ""
    return (
        f"(mean of {row['n']} seeds, 95 % within [{row['low']:.4f}, {row['high']:.4f}])"
    )


def table(results: Results) -> str:
    """Returns the settings, best first, as a Markdown table."""
    metric, seeded = results["metric"], has_seeds(results)
    heads = ["setting", metric, *(["95 % interval", "seeds"] if seeded else [])]
    heads += ["at step", "seconds"]
    lines = []
    for row in results["settings"]:
        value = row["status"] if row["value"] is None else f"{row['value']:.4f}"
        if row["status"] != "done" and row["value"] is not None:
            value += f" ({row['status']} in part)"
        cells = [row["name"], value]
        if seeded:
            interval = (
                "" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
            )
            cells += [interval, f"{row['n']} of {row['seeds']}"]
        lines.append((*cells, row["at"], round(row["seconds"])))
    return screen.table(heads, lines)


def has_seeds(results: Results) -> bool:
    """Whether a setting was tried with several seeds."""
    return any(row["seeds"] > 1 for row in results["settings"])


def best_of(results: Results) -> Row | None:
    """Returns the best setting; None when no trial is done."""
    rows = results["settings"]
    return next((row for row in rows if row["name"] == results["best"]), None)


def valued(results: Results) -> list[Row]:
    """Returns the settings of which trials were trained to their end, best first."""
    return [row for row in results["settings"] if row["value"] is not None]


def cost(row: Row, name: str) -> float | None:
    """Returns what a run of a setting took, or what was measured after it."""
    return row["after"][name] if name in row["after"] else row[name]


def front(results: Results, name: str) -> list[Row]:
    """Returns the settings on the Pareto front, cheapest first.

    Nothing else is as good as they are for the same cost or less.
    """
    sign = 1 if results["direction"] == "minimize" else -1
    known = [(cost(row, name), sign * row["value"], row) for row in valued(results)]
    ranked = [one for one in known if one[0] is not None]
    found: list[tuple] = []
    for one in sorted(ranked, key=lambda one: one[:2]):
        if not found or one[1] < found[-1][1]:
            found.append(one)
    return [row for *_, row in found]


# --- curves ---------------------------------------------------------------------------


def record(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's record; none where there is no sound one."""
    try:
        return metrics.read(folder)
    except (FileNotFoundError, ValueError):
        return []


def curve(folder: Path, metric: str) -> Curve:
    """Returns a run's evaluations of a metric; empty where it has none."""
    rows = [row for row in record(folder) if row.get(metric) is not None]
    return Curve([row["step"] for row in rows], [row[metric] for row in rows])


def band(curves: Iterable[Curve]) -> Band:
    """Returns the mean of curves over the steps at which all of them have a value."""
    known = [dict(zip(*one)) for one in curves if one.values]
    steps = sorted(set.intersection(*map(set, known))) if known else []
    values = np.array([[one[step] for step in steps] for one in known], float)
    error = np.zeros(len(steps))
    if len(known) > 1:
        error = values.std(axis=0, ddof=1) / math.sqrt(len(known))
    return Band(steps, values.mean(axis=0) if known else error, error)


# --- axes -----------------------------------------------------------------------------


def at(row: Row, key: str) -> Any:
    """Returns a value of a row's point that can be grouped and sorted: no list."""
    value = row["overrides"][key]
    scalar = value is None or isinstance(value, str | int | float)
    return value if scalar else json.dumps(value, separators=(", ", " "))


def axes(results: Results) -> list[Axis]:
    """Returns an axis for each key that differs, keys that move together as one."""
    rows, found = results["settings"], []
    alike: dict[tuple, list[Axis]] = {}
    for key, short in results["keys"].items():
        points = [at(row, key) for row in rows]
        values = sorted({*points}, key=sortable)
        if len(values) < 2:
            continue
        same = alike.setdefault(_partition(points), [])
        if tied := next((axis for axis in same if _moves(rows, axis, key)), None):
            tied.tied.append(short)
            continue
        shown = [at(row, key) for row in valued(results)] or points
        log = logarithmic(results, key, shown)
        found.append(Axis(key, short, [], values, numeric(values), log))
        same.append(found[-1])
    return found


def numeric(values: Iterable[Any]) -> bool:
    """Whether values can stand on a number line."""
    return all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in values
    )


def logarithmic(results: Results, key: str, values: Iterable[Any]) -> bool:
    """Whether a key's number line is better read as a logarithmic one."""
    values = list(values)
    different = sorted(set(values)) if numeric(values) else []
    if len(different) < 3 or different[0] <= 0:
        return False
    if key in results["space"]:
        return results["space"][key] == "log"
    return different[-1] / different[0] >= 8


def crossed(results: Results, *axes: Axis) -> bool:
    """Whether nearly all combinations of these axes' values were tried.

    Only then does a line from one value to the next mean anything.
    """
    if results["drawn"]:
        return False
    tried = {tuple(at(row, axis.key) for axis in axes) for row in results["settings"]}
    return len(tried) >= 0.8 * math.prod(len(axis.values) for axis in axes)


def sortable(value: Any) -> tuple:
    """Returns what values of all kinds are sorted by: numbers, words, nothing."""
    if value is None:
        return (2, 0, "")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (0, value, "") if is_number else (1, 0, str(value))


def brief(value: Any, room: int = ROOM) -> str:
    """Returns a value as labels write it."""
    if value is None:
        return ABSENT
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) < 1e7
        return str(int(value)) if whole else f"{value:.4g}"
    text = value if isinstance(value, str) else at({"overrides": {"": value}}, "")
    text = str(text)
    return text if len(text) <= room else f"{text[: room - 10]}...{text[-7:]}"


def amount(value: float) -> str:
    """Returns a large number as 786 K or 4.83 G."""
    power = min(max(0, math.floor(math.log10(max(value, 1)) / 3)), len(POWERS) - 1)
    return f"{value / 1000**power:.3g} {POWERS[power]}".rstrip()


def ticks(axis: Axis, shown: Sequence[float], apart: float) -> list[float]:
    """Returns places for the ticks of a number line, so that their texts stay apart.

    Args:
      axis: a numeric one.
      shown: the values that are drawn.
      apart: the least distance of two ticks, as a share of the axis.
    """
    different = sorted(set(shown))
    write = math.log10 if axis.log else float
    if len(different) > 8:
        different = _round_places(different[0], different[-1], axis.log)
    low, high = write(min(shown)), write(max(shown))
    span = (high - low) or 1.0
    kept: list[float] = []
    for value in different:
        if not kept or (write(value) - write(kept[-1])) / span >= apart:
            kept.append(value)
    return kept


def panels(count: int) -> tuple[int, int]:
    """Returns (columns, rows) of so many panels."""
    across = 2 if count == 4 else min(3, count)
    return across, math.ceil(count / across)


def _round_places(low: float, high: float, log: bool) -> list[float]:
    """Returns round numbers between two: 1, 2, 5, 10, ... or in equal steps."""
    if log:
        ends = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        decades = high / low >= 100
        marks = [10.0**e * m for e in ends for m in ((1,) if decades else (1, 2, 5))]
    else:
        rough = (high - low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough)
        first = math.ceil(low / step)
        marks = [round(step * (first + i), 12) for i in range(7)]
    inside = [mark for mark in marks if low * (1 - 1e-9) <= mark <= high * (1 + 1e-9)]
    return inside if len(inside) > 1 else [low, high]


def _partition(points: list[Any]) -> tuple[int, ...]:
    """Returns the same numbers for all keys that tell the same settings apart."""
    seen: dict[Any, int] = {}
    return tuple(seen.setdefault(repr(point), len(seen)) for point in points)


def _moves(rows: list[Row], axis: Axis, key: str) -> bool:
    """Whether a key that tells the same settings apart as an axis moves with it.

    Values that are all different tell the same apart by chance: they must rise, or
    fall, together.
    """
    if len(axis.values) < len(rows):
        return True
    pairs = sorted((sortable(at(row, axis.key)), at(row, key)) for row in rows)
    other = [sortable(value) for _, value in pairs]
    return other == sorted(other) or other == sorted(other, reverse=True)


def _point(row: Row, keys: Iterable[str]) -> list[Any]:
    return ["" if at(row, key) is None else at(row, key) for key in keys]


def _told(row: Row, names: Iterable[str]) -> list[Any]:
    return ["" if row[name] is None else row[name] for name in names]


def _write_csv(path: Path, head: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(head)
    lines.writerows(rows)
    files.write(path, text.getvalue())
