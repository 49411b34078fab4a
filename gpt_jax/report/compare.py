"""Any run folders side by side: which is better, and what the seeds say of it.

Runs whose configs differ in the seed only are one setting, tried several times: their
mean is what is compared, and settings that share seeds in pairs of one seed (seeds.py).
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import files, metrics, names, runs, seeds
from gpt_jax.criterion import Criterion
from gpt_jax.report import results as tables
from gpt_jax.report.results import Curve
from gpt_jax.seeds import SEED, Difference, Mean

ABSENT = "(absent)"
MOST_KEYS = 3  # that a setting is told by
# Of keys that tell settings apart equally well, those of the first group are shown.
FIRST = ("model.", "optimizer.", "hyper.", "task.", "adapter.", "", "data.")
NO_PAIRS = (
    "No other setting has two seeds in common with the first: whether a difference is "
    "more than chance cannot be told (train all with the same seeds)."
)
OF_TEXT = re.compile(r"data\.(source|field|val_fraction|split)|eval_windows")


class Run(NamedTuple):
    """A run.

    Attributes:
      folder: where it is.
      curve: its evaluations.
      keys: its config, as dotted keys.
      state: done, pruned, diverged, failed or unfinished.
      value: the metric, at the best or the last evaluation; None where it says nothing.
    """

    folder: Path
    curve: Curve
    keys: dict[str, Any]
    state: str
    value: float | None


class Setting(NamedTuple):
    """Runs that differ in the seed only.

    Attributes:
      name: that of its run folder, less the seed.
      told: the keys that tell it from the others, at most three, as text.
      runs: seed -> run.
      mean: over the runs that are done, else over all that have a value.
      state: the worst of its runs.
    """

    name: str
    told: str
    runs: dict[int, Run]
    mean: Mean | None
    state: str

    @property
    def values(self) -> dict[int, float]:
        """The values that the mean is of, by seed."""
        return {seed: run.value for seed, run in counted(self.runs).items()
                if run.value is not None}  # fmt: skip


class Pair(NamedTuple):
    """Setting b against setting a: their difference, and p corrected (Holm)."""

    a: str
    b: str
    difference: Difference
    p: float


class Comparison(NamedTuple):
    """What `compare` found.

    Attributes:
      metric, direction: what was compared.
      settings: best first.
      pairs: the others against the best, or against the one that was asked for.
      tests: how many pairs these were chosen from.
      differ: the keys whose values differ between settings.
      notes: sentences on what makes values incomparable.
    """

    metric: str
    direction: str
    settings: list[Setting]
    pairs: list[Pair]
    tests: int
    differ: list[str]
    notes: list[str]


def compare(
    folders: Sequence[Path],
    *,
    metric: str = "",
    direction: str = "",
    at: str = "",
    against: str = "",
) -> Comparison:
    """Returns the settings of run folders, and their paired differences.

    Args:
      folders: run folders.
      metric: a name in metrics.jsonl; "" = that of the sweep that the runs are of, else
        val_loss, or val_bpb where the tokenizers differ.
      direction: minimize or maximize it; "" = the sweep's, else minimize.
      at: which evaluation counts, see `Criterion`; "" = the sweep's, else the best.
      against: the run folder, or the name, of the setting that the others are compared
        with; "" = the best.

    Raises:
      ValueError: a folder is no run, lacks the metric, or is there twice; the metric is
        per token and the tokenizers differ.
    """
    folders = [Path(folder) for folder in folders]
    if not folders:
        raise ValueError("there are no runs to compare")
    sweep = _sweep_of(folders)
    metric, notes = _comparable(folders, metric or sweep.get("metric", ""))
    direction = direction or sweep.get("direction", "minimize")
    criterion = Criterion(metric, direction, at or sweep.get("at", "best"))
    criterion.check()
    found = [_open(folder, criterion) for folder in folders]
    if not any(run.curve.values for run in found):
        raise _lacks(folders[0], metric)
    if criterion.words:
        notes.append(f"Of each run the {criterion.words} counts.")
    notes += _texts(found)
    settings, differ = _settings(found, direction)
    first = _against(settings, against)
    pairs = [(other, seeds.difference(first.values, other.values))
             for other in settings if other is not first]  # fmt: skip
    known = [(other, pair) for other, pair in pairs if pair]
    # The best was chosen by what was measured: it stands for all pairs.
    count = len(settings) - 1
    tests = count if against else count * len(settings) // 2
    ps = seeds.holm([pair.p for _, pair in known], tests)
    return Comparison(
        metric=metric,
        direction=direction,
        settings=settings,
        pairs=[Pair(first.name, o.name, d, p) for (o, d), p in zip(known, ps)],
        tests=tests,
        differ=differ,
        notes=notes,
    )


# --- in words -------------------------------------------------------------------------


def lines(found: Comparison) -> list[str]:
    """Returns the comparison as lines for a terminal."""
    first = found.pairs[0].a if found.pairs else ""
    rows = [("run", found.metric, "seeds", first and f"less {first}", "", "")]
    against = {pair.b: pair for pair in found.pairs}
    for one in found.settings:
        pair = lead(against[one.name]) if one.name in against else ""
        told = (one.name, said(one), str(len(one.runs)), pair, one.told, mark(one))
        rows.append(told)
    shown = [i for i in range(len(rows[0])) if any(row[i] for row in rows)]
    widths = {i: max(len(row[i]) for row in rows) for i in shown}
    text = ["  ".join(row[i].ljust(widths[i]) for i in shown).rstrip() for row in rows]
    for sentence in [*found.notes, *sentences(found)]:
        text += ["", sentence]
    return text


def lead(pair: Pair) -> str:
    """Returns a difference with its interval and how likely chance makes it."""
    mean = pair.difference.mean
    return f"{mean.value:+.4f} [{mean.low:+.4f}, {mean.high:+.4f}] p {pair.p:.2g}"


def counted(members: dict[int, Run]) -> dict[int, Run]:
    """Returns the runs that are done; all where none is."""
    done = {seed: run for seed, run in members.items() if run.state == "done"}
    return done or members


def said(setting: Setting) -> str:
    """Returns a setting's value, with the interval of its mean where it has one."""
    if setting.mean is None:
        return "-"
    mean = setting.mean
    if math.isnan(mean.error):
        return f"{mean.value:.4f}"
    return f"{mean.value:.4f} [{mean.low:.4f}, {mean.high:.4f}]"


