"""Compare runs: a table, curves, and whether a difference is more than chance.

  python -m experiments.compare --runs=runs/quickstart,runs/mine
  python -m experiments.compare --runs='runs/sweep_seeds/*' --out=runs/compare_seeds
  python -m experiments.compare --runs='runs/a*' --metric=val_bpb --at=last
  python -m experiments.compare --runs='runs/a*' --against=runs/a_baseline

Runs that differ in the seed only are one setting: its mean and 95 % interval. Settings
that share seeds are compared in pairs, seed by seed, and what is more than chance is
told after Holm's correction for all the comparisons that were possible; with --against
for those with that one. Names with * and ? stand for all that match; folders that are
no runs are then left out. Where the tokenizers differ, bits per byte are compared.

OUT gets compare.html (open it in a browser), compare.csv, compare.json, compare.png.
"""

import glob
from pathlib import Path

from absl import flags

from experiments import door

RUNS = door.define_paths("runs", "Run folders, with commas; * and ? are patterns.")
OUT = door.define_path("out", "runs/compare", "Folder to write to.")
METRIC = flags.DEFINE_string(
    "metric", "", "A name in metrics.jsonl (default: the sweep's, or val_loss)."
)
AT = flags.DEFINE_string(
    "at", "", "Which evaluation counts: best, last, 'last 3' (default: the sweep's)."
)
DIRECTION = flags.DEFINE_enum(
    "direction", None, ["minimize", "maximize"], "Better is (default: minimize)."
)
AGAINST = flags.DEFINE_string(
    "against", "", "The run that the others are compared with (default: the best)."
)


def main(_: list[str]) -> None:
    """Compares, prints the table, and writes the files."""
    folders = [
        folder for pattern in door.folders(RUNS.value) for folder in _matching(pattern)
    ]
    if not folders:
        raise ValueError("--runs is missing, e.g. --runs=runs/quickstart,runs/mine")

    door.check_writable("out", OUT.value, folder=True)

    from gpt_jax.report import compare, compared

    found = compare.compare(
        folders,
        metric=METRIC.value,
        direction=DIRECTION.value or "",
        at=AT.value,
        against=AGAINST.value,
    )
    for line in compare.lines(found):
        print(line)
    missing = compared.write(Path(OUT.value), found)
    print(f"\n  the page   {missing or f'{OUT.value}/compare.html'}")
    print(f"  a picture  {OUT.value}/compare.png")


def _matching(pattern: str) -> list[Path]:
    """Returns the folder named, or the runs that match a pattern."""
    if not any(letter in pattern for letter in "*?["):
        return [Path(pattern)]
    found = [Path(name) for name in sorted(glob.glob(pattern))]
    holds = ("config.json", "outcome.json")  # a run; a trial that failed before
    found = [folder for folder in found if any((folder / x).is_file() for x in holds)]
    if not found:
        raise ValueError(f"--runs: no run folder matches {pattern}")
    return found


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
