"""Several runs side by side: what each scored, and what it gained on the first."""

from collections.abc import Mapping
from typing import Any

from gpt_jax.evaluate import scores

# By the row's number in the test file, by name; None = no score.
Scored = Mapping[int, Mapping[str, float | None]]


def gain(
    found: dict[str, dict[str, Any]], scored: Mapping[str, Scored], *, seed: int
) -> None:
    """Adds to each summary but the first its "gain": paired, row by row.

    Args:
      found: summaries by run; see `answers.summary`.
      scored: what they were taken from. A run that answered other rows than the first
        gets no gain.
      seed: of the bootstrap.
    """
    first, *others = found
    for name in others:
        if scored[name].keys() == scored[first].keys():
            found[name]["gain"] = {
                score: scores.bootstrap(gains, seed=seed)._asdict()
                for score in next(iter(scored[name].values()))
                if (gains := _gains(scored[first], scored[name], score))
            }


def table(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list]]:
    """Returns heads and lines: one for every run, and one for what it gained."""
    first, summary = next(iter(found.items()))
    names = [name for name in summary if isinstance(summary[name], dict)]
    names = [name for name in names if "low" in summary[name]]
    heads = ["run", "rows", *names, "ended by itself", "length", "empty", "left out"]
    lines = []
    for run, n in found.items():
        means = [mean(n[name]) for name in names]
        ended = (f"{n['ended']:.0f} %", f"{n['length']:.2f}x", n["empty"], _left(n))
        lines.append([run, n["rows"], *means, *ended])
        if "gain" in n:
            gains = n["gain"]  # without a judge's where it scored no row of both
            means = [mean(gains[k], sign="+") if k in gains else "" for k in names]
            lines.append([f"{run} - {first}", "", *means, "", "", "", ""])
    return heads, lines


def mean(interval: Mapping[str, float], sign: str = "") -> str:
    """Returns a mean and its interval in words; sign "+" marks a difference."""
    parts = (f"{interval[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return "{} [{}, {}]".format(*parts)


def _gains(before: Scored, after: Scored, score: str) -> list[float]:
    pairs = [(before[number][score], after[number][score]) for number in before]
    return [b - a for a, b in pairs if a is not None and b is not None]


def _left(summary: Mapping[str, Any]) -> str:
    parts = [f"{number} {reason}" for reason, number in summary["skipped"].items()]
    prose = summary.get("judge", {}).get("prose", 0)
    parts += [f"{prose} without a number"] if prose else []
    return ", ".join(parts) or "0"