def mark(setting: Setting) -> str:
    """Returns what keeps a setting from being compared as it is, "" for nothing."""
    states = [run.state for run in setting.runs.values()]
    worst = {state: states.count(state) for state in states if state != "done"}
    if len(states) == 1:
        return "".join(worst)
    return ", ".join(f"{number} {state}" for state, number in worst.items())


def sentences(found: Comparison) -> list[str]:
    """Returns what the pairs say."""
    if not found.pairs:
        return [NO_PAIRS] if len(found.settings) > 1 else []
    first = found.pairs[0].a
    sure = [pair.b for pair in found.pairs if pair.p < 1 - seeds.SURE]
    verdict = "No difference is more than what seeds do by themselves."
    if sure:
        verdict = f"Told from {first} by more than chance: {', '.join(sure)}."
    how = "Differences are means over pairs of one seed, with their 95 % interval"
    if found.tests > 1:
        how += f"; p is after Holm's correction for {found.tests} comparisons"
    if found.tests > len(found.settings) - 1:
        how += ", all that were possible, since the best was chosen by these values"
    return [f"{how}.", verdict]


def plain(found: Comparison) -> dict:
    """Returns the comparison ready for JSON."""
    return {
        "metric": found.metric,
        "direction": found.direction,
        "best": found.settings[0].name,
        "settings": [
            {
                "name": setting.name,
                "told_by": setting.told,
                "state": setting.state,
                "values": setting.values,
                **_numbers(setting.mean),
                "runs": {seed: str(run.folder) for seed, run in setting.runs.items()},
            }
            for setting in found.settings
        ],
        "pairs": [
            {"a": p.a, "b": p.b, **_numbers(p.difference.mean), "p_holm": p.p}
            for p in found.pairs
        ],
        "comparisons": found.tests,
        "notes": found.notes,
    }


def _numbers(mean: Mean | None) -> dict[str, float | int | None]:
    found = mean._asdict() if mean else {}
    return {
        name: found[key] if key in found and not math.isnan(found[key]) else None
        for name, key in (
            *(("mean", "value"), ("n", "n"), ("standard_error", "error")),
            *(("low", "low"), ("high", "high")),
        )
    }


