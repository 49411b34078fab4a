"""What a sweep and its trials write down: sweep.json, and an outcome.json each.

A trial's outcome: "status" (done, pruned, diverged or failed) and the "reason"; of the
metric "value", that of the evaluation that counts, "at", its step, and "last", the last
one; "step", "tokens" and "seconds": how far the run got. The storage holds it too.
"""

import json
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt_jax import files, metrics, runs
from gpt_jax.criterion import Criterion
from gpt_jax.sweep.plan import Plan

RECORD = "sweep.json"
OUTCOME = "outcome.json"
CRITERION = ("metric", "direction", "at")  # decide what runs for some sweeps only


def failure(reason: str, **more: Any) -> dict:
    """Returns the outcome of a trial that failed."""
    return {"status": "failed", "reason": reason, "value": None, "step": 0, **more}


def measure(folder: Path, criterion: Criterion) -> dict:
    """Returns what a run's record says by a criterion, as an outcome has it.

    Without the metric, "value" is None and "names" are those that the record has.
    """
    rows = metrics.read(folder) if (folder / metrics.FILE).is_file() else []
    final = {key: value for row in rows for key, value in row.items()}
    known = {key: final.get(key, 0) for key in ("step", "tokens", "seconds")}
    points = metrics.points(rows, criterion.metric)
    if not points:
        return {**known, "value": None, "names": sorted(final.keys() - known.keys())}
    value, at = criterion.of(points)
    by = {"criterion": [*criterion]}
    return {**known, **by, "value": value, "at": at, "last": points[-1][1]}


def judged(outcome: dict, folder: Path, criterion: Criterion) -> dict:
    """Returns an outcome by this criterion, measured anew if it is by another one."""
    if tuple(outcome.get("criterion", criterion)) == criterion:
        return outcome
    found = {"value": None, "at": None, "last": None}
    return outcome | found | measure(folder, criterion)


def costs(outcome: dict) -> dict[str, float | None]:
    """Returns what a trial took: each of COSTS, and what was measured after it."""
    found = {name: outcome.get(name) for name in ("parameters", "tokens", "seconds")}
    for name in ("flops", "bytes"):
        per_token = outcome.get(f"{name}_per_token")
        found[name] = per_token and per_token * (found["tokens"] or 0)
    return {**found, **outcome.get("after", {})}


def took(row: dict, cost: str) -> float | None:
    """Returns what a row of results.json says of a cost; None where nothing."""
    return row["after"].get(cost) if cost in row.get("after", {}) else row.get(cost)


def read_outcome(folder: Path) -> dict | None:
    """Returns how a trial's process said it ended; None when it did not."""
    try:
        return json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    files.write(path, json.dumps(content, indent=2) + "\n")


def open_record(
    plan: Plan, base: ConfigDict, out: Path, trials: list[str], storage: str
) -> dict:
    """Returns sweep.json, made or checked.

    Points may be added; and where the metric decides nothing that is computed, neither
    by a pruner nor by a search, another one may be reported.

    Raises:
      ValueError: the folder is another sweep's, or no sweep's.
    """
    sampler = [plan.sampler, plan.seed, *filter(None, [plan.seeds])]
    new = {
        "sweep": plan.name,
        "config": plan.config,
        "base": json.loads(json.dumps(base.to_dict())),
        "metric": plan.metric,
        "direction": plan.direction,
        "at": plan.at,
        "cost": plan.cost if plan.space else "",  # of points it chooses nothing
        "pruner": plan.pruner,
        "evolve": json.loads(json.dumps(plan.evolve)),
        "space": {key: str(axis) for key, axis in (plan.space or {}).items()},
        "sampler": sampler if plan.space else None,
        # A password before the @ stays out of the file.
        "storage": storage.rpartition("@")[2],
    }
    path = out / RECORD
    if not path.is_file():
        if out.is_dir() and any(p.name != "run.lock" for p in out.iterdir()):
            raise ValueError(
                f"{out} is not a sweep's folder (it has no {RECORD}) and not empty: "
                f"use another --out"
            )
        made = {"id": f"{out.name}-{uuid.uuid4().hex[:8]}", **new, "trials": trials}
        write(path, made)
        return made
    old = {"at": "best", "cost": "", **json.loads(path.read_text(encoding="utf-8"))}
    decides = plan.space or plan.pruner or plan.evolve
    free = ("base", *(() if decides else CRITERION))
    changed = [key for key in new if key not in free and new[key] != old.get(key)]
    lines = [f"{key}: {old.get(key)!r} -> {new[key]!r}" for key in changed]
    runs.complete(old["base"])
    before, now = ConfigDict(old["base"]), ConfigDict(new["base"])
    differences = runs.difference(before, now)
    where = "|".join(runs.WHERE)
    lines += [d for d in differences if not re.fullmatch(where, d.split(":")[0])]
    if gone := sorted(set(old["trials"]) - set(trials)):
        lines.append(f"{len(gone)} of its trials are no points any more: {gone[0]}")
    if lines:
        asked = {*changed} & {*CRITERION}
        flags = "--metric, --direction and --at change what is reported"
        also = f"; {flags}" if asked else ""
        raise ValueError(
            f"{out} holds another sweep:\n  " + "\n  ".join(lines) + "\n"
            f"put these back to go on, or use another --out{also}"
        )
    now_known = {**old, **new, "trials": trials}
    write(path, now_known)
    return now_known


def earlier(plan: Plan, costs: Sequence[str]) -> list[dict]:
    """Returns the settings of the sweep that a search starts from, those that fit it.

    Args:
      plan: whose `start` it is.
      costs: what must be known of them.

    Raises:
      ValueError: there is no such sweep, it was judged by something else, or nothing
        of it lies in the space.
    """
    if not plan.start:
        return []
    path = Path(plan.start) / "results.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"start = {plan.start!r}: {path} does not hold the results of a sweep"
        ) from error
    theirs = Criterion(*({"at": "best", **found}[key] for key in CRITERION))
    if theirs != plan.criterion:
        raise ValueError(
            f"start = {plan.start!r} is ranked by {', '.join(theirs)}, this sweep by "
            f"{', '.join(plan.criterion)}"
        )

    def fits(row: dict) -> bool:
        point = runs.tuples(row.get("drawn") or row["overrides"])
        known: dict[str, Any] = {}
        for key, axis in (plan.space or {}).items():
            if axis.applies(known):
                if not axis.holds(point.get(key)):
                    return False
                known[key] = point[key]
        return all(
            x is not None for x in (row["value"], *(took(row, c) for c in costs))
        )

    rows = [runs.tuples(row) for row in rows if fits(row)]
    if not rows:
        raise ValueError(f"start = {plan.start!r}: nothing of it lies in this space")
    return rows
