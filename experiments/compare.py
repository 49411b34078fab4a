"""Compare runs: a table, curves, and whether a difference is more than chance.

  python -m experiments.compare --runs=runs/quickstart,runs/mine
  python -m experiments.compare --runs='runs/sweep_seeds/*' --out=runs/compare_seeds
  python -m experiments.compare --runs='runs/a*' --metric=val_bpb --at=last

Runs that differ in the seed only are one setting: mean +- standard error. Settings
that share seeds are compared in pairs, seed by seed, with a 95 % interval. Names with
* and ? stand for all that match; folders that are no runs are then left out.

OUT gets compare.html (open it in a browser), compare.csv, compare.json, compare.png.
"""

import glob
from pathlib import Path

from absl import flags

from experiments import door

RUNS = door.define_paths("runs", "Run folders, with commas; * and ? are patterns.")
OUT = door.define_path("out", "runs/compare", "Folder to write to.")
METRIC = flags.DEFINE_string("metric", "val_loss", "A name in metrics.jsonl.")
AT = flags.DEFINE_enum("at", "best", ["best", "last"], "Which evaluation counts.")
DIRECTION = flags.DEFINE_enum(
    "direction", "minimize", ["minimize", "maximize"], "What is better."
)


def main(_: list[str]) -> None:
    """Compares, prints the table, and writes the files."""
    folders = [folder for pattern in RUNS.value for folder in _matching(pattern)]
    if not folders:
        raise ValueError("--runs is missing, e.g. --runs=runs/quickstart,runs/mine")

    door.check_writable("out", OUT.value, folder=True)

    from gpt_jax.report import compare

    found = compare.compare(
        folders, METRIC.value, direction=DIRECTION.value, at=AT.value
    )
    for line in compare.lines(found):
        print(line)
    compare.write(Path(OUT.value), found)
    print(f"\n  the page   {OUT.value}/compare.html")


def _matching(pattern: str) -> list[Path]:
    """Returns the folder named, or the runs that match a pattern."""
    if not any(letter in pattern for letter in "*?["):
        return [Path(pattern)]
    found = [Path(name) for name in sorted(glob.glob(pattern))]
    found = [folder for folder in found if (folder / "config.json").is_file()]
    if not found:
        raise ValueError(f"--runs: no run folder matches {pattern}")
    return found


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
