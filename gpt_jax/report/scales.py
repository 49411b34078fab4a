"""What a sweep's figures show: which settings, in which range, what is best.

Only settings that were trained to their end set a scale or a colour: one that diverged
would leave no difference to be seen between the others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt_jax.report import results as tables
from gpt_jax.report.results import Axis, Band, Results, Row

MOST_CURVES = 200  # more are not told apart; the best ones are drawn
COSTS = {
    "parameters": "parameters",
    "flops": "FLOPs of a run",
    "tokens": "tokens of a run",
    "bytes": "bytes of text of a run",
    "seconds": "seconds of a run",
}


def spent(results: Results) -> dict[str, str]:
    """Returns the costs that differ between settings, that of the sweep first."""
    rows, own = tables.valued(results), results["cost"]
    found = {}
    for key in dict.fromkeys([*filter(None, [own]), *COSTS]):
        known = [tables.cost(row, key) for row in rows]
        if (key == own or all(known)) and len({*known} - {None}) > 1:
            found[key] = COSTS.get(key, key)
    return found


def stairs(results: Results, name: str, key: str) -> tuple[list[int], list[float]]:
    """Returns from which step on a member's weights had which number, to the end."""
    changes = results["evolved"][name]
    end = next(row["step"] for row in results["trials"] if row["name"] == name)
    values = [numbers[key] for _, numbers in changes]
    return [*(step for step, _ in changes), end], [*values, values[-1]]


def positive(results: Results, cost: str) -> bool:
    """Whether a cost can stand on a logarithmic axis."""
    known = [tables.cost(row, cost) for row in tables.valued(results)]
    return all(x > 0 for x in known if x is not None)


def drawn(results: Results) -> list[Row]:
    """Returns the settings whose curves are drawn, best first."""
    return [row for row in results["settings"] if row["step"]][:MOST_CURVES]


def band_of(out: Path, results: Results, row: Row) -> Band:
    """Returns a setting's curve: of the seeds that are done, else of all it has."""
    status = {trial["name"]: trial["status"] for trial in results["trials"]}
    done = [name for name in row["trials"] if status[name] == "done"]
    names = done or row["trials"]
    return tables.band(tables.curve(out / name, results["metric"]) for name in names)


def last_step(rows: list[Row]) -> int:
    """Returns where the axis of the steps ends."""
    sound = [row for row in rows if row["status"] not in ("diverged", "failed")]
    return max((row["steps"] for row in sound or rows), default=1)


def best_label(row: Row, word: str) -> str:
    """Returns what the best setting's line is called."""
    return f"best: {word or tables.brief(row['name'], 60)}"


def best_of_each(results: Results, axis: Axis, rows: list[Row]) -> dict[Any, float]:
    """Returns value of an axis -> the best result there, in the axis's order."""
    choose = min if results["direction"] == "minimize" else max
    found: dict[Any, float] = {}
    for row in rows:
        value = of(row, axis)
        found[value] = choose(found.get(value, row["value"]), row["value"])
    return {value: found[value] for value in axis.values if value in found}


def place(row: Row, axis: Axis) -> float:
    """Returns where a setting stands along an axis; words stand at 0, 1, 2, ..."""
    value = of(row, axis)
    return value if axis.numeric else axis.values.index(value)


def can_stand(row: Row, axis: Axis) -> bool:
    """Whether a setting has a place on an axis."""
    return not axis.log or of(row, axis) > 0


def diverged(results: Results, axis: Axis, shown: Sequence[float]) -> list[float]:
    """Returns where settings diverged, within what is drawn: they set no scale."""
    rows = [row for row in results["settings"] if row["status"] == "diverged"]
    places = {place(row, axis) for row in rows if can_stand(row, axis)}
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return sorted(x for x in places if not axis.numeric or low <= x <= high)


def worst_end(results: Results, ends: list[float]) -> float:
    """Returns the place just inside the bad end of an axis of the metric."""
    bad, good = ends[::-1] if results["direction"] == "minimize" else ends
    return bad + 0.03 * (good - bad)


def clip(results: Results) -> tuple[float, float]:
    """Returns the range in which differences matter: hopeless settings are left out."""
    ends = [row["value"] for row in tables.valued(results)]
    return clip_values(ends, results["direction"]) if ends else (0.0, 1.0)


def clip_values(ends: list[float], direction: str) -> tuple[float, float]:
    """Returns the range of results without those that are hopeless."""
    low, high, middle = min(ends), max(ends), float(np.median(ends))
    if direction == "minimize":
        return low, min(high, max(middle + 4 * (middle - low), low + 1e-9))
    return max(low, min(middle - 4 * (high - middle), high - 1e-9)), high


def interesting(results: Results, pad: float = 0.06) -> list[float]:
    """Returns the range of an axis of the metric, so that differences can be seen."""
    low, high = clip(results)
    room = (high - low) * pad or 0.05 * max(abs(high), 0.1)
    more = 4 * room if pad < 0.1 else room
    if results["direction"] == "minimize":
        return [low - room, high + more]
    return [low - more, high + room]


def curve_range(out: Path, results: Results) -> list[float]:
    """Returns the range for curves: the best one is seen from a sixth of its steps."""
    low, high = interesting(results)
    if best := tables.best_of(results):
        found = band_of(out, results, best)
        late = [y for x, y in zip(found.steps, found.mean) if x >= found.steps[-1] / 6]
        low, high = min([low, *late]), max([high, *late])
    return [low, high]


def of(row: Row, axis: Axis) -> Any:
    """Returns what a row has on an axis."""
    return tables.at(row, axis.key)