# --- runs -----------------------------------------------------------------------------


def _sweep_of(folders: list[Path]) -> dict:
    """Returns results.json of the sweep that all runs are trials of, else {}."""
    parents = {folder.absolute().parent for folder in folders}
    if len(parents) > 1:
        return {}
    try:
        text = (parents.pop() / "results.json").read_text(encoding="utf-8")
        found = {"at": "best", **json.loads(text)}
        return {key: found[key] for key in Criterion._fields}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _comparable(folders: list[Path], metric: str) -> tuple[str, list[str]]:
    """Returns the metric to compare by, and a note where that is not the obvious one.

    Raises:
      ValueError: it is per token and the tokenizers differ.
    """
    wanted = metric or "val_loss"
    different = {_tokenizer(folder) for folder in folders}
    name, _, kind = wanted.rpartition("_")
    recorded = [_recorded(folder) for folder in folders]
    per_token = kind in ("loss", "perplexity") and any(
        f"{name}_perplexity" in names for names in recorded
    )
    if len(different) == 1 or not per_token:
        return wanted, []
    bits = f"{name}_bpb"
    if metric or not all(bits in found for found in recorded if found):
        raise ValueError(
            f"these runs have different tokenizers, and {wanted} is per token, so it "
            f"cannot rank them: use --metric={bits}, bits per byte"
        )
    return bits, [f"The tokenizers differ, so {bits}, bits per byte, is compared."]


def _tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    return files.digest_of(path) if path.is_file() else ""


def _recorded(folder: Path) -> set[str]:
    """Returns the names in a run's record."""
    return {name for row in _rows(folder) for name in row}


def _rows(folder: Path) -> list[dict]:
    return metrics.read(folder) if (folder / metrics.FILE).is_file() else []


def _texts(found: list[Run]) -> list[str]:
    """Returns a note where runs were not evaluated on the same text."""
    keys = {key for run in found for key in run.keys if OF_TEXT.fullmatch(key)}
    differ = [key for key in sorted(keys) if _differs(found, key)]
    if not differ:
        return []
    return [
        f"Not all were evaluated on the same text ({', '.join(differ)}): values of "
        "different texts do not say which run is better."
    ]


def _open(folder: Path, criterion: Criterion) -> Run:
    keys, curve = _keys(folder), tables.curve(folder, criterion.metric)
    state = _state(folder, keys, criterion.metric)
    if not curve.values and state == "done":
        raise _lacks(folder, criterion.metric)
    if state == "done" and len(curve.values) < criterion.fewest:
        raise ValueError(
            f"{folder} has {len(curve.values)} evaluations of {criterion.metric}, not "
            f"the {criterion.fewest} whose mean is asked for"
        )
    value = None
    if curve.values and state not in ("diverged", "failed"):
        value, _ = criterion.of(list(zip(*curve)))
    return Run(folder, curve, keys, state, value)


def _keys(folder: Path) -> dict[str, Any]:
    """Returns a run's config, also of a trial that failed before it was a run."""
    if not (folder / "config.json").is_file() and "config" in (
        told := _outcome(folder)
    ):
        return runs.flat(runs.as_config(told["config"]))
    return runs.flat(runs.read_config(folder))


def _outcome(folder: Path) -> dict:
    """Returns what a sweep wrote of how its trial ended, {} where it did not."""
    try:
        return json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _lacks(folder: Path, metric: str) -> ValueError:
    known = sorted(_recorded(folder) - {"step"})
    near = names.did_you_mean(metric, known)
    return ValueError(
        f"{folder} has no {metric!r} in its metrics.jsonl: it was not evaluated, or "
        f"another --metric is meant{near}"
    )


def _state(folder: Path, keys: dict[str, Any], metric: str) -> str:
    """Returns how far a run got: done, pruned, diverged, failed or unfinished."""
    rows = _rows(folder)
    step = rows[-1]["step"] if rows else 0
    values = [row[metric] for row in rows if metric in row]
    if values and values[-1] is None:
        return "diverged"
    if note := runs.ended(folder):
        return note[0]
    if step >= keys["steps"]:
        return "done"
    told = _outcome(folder)
    if told.get("step", -1) >= step or told.get("status") == "failed":
        return told["status"]
    for key in ("tokens", "bytes"):
        spent = max((row.get(key, 0) for row in rows), default=0)
        if 0 < keys.get(f"max_{key}", 0) <= spent:
            return "done"
    return "unfinished"


