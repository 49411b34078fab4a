"""Check the installation and this machine; with --run also a run folder, every byte.

  python -m experiments.doctor
  python -m experiments.doctor --run=runs/quickstart
  python -m experiments.doctor --run=runs/quickstart --json

Looked at: Python, the packages against requirements.txt, the optional ones, what JAX
computes with and whether it computes right, free disk space, whether others could write
to the cache of compiled programs, downloaded texts. Of a run: whether config, tokenizer
and weights belong together, the sha256 of every file of every checkpoint, NaN in
weights and optimizer memory, the lock, the record, and what is left over.

Each line is ok, a warning (it can wait) or a problem (something will fail of it), with
what to do. Nothing is changed. Exit code 0: no problem; 1: at least one; 2: a mistake
in the command.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from absl import flags

from experiments import door

RUN = door.define_path("run", "", "A run folder to check as well.")
JSON = flags.DEFINE_bool("json", False, "Print a list of JSON objects instead.")
MIN_FREE_GB = flags.DEFINE_float("min_free_gb", 5.0, "Less free disk is a warning.")


def main(_: list[str]) -> int:
    """Prints what was found; returns 1 if something of it is a problem."""
    folder = Path(RUN.value)
    if RUN.value and not folder.is_dir():
        raise ValueError(f"--run={RUN.value}: there is no such folder")
    if not MIN_FREE_GB.value >= 0:
        raise ValueError(f"--min_free_gb={MIN_FREE_GB.value} must not be negative")

    from configs import common
    from gpt_jax import commands, doctor

    base = common.base()
    found = doctor.installation(
        commands.ROOT,
        compile_cache=base.compile_cache,
        downloads=base.data.cache,
        min_free_gb=MIN_FREE_GB.value,
    )
    told = _tell(found)
    if RUN.value:
        told += _tell(doctor.run(folder))
    levels = Counter(finding["level"] for finding in told)
    if JSON.value:
        print(json.dumps(told, indent=1))
    else:
        counts = ", ".join(f"{levels[level]} {level}" for level in LEVELS)
        print(f"\n{counts}")
    return int(levels["problem"] > 0)


LEVELS = ("ok", "warning", "problem")


def _tell(findings: Iterable) -> list[dict[str, str]]:
    """Prints findings as they come, unless they are wanted as JSON; returns them."""
    told = []
    for finding in findings:
        told.append(finding._asdict())
        if not JSON.value:
            print(f"{finding.level:8s} {finding.about:15s} {finding.found}", flush=True)
            if finding.cure:
                print(f"{'':24s} -> {finding.cure}", flush=True)
    return told


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
