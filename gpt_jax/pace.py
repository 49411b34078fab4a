"""How many steps fit into the time that is left: what a run with fit_seconds asks.

A run is made in sittings. The first is short and measures; the next ends just before
the rate decays, where the number of steps can still be changed without changing what
was done; the last ends when the time does.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

OPEN = 10**9  # the end of a run that is not known yet
TRIAL = 40  # steps of the first sitting
SHARE = 0.9  # of the steps before the decay, after which they are counted anew
START = 5  # steps of a sitting that are not measured: they wait for the compiler


class Plan(NamedTuple):
    """Where the next sitting ends, and where the run does; 0 = not known yet."""

    end: int
    last: int


class Pace(NamedTuple):
    """What a sitting took.

    Attributes:
      step: seconds of a step.
      pause: seconds of an evaluation, with the checkpoint that comes with it.
      rest: seconds of all else: building, compiling, the report at the end.
    """

    step: float
    pause: float
    rest: float


def measure(
    rows: Sequence[Mapping[str, Any]], begin: int, end: int, wall: float
) -> Pace | None:
    """Returns the pace of the sitting from step `begin` to `end`.

    Args:
      rows: of the run's record.
      wall: seconds of the whole sitting.

    Returns:
      None where fewer than two of its lines tell the time of a step.
    """
    lines = {
        row["step"]: row["seconds"]
        for row in rows
        if "grad_norm" in row and min(begin + START, end - 1) <= row["step"] <= end
    }
    pauses = {row["step"] for row in rows if "val_loss" in row}
    gaps = [
        (b - a, lines[b] - lines[a], sum(a <= at < b for at in pauses))
        for a, b in itertools.pairwise(sorted(lines))
    ]
    if not gaps:
        return None
    plain = [gap for gap in gaps if not gap[2]] or gaps
    step = sum(took for _, took, _ in plain) / sum(n for n, _, _ in plain)
    # The least: the first of a sitting compiles.
    pause = min(((took - n * step) / held for n, took, held in gaps if held), default=0)
    pause = max(0.0, pause)
    held = sum(begin < at <= end for at in pauses)
    return Pace(step, pause, max(0.0, wall - step * (end - begin) - pause * held))


def steps(pace: Pace, done: int, left: float, round_to: int, every: int) -> int:
    """Returns the last step of a run that has made `done` and has `left` seconds.

    It is a multiple of `round_to`, and at least one round further. Evaluations come
    each `every` steps, 0 = never, and at the end.
    """
    each = max(pace.step, 1e-9)
    dense = each + (pace.pause / every if every else 0.0)
    last = done + math.floor(max(0.0, left - pace.rest) / each)
    while last > done:
        pauses = last // every - done // every if every else 0
        pauses += not every or last % every > 0
        took = (last - done) * each + pauses * pace.pause + pace.rest
        if took <= left:
            break
        last -= max(1, math.floor((took - left) / dense))
    return max(last, done + round_to) // round_to * round_to


def then(plan: Plan, last: int, decay: float, done: int, round_to: int) -> Plan:
    """Returns what follows a plan that was not the last one.

    After the first, whose evaluations were few, the steps are counted once more before
    the rate decays.

    Args:
      plan: what was done.
      last: the last step, as it seems now.
      decay: the share of all steps in which the rate decays.
      done: steps so far.
      round_to: ends are multiples of it.
    """
    stop = int(last * (1 - decay) * SHARE) // round_to * round_to
    return (
        Plan(stop, last) if not plan.last and done < stop < last else Plan(last, last)
    )
