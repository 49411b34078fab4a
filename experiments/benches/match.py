"""A row of the benchmark: two sides, A-B-A-B, medians, spreads, and what they mean."""

import contextlib
import datetime
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.benches.worker import Absent, Failed, Side, Worker, busy_seconds

SHORT_SECONDS = 0.1  # CPU time comes in ticks of 10 ms: less cannot be told


class Match(NamedTuple):
    """What is compared.

    Attributes:
      row: the name of the row.
      shape: which of its sizes.
      ours: our side.
      peer: the other one; None when the goal is a number and not a comparison.
      unit: of the values. More is better when it ends in "/s", less otherwise.
      goal: the ratio to reach; without a peer, the value not to exceed.
      gpu: needs one.
      repeats: when another number than the caller's makes sense (seeds, say).
    """

    row: str
    shape: str
    ours: Side
    peer: Side | None
    unit: str
    goal: float | None = None
    gpu: bool = False
    repeats: int | None = None


def play(
    match: Match,
    *,
    repeats: int,
    limit_s: float,
    machine: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures a match and returns its line.

    A side that cannot be measured leaves its number None and the reason in "note".

    Args:
      match: the row.
      repeats: measurements of each side.
      limit_s: the longest wait for one measurement.
      machine: what `machine.measure` returned.
      say: told what happens, a line at a time.
    """
    line: dict[str, Any] = _blank(match, machine)
    if match.gpu and machine["platform"] != "gpu":
        return skipped(match, machine, "not measured: no GPU")
    with contextlib.ExitStack() as stack:
        open_sides = {}
        for which, side in (("ours", match.ours), ("peer", match.peer)):
            if side is None:
                continue
            try:
                say(f"{match.row} {match.shape}: preparing {side.name}")
                worker = stack.enter_context(Worker(side, limit_s=limit_s))
            except Absent as error:
                line["note"] = f"{side.name}: {error}"
                continue
            except Failed as error:
                return {**line, "note": str(error), "failed": True}
            open_sides[which] = worker
        if "ours" not in open_sides:
            return line
        try:
            samples, disturbed = interleave(
                open_sides, repeats=match.repeats or repeats
            )
        except Failed as error:
            return {**line, "note": str(error), "failed": True}
    facts = {which: worker.facts for which, worker in open_sides.items()}
    line |= _numbers(match, samples) | disturbed | {"facts": facts}
    line["roofline"] = roofline(line, facts["ours"], machine)
    line["note"] = "; ".join([line["note"], *_notes(line, samples)]).removeprefix("; ")
    return line


def skipped(match: Match, machine: Mapping[str, Any], why: str) -> dict[str, Any]:
    """Returns the line of a match that is not played."""
    return {**_blank(match, machine), "note": why}


def _notes(line: Mapping[str, Any], samples: Mapping[str, list[dict]]) -> list[str]:
    """Returns what must be known beside the numbers."""
    notes = []
    if not line["facts"]["ours"].get("same_as_uncached", True):
        notes.append("the ids differ from those of the path without a cache")
    short = [x["loss"] for x in samples.get("peer", []) if not x.get("reached", True)]
    if short:
        losses = ", ".join(f"{loss:.4f}" for loss in short)
        notes.append(
            f"{line['peer_name']} ended {len(short)} of {len(samples['peer'])} runs "
            f"before it reached that loss (at {losses}): its whole time counts"
        )
    return notes


def _blank(match: Match, machine: Mapping[str, Any]) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "row": match.row,
        "shape": match.shape,
        "ours": None,
        "peer": None,
        "peer_name": match.peer.name if match.peer else None,
        "unit": match.unit,
        "ratio": None,
        "goal": match.goal,
        "spread": {},
        "note": "",
        "failed": False,
        "load": os.getloadavg()[0],
        "date": now,
        "machine": dict(machine),
    }


def interleave(
    sides: Mapping[str, Any], *, repeats: int
) -> tuple[dict[str, list[dict]], dict[str, float | None]]:
    """Lets every side measure in turn, `repeats` times: A B A B ...

    Args:
      sides: by name, things with `go()` and `cpu_seconds()`.
      repeats: turns of each.

    Returns:
      The samples of each side; and what disturbed them, in cores: "idle_cpu", the most
      that a side used while it had to wait, and "others_cpu", what other processes used
      in the mean. None where that is not known.
    """
    samples: dict[str, list[dict]] = {name: [] for name in sides}
    idle, others, seconds = [], [], []
    for _ in range(repeats):
        for name in sides:
            before, started = _used(sides), time.perf_counter()
            samples[name].append(sides[name].go())
            spent, used = time.perf_counter() - started, _used(sides)
            if None in (*before.values(), *used.values()) or spent < SHORT_SECONDS:
                continue
            more = {key: used[key] - before[key] for key in used}
            everyone = more.pop("everyone")
            idle += [more[other] / spent for other in sides if other != name]
            others.append(everyone - sum(more.values()))
            seconds.append(spent)
    share = max(0.0, sum(others) / sum(seconds)) if seconds else None
    return samples, {"idle_cpu": max(idle, default=None), "others_cpu": share}


def _used(sides: Mapping[str, Any]) -> dict[str, Any]:
    used = {name: side.cpu_seconds() for name, side in sides.items()}
    return used | {"everyone": busy_seconds()}


def more_is_better(unit: str) -> bool:
    """Whether a value of that unit is a speed."""
    return unit.endswith("/s")


def speed_ratio(ours: float, peer: float, unit: str) -> float:
    """Returns ours / peer as speeds: 2 means twice as fast (or half the memory)."""
    return ours / peer if more_is_better(unit) else peer / ours


def spread(values: Sequence[float]) -> float:
    """Returns the interquartile range over the median; 0 for one value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def _numbers(match: Match, samples: Mapping[str, list[dict]]) -> dict[str, Any]:
    values = {name: [x["value"] for x in rows] for name, rows in samples.items()}
    middle = {name: statistics.median(found) for name, found in values.items()}
    spreads = {name: spread(found) for name, found in values.items()}
    numbers: dict[str, Any] = {**middle, "samples": values, "spread": spreads}
    numbers["extra"] = {
        name: {k: v for k, v in _median_row(rows).items() if k != "value"}
        for name, rows in samples.items()
    }
    if "peer" in values:
        numbers["ratio"] = speed_ratio(middle["ours"], middle["peer"], match.unit)
        pairs = zip(values["ours"], values["peer"], strict=True)
        spreads["ratio"] = spread([speed_ratio(*pair, match.unit) for pair in pairs])
    return numbers


def _median_row(rows: list[dict]) -> dict:
    """Returns the sample whose value is nearest the median."""
    middle = statistics.median(x["value"] for x in rows)
    return min(rows, key=lambda row: abs(row["value"] - middle))


def met(line: Mapping[str, Any]) -> bool | None:
    """Whether a line reaches its goal; None when that is not known."""
    if line["goal"] is None or line["ours"] is None:
        return None
    if line["peer_name"] is None:
        return line["ours"] <= line["goal"]
    return None if line["ratio"] is None else line["ratio"] >= line["goal"]


def roofline(
    line: Mapping[str, Any], facts: Mapping[str, Any], machine: Mapping[str, Any]
) -> dict[str, float]:
    """Returns which share of the machine's ceilings our side reached.

    A side that knows its work says in its facts how many FLOPs ("flops") and how many
    bytes read or written ("bytes") one unit of its value needs.
    """
    ceilings = {"flops": machine["gflops"] * 1e9, "bytes": machine["gbytes_s"] * 1e9}
    if not more_is_better(line["unit"]):
        return {}
    return {
        kind: line["ours"] * facts[kind] / ceiling
        for kind, ceiling in ceilings.items()
        if facts.get(kind)
    }