# --- settings -------------------------------------------------------------------------


def _settings(found: list[Run], direction: str) -> tuple[list[Setting], list[str]]:
    """Returns the settings, best first, and the keys that differ between them."""
    where = re.compile("|".join(runs.WHERE))
    groups: dict[str, dict[int, Run]] = {}
    for run in found:
        own = {key: x for key, x in run.keys.items() if not where.fullmatch(key)}
        seeds_ = groups.setdefault(seeds.setting(own), {})
        seed = run.keys[SEED]
        if seed in seeds_:
            raise ValueError(
                f"{run.folder} and {seeds_[seed].folder} have the same config and "
                "seed: leave one of them out"
            )
        seeds_[seed] = run
    members = [dict(sorted(group.items())) for group in groups.values()]
    first = [next(iter(group.values())) for group in members]
    keys = dict.fromkeys(key for run in first for key in run.keys)
    differ = [key for key in keys if key != SEED and not where.fullmatch(key)
              and _differs(first, key)]  # fmt: skip
    told, called = _told(first, differ), _names(members)
    settings = [_setting(*parts) for parts in zip(called, told, members)]

    def place(setting: Setting) -> tuple:
        value = setting.mean.value if setting.mean else None
        return seeds.place(value, setting.state == "done", direction)

    return sorted(settings, key=place), differ


def _setting(name: str, told: str, members: dict[int, Run]) -> Setting:
    states = [run.state for run in members.values()]
    values = [run.value for run in counted(members).values() if run.value is not None]
    mean = seeds.mean(values) if values else None
    state = next((state for state in states if state != "done"), "done")
    return Setting(name, told, members, mean, state)


def _against(settings: list[Setting], asked: str) -> Setting:
    if not asked:
        return settings[0]
    for setting in settings:
        folders = [run.folder for run in setting.runs.values()]
        if asked == setting.name or Path(asked).absolute() in map(_whole, folders):
            return setting
    return names.choose("--against", asked, [setting.name for setting in settings])


def _whole(folder: Path) -> Path:
    return folder.absolute()


def _names(members: list[dict[int, Run]]) -> list[str]:
    """Returns what settings are called: their run folders, less the seed."""
    found = []
    for group in members:
        seed, run = next(iter(group.items()))
        name = run.folder.absolute().name
        rest = re.sub(rf"[,_-]?seed[=_-]?{seed}(?!\d)", "", name).strip(",_-")
        found.append(rest if len(group) > 1 and rest else name)
    twice = {name for name in found if found.count(name) > 1}
    paths = [str(next(iter(group.values())).folder) for group in members]
    shared = os.path.commonpath(map(os.path.abspath, paths)) if len(paths) > 1 else ""
    return [
        os.path.relpath(path, shared) if name in twice else name
        for name, path in zip(found, paths)
    ]


def _differs(found: Iterable[Run], key: str) -> bool:
    return len({seeds.text({"": run.keys.get(key, ABSENT)}) for run in found}) > 1


def _told(found: list[Run], differ: list[str]) -> list[str]:
    """Returns, for each run, the few keys that tell most of them apart, as text."""
    groups = {key: next(i for i, part in enumerate(FIRST) if key.startswith(part))
              for key in differ}  # fmt: skip
    chosen: list[str] = []

    def apart(keys: list[str]) -> int:
        return len({tuple(_word(run, key) for key in keys) for run in found})

    while len(chosen) < MOST_KEYS and apart(chosen) < len(found):
        gain = {key: apart([*chosen, key]) for key in differ}
        best = max(differ, key=lambda key: (gain[key], -groups[key]), default=None)
        if best is None or gain[best] <= apart(chosen):
            break
        chosen.append(best)
    chosen.sort(key=differ.index)
    short = _short(chosen)
    return [
        ", ".join(f"{short[key]}={_word(run, key)}" for key in chosen) for run in found
    ]


def _word(run: Run, key: str) -> str:
    return tables.brief(run.keys.get(key, ABSENT))


def _short(keys: list[str]) -> dict[str, str]:
    last = [key.removesuffix(".name").rpartition(".")[2] for key in keys]
    return {k: s if last.count(s) == 1 else k for k, s in zip(keys, last)}
