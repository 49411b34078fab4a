"""Is a change better, or was it luck? Two configs, pair after pair, until it is known.

Both sides train with the same seeds, so with the same data order and first weights: a
pair's difference is free of what they share. After every round the differences are
judged by a test that may be read at any time (sequential.py), and the duel ends as soon
as that decides. Every verdict is a line of duels.jsonl, from which it can be computed
again (`replay`).
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import files, metrics, names, population, runs, sequential, train
from gpt_jax.criterion import Criterion
from gpt_jax.seeds import SEED
from gpt_jax.sequential import Evidence, Verdict

LEDGER = "duels.jsonl"
SIDES = ("a", "b")
# What decides whether numbers of two sides mean the same.
OF_DATA = (
    r"data\.(source|field|tokenizer|val_fraction|split|seq_len|stride|skip_bad_docs)",
    r"eval_(windows|every)|early_from|model\.(context_length|vocab_size)",
    r"task\.(name|template|test_fraction|kind|shortest|longest|held_out)",
)
LIMITS = ("max_tokens", "max_bytes", "max_seconds", "patience")
EXACT = 1e-9  # relative: what a replay may differ by


class Duel(NamedTuple):
    """What is compared, and by what rule it ends.

    Attributes:
      told: what the two sides are called, as typed.
      configs: of the two sides; their seeds do not count.
      criterion: the number that decides, and which way is better.
      within: a difference that small is none, in units of the metric.
      alpha: see `sequential.verdict`.
      first: the first seed.
      seeds: how many pairs at most.
      at_once: pairs of a round, after which the test is read.
    """

    told: tuple[str, str]
    configs: tuple[Any, Any]
    criterion: Criterion
    within: float
    alpha: float
    first: int
    seeds: int
    at_once: int


class Outcome(NamedTuple):
    """How a duel stands: pairs as (seed, value of a, value of b), and what they say.

    `verdict` is None where a signal ended it before the first round.
    """

    pairs: list[tuple[int, float, float]]
    verdict: Verdict | None
    evidence: Evidence | None
    exit_code: int = 0


def fight(duel: Duel, out: str | Path, tell: Callable[[str], None]) -> Outcome:
    """Trains pairs until the test decides, going on with what is there.

    Args:
      duel: which.
      out: gets the run folders a/seed=0, b/seed=0, ...; the ledger stands beside it.
      tell: told a line after every round.

    Raises:
      ValueError: the sides cannot be compared, or a run folder holds another run;
        nothing was overwritten.
      FloatingPointError: a run of a side diverged, so it has no loss to compare.
    """
    check(duel)
    out, pairs = files.expand(out), []
    verdict = found = None
    while len(pairs) < duel.seeds:
        begin = duel.first + len(pairs)
        count = min(duel.at_once, duel.seeds - len(pairs))
        fresh, code = trained(duel, out, range(begin, begin + count))
        if code:
            return Outcome(pairs, verdict, found, code)
        pairs += fresh
        verdict, found = judged(duel, pairs)
        tell(in_words(duel, verdict, found))
        note(out.parent / LEDGER, duel, Outcome(pairs, verdict, found))
        if verdict.word != "not yet":
            break
    return Outcome(pairs, verdict, found)


def check(duel: Duel) -> None:
    """Refuses sides of which one number each would say nothing.

    Raises:
      ValueError: names what differs.
    """
    duel.criterion.check()
    for name, value, least in (
        ("seeds", duel.seeds, 2),
        ("at_once", duel.at_once, 1),
        ("first", duel.first, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}: it must be at least {least}")
    if not (0 < duel.alpha < 1 and math.isfinite(duel.within) and duel.within >= 0):
        raise ValueError(
            f"alpha is {duel.alpha} and within {duel.within}: alpha must be between 0 "
            "and 1, within a difference that counts as none"
        )
    a, b = duel.configs
    for config in duel.configs:
        train.check(config)
    lines = runs.difference(a, b)
    if other := [line for line in lines if line.startswith(f"{SEED}:")]:
        raise ValueError(
            f"the sides differ in their seed ({other[0]}): a duel gives both the same "
            "seeds; leave it as it is"
        )
    data = [line for line in lines if _is(line, OF_DATA)]
    if data:
        raise ValueError(
            "the sides differ in their data or in what they are judged on, so their "
            f"numbers do not compare: {'; '.join(data)}"
        )
    budgets = [budget(config) for config in duel.configs]
    if budgets[0] != budgets[1]:
        shown = [
            f"{key} {x:g} and {y:g}"
            for (key, x), y in zip(budgets[0].items(), budgets[1].values(), strict=True)
            if x != y
        ]
        raise ValueError(
            f"the sides differ in their budget: {'; '.join(shown)}; a longer run is "
            "better for that alone, so give both the same"
        )


def budget(config: Any) -> dict[str, float]:
    """Returns what a config may spend: examples, and the limits that end it sooner."""
    spent = {"steps x batch_size": config.steps * config.batch_size}
    return spent | {key: config[key] for key in LIMITS}


def together(configs: Sequence[Any]) -> bool:
    """Whether both sides can train as one population."""
    alike = len(population.group(configs)) == 1
    task = configs[0].task
    return alike and task.name != "grpo" and not task.get("buckets")


def trained(
    duel: Duel, out: Path, seeds: Sequence[int]
) -> tuple[list[tuple[int, float, float]], int]:
    """Returns the pairs of these seeds, trained where they are not yet; an exit code.

    The code is that of a signal, 0 without one.
    """
    configs, folders = [], []
    for seed in seeds:
        for side, config in zip(SIDES, duel.configs, strict=True):
            mine = config.copy_and_resolve_references()
            mine.seed = seed
            configs.append(mine)
            folders.append(out / side / f"seed={seed}")
    if together(duel.configs):
        quiet: dict[str, Any] = {"report": lambda *told: None}
        results = population.train(configs, folders, members=0, rungs=[], **quiet)
    else:
        results = []
        for config, folder in zip(configs, folders, strict=True):
            results.append(train.train(config, folder))
            if results[-1].exit_code:
                break
    if code := next((r.exit_code for r in results if r.reason == "signal"), 0):
        return [], code
    for folder, result in zip(folders, results, strict=True):
        if result.reason == "diverged":
            raise FloatingPointError(
                f"{folder} diverged, so it has no loss to compare: that side is not "
                "better; lower its learning rate"
            )
    values = [value_of(folder, duel.criterion) for folder in folders]
    return [
        (seed, *values[2 * i : 2 * i + 2])  # type: ignore[misc]
        for i, seed in enumerate(seeds)
    ], 0


def value_of(folder: Path, criterion: Criterion) -> float:
    """Returns the number of a run that counts.

    Raises:
      ValueError: the run records no such number.
    """
    rows = metrics.read(folder)
    points = metrics.points(rows, criterion.metric)
    if not points:
        known = {key for row in rows for key in row} - {"step"}
        names.choose("metric", criterion.metric, sorted(known))
    return criterion.of(points)[0]


def judged(
    duel: Duel, pairs: Sequence[tuple[int, float, float]]
) -> tuple[Verdict, Evidence]:
    """Returns what pairs say of side b against side a."""
    return sequential.verdict(
        [b - a for _, a, b in pairs],
        within=duel.within,
        direction=duel.criterion.direction,
        alpha=duel.alpha,
    )


def in_words(duel: Duel, verdict: Verdict, found: Evidence) -> str:
    """Returns one line on how a duel stands."""
    sure = f"{1 - duel.alpha:.0%}"
    bounds = f"{sure} interval {found.low:+.4f} to {found.high:+.4f}, at any time"
    metric = duel.criterion.metric
    said = f"b - a in {metric} {found.mean:+.4f} ({bounds}) after {found.n} seeds"
    words = {
        "better": "b is better",
        "worse": "b is worse",
        "no difference": f"no difference within {duel.within:g}",
    }
    if verdict.word in words:
        return f"{words[verdict.word]}: {said}"
    more = f"about {verdict.more}"
    if verdict.more > sequential.MOST:
        more = f"more than {sequential.MOST:,}"
    return f"not yet: {said}; {more} more seeds would decide"


# --- the ledger -----------------------------------------------------------------------


def note(path: Path, duel: Duel, outcome: Outcome) -> None:
    """Adds how a duel stands to the ledger, as one line."""
    assert outcome.verdict and outcome.evidence
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sides": list(duel.told),
        "differ": runs.difference(*duel.configs),
        "criterion": list(duel.criterion),
        "within": duel.within,
        "alpha": duel.alpha,
        "spread": sequential.SPREAD,
        "pairs": outcome.pairs,
        "verdict": outcome.verdict.word,
        "more": outcome.verdict.more,
        "mean": outcome.evidence.mean,
        "interval": [_number(outcome.evidence.low), _number(outcome.evidence.high)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as ledger:
        ledger.write(json.dumps(line, allow_nan=False) + "\n")
        ledger.flush()
        os.fsync(ledger.fileno())


class Replayed(NamedTuple):
    """A line of a ledger and what its pairs say now.

    Attributes:
      line: as it was written.
      verdict, evidence: computed again.
      same: whether they are what was written.
    """

    line: Mapping[str, Any]
    verdict: Verdict
    evidence: Evidence
    same: bool


def replay(path: str | Path) -> list[Replayed]:
    """Computes every verdict of a ledger again from its pairs.

    Raises:
      FileNotFoundError: there is no ledger.
      ValueError: a line is not one of a ledger.
    """
    path = files.expand(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a duel writes it")
    found = []
    for number, text in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            criterion = Criterion(*line["criterion"])
            verdict, evidence = sequential.verdict(
                [b - a for _, a, b in line["pairs"]],
                within=line["within"],
                direction=criterion.direction,
                alpha=line["alpha"],
            )
            wanted = [line["mean"], *map(_bound, line["interval"], (-1, 1))]
            said = (line["verdict"], line["more"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is not of a ledger ({error!r}): put the file "
                "back, or delete that line"
            ) from error
        numbers = zip(wanted, (evidence.mean, evidence.low, evidence.high))
        same = said == tuple(verdict) and all(
            math.isclose(x, y, rel_tol=EXACT, abs_tol=EXACT) for x, y in numbers
        )
        found.append(Replayed(line, verdict, evidence, same))
    return found


def _is(line: str, patterns: Sequence[str]) -> bool:
    """Whether a line of `runs.difference` is of a key that one of these matches."""
    key = line.partition(":")[0]
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _bound(value: float | None, sign: int) -> float:
    return sign * math.inf if value is None else value
