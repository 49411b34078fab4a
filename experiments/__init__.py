"""The doors: what `python -m experiments.train` and `gpt-jax train` run.

XLA on a CPU takes its temporaries from the C library and gives them back in every step,
and the kernel clears them page by page: with pages of 4 kB a fifth of a small model's
training. Many systems give pages of 2 MB only to who asks, and glibc asks (`madvise`)
only by a tunable that it reads when a process begins.
"""

import os
import sys
from pathlib import Path

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # the one in [] is chosen
VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def ask_for_huge_pages(mode: Path = MODE) -> None:
    """Begins this program anew, once, with the tunable, where the kernel heeds it.

    The process stays the same (its number, files and signals) and loses what it has
    done, so this comes before all else. What a user says of the tunable stands.
    """
    given = os.environ.get(VARIABLE, "")
    if TUNABLE in given or not mode.exists() or "[madvise]" not in mode.read_text():
        return
    os.environ[VARIABLE] = ":".join(filter(None, [given, f"{TUNABLE}=1"]))
    os.execv(sys.executable, sys.orig_argv)  # a glibc before 2.35 passes it over


# So Python names a program while it looks for the module of -m, and `gpt-jax` a door.
if sys.argv[0] == "-m" or sys.argv[0].startswith("gpt-jax "):
    ask_for_huge_pages()
