"""A sweep's results as rows, curves and importances; results.csv and results.json."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax import files, metrics, screen

Results = dict[str, Any]
Row = dict[str, Any]

# Columns of results.csv after the keys that were swept.
COLUMNS = ("value", "at", "last", "step", "steps", "tokens", "seconds", "attempts")
STATUSES = ("done", "pruned", "diverged", "failed", "running", "waiting")
BINS = 4  # groups that the values of a continuous key are put into


class Curve(NamedTuple):
    """Evaluations of a run: steps and values."""

    steps: list[int]
    values: list[float]


def tables(out: Path, results: Results) -> None:
    """Writes results.csv, best first, and results.json."""
    keys = results["keys"]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["trial", "status", *keys, *COLUMNS, "reason"])
    for row in ranked(results):
        point = [row["overrides"].get(key, "") for key in keys]
        numbers = ["" if row[name] is None else row[name] for name in COLUMNS]
        lines.writerow([row["name"], row["status"], *point, *numbers, row["reason"]])
    files.write(out / "results.csv", text.getvalue())
    files.write(out / "results.json", json.dumps(results, indent=1) + "\n")


def ranked(results: Results) -> list[Row]:
    """Returns the trials, best first; those that did not finish come after."""
    sign = 1 if results["direction"] == "minimize" else -1

    def place(row: Row) -> tuple:
        value = math.inf if row["value"] is None else sign * row["value"]
        return STATUSES.index(row["status"]), value

    return sorted(results["trials"], key=place)


def summary(results: Results) -> str:
    """Returns the sentence that a sweep ends with."""
    count = [(s, sum(r["status"] == s for r in results["trials"])) for s in STATUSES]
    said = ", ".join(f"{number} {status}" for status, number in count if number)
    best = next((r for r in results["trials"] if r["name"] == results["best"]), None)
    if best is None:
        return f"{said}; no trial is done"
    value = f"{results['metric']} {best['value']:.4f} at step {best['at']}"
    return f"{said}; best: {best['name']}, {value}"


def table(results: Results) -> str:
    """Returns the trials in the order of the sweep, as a Markdown table."""
    lines = [
        (
            row["name"],
            row["status"] if row["value"] is None else row["value"],
            row["at"],
            round(row["seconds"]),
        )
        for row in results["trials"]
    ]
    return screen.table(("trial", results["metric"], "at step", "seconds"), lines)


def curve(folder: Path, metric: str) -> Curve:
    """Returns a run's evaluations of a metric; empty where it has none."""
    try:
        rows = metrics.read(folder)
    except (FileNotFoundError, ValueError):
        return Curve([], [])
    points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return Curve([step for step, _ in points], [value for _, value in points])


def done(results: Results) -> list[Row]:
    """Returns the trials that were trained to their end."""
    return [row for row in results["trials"] if row["status"] == "done"]


def importance(results: Results) -> dict[str, float]:
    """Returns how much of the result each key alone explains, the largest first.

    Optuna's figure where the sweep has one. Else the share of the variance of the
    trials' ranks that lies between the values of a key, which in a full grid is its
    main effect (functional ANOVA: Hutter et al. 2014); ranks, so that a trial that
    failed badly does not decide alone.
    """
    found = results["importance"]
    if found is None:
        rows = done(results)
        values = np.array([row["value"] for row in rows], float)
        rank = values.argsort().argsort().astype(float)
        total = rank.var()
        found = {}
        for key in results["keys"]:
            groups = _groups([row["overrides"][key] for row in rows])
            between = sum(
                len(group) * (rank[group].mean() - rank.mean()) ** 2 for group in groups
            )
            found[key] = float(between / len(rank) / total) if total else 0.0
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def numeric(values: Sequence[Any]) -> bool:
    """Whether values can stand on a number line."""
    return all(
        isinstance(value, int | float) and not isinstance(value, bool)
        for value in values
    )


def logarithmic(results: Results, key: str, values: Sequence[Any]) -> bool:
    """Whether a key's number line is better read as a logarithmic one."""
    different = sorted(set(values)) if numeric(values) else []
    if len(different) < 3 or different[0] <= 0:
        return False
    if results["space"]:
        return results["space"][key] == "log"
    return different[-1] / different[0] >= 8


def panels(count: int) -> tuple[int, int]:
    """Returns (columns, rows) of so many panels."""
    across = 2 if count == 4 else min(3, count)
    return across, math.ceil(count / across)


def _groups(values: list[Any]) -> list[list[int]]:
    """Returns the indices of trials that share a value, or a quarter of a range."""
    if numeric(values) and len(set(values)) > max(BINS, len(values) / 2):
        order = np.argsort(np.array(values, float), kind="stable")
        return [list(part) for part in np.array_split(order, BINS) if len(part)]
    groups: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(repr(value), []).append(index)
    return list(groups.values())
