"""Measure again what is claimed, and say what was met.

  python -m experiments.reproduce --fast
  python -m experiments.reproduce --fast --data=data/texts
  python -m experiments.reproduce --data=data/texts --page=docs/results.md

--fast are the facts that depend on no random number: counts, sizes, schedules, token
ids; about ten seconds. Without it models are trained too: about an hour on 2
cores. Each has a run folder in OUT, so the same command goes on where it was stopped.

--data is the folder of the texts (the names are those that the rows ask for, and those
that downloads get); a row whose text is not there says so. --page writes the table into
a Markdown file. The exit code is 1 when a claim was missed, or a command failed.
"""

import datetime
import platform
import sys
from pathlib import Path

from absl import flags

from experiments import door

FAST = flags.DEFINE_bool("fast", False, "Only what takes seconds.")
DATA = door.define_path("data", "", "Folder of texts.")
OUT = door.define_path("out", "runs/reproduce", "Folder of the runs.")
BASE = door.define_path("base", "", "Run to fine-tune; empty = one is trained.")
ROWS = flags.DEFINE_list("rows", [], "Only rows that hold one of these words.")
PAGE = door.define_path("page", "", "Markdown file to write the table to.")

PAGE_HEAD = """\
# Results

What is claimed of gpt_jax, measured by one command:

```bash
{command}
```

Measured on {machine}, {python}, {jax}, {date}. Where seeds are not named they are those
of the configs.

"""


def main(_: list[str]) -> int:
    """Prints the table; returns the exit code."""
    data = Path(DATA.value).resolve() if DATA.value else None
    if data and not data.is_dir():
        raise ValueError(f"--data={DATA.value} is not a folder")
    if PAGE.value:
        door.check_writable("page", PAGE.value)

    from experiments.targets import Place, exact, learning, tuning
    from gpt_jax import files, screen

    base = Path(BASE.value) if BASE.value else None
    place = Place(data, Path(OUT.value), base)
    chosen = exact.ROWS if FAST.value else (*exact.ROWS, *learning.ROWS, *tuning.ROWS)
    wanted = [row for row in chosen if not ROWS.value or _asked_for(row.what)]
    if not wanted:
        raise ValueError(f"--rows={','.join(ROWS.value)} is in the name of no row")
    lines = [_measured(row, place) for row in wanted]
    heads = ("what", "claimed", "measured", "tolerance", "verdict")
    table = screen.table(heads, lines)
    print(table)
    missed = sum(line[-1] == "missed" for line in lines)
    met = sum(line[-1] == "met" for line in lines)
    total = f"{met} met, {missed} missed, {len(lines) - met - missed} not measured"
    if FAST.value:
        total += "; what has to be trained was left out (--fast)"
    print(f"\n{total}")
    if PAGE.value:
        files.write(PAGE.value, f"{_head()}{table}\n\n{total}.\n")
    return int(missed > 0)


def _asked_for(what: str) -> bool:
    return any(word.lower() in what.lower() for word in ROWS.value)


def _measured(row, place) -> tuple[str, ...]:
    """Returns a line of the table."""
    from experiments.targets import Absent, Failed

    print(f"{row.what} ...", file=sys.stderr, flush=True)
    try:
        found = row.measure(place)
        measured, verdict = found.measured, "met" if found.met else "missed"
    except Absent as error:
        measured, verdict = "", f"not measured: {error}"
    except Failed as error:
        measured, verdict = str(error), "missed"
    return row.what, row.claimed, measured, row.tolerance, verdict


def _head() -> str:
    import jax

    names = {d.device_kind for d in jax.devices()}
    return PAGE_HEAD.format(
        command=door.command(("--data", "--out", "--base", "--page"))
        + " --data=DATA --page=docs/results.md",
        machine=f"{platform.machine()}, {', '.join(sorted(names))}",
        python=f"Python {platform.python_version()}",
        jax=f"jax {jax.__version__}",
        date=datetime.date.today(),
    )


if __name__ == "__main__":
    door.run(main, __doc__)
