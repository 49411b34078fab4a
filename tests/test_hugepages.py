"""Pages of 2 MB: a program begins anew for them once, as itself."""

import os
import subprocess
import sys

import pytest

import experiments

PROGRAM = """
import os, sys
from pathlib import Path
import experiments
print("began", os.getpid())
sys.stdout.flush()
experiments.ask_for_huge_pages(Path(sys.argv[1]))
print(os.environ.get("GLIBC_TUNABLES", "nothing"), sys.argv[2:], sys.flags.utf8_mode)
"""


def run(*words, **env):
    kept = {k: v for k, v in os.environ.items() if k != experiments.VARIABLE}
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**kept, **env},
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "mode, given, began, tunables",
    [
        ("always [madvise] never", "", 2, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "a=b", 2, "a=b:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", 1, "same"),
        ("[always] madvise never", "", 1, "nothing"),
        ("always madvise [never]", "", 1, "nothing"),
        (None, "", 1, "nothing"),
    ],
)
def test_a_program_begins_anew_at_most_once(tmp_path, mode, given, began, tunables):
    path = tmp_path / "enabled"
    if mode:
        path.write_text(f"{mode}\n")
    env = {experiments.VARIABLE: given} if given else {}
    *starts, last = run("-X", "utf8", "-c", PROGRAM, path, "two words", "*", **env)
    assert starts == [starts[0]] * began  # the same process
    assert last == f"{given if tunables == 'same' else tunables} ['two words', '*'] 1"


@pytest.mark.parametrize("name, asks", [("-m", 1), ("gpt-jax train", 1), ("train", 0)])
def test_only_a_command_begins_anew(name, asks):
    heeded = experiments.MODE.exists() and "[madvise]" in experiments.MODE.read_text()
    program = (
        f"import os, sys; sys.argv[0] = {name!r}; import experiments; "
        "print(os.environ.get('GLIBC_TUNABLES'))"
    )
    told = "glibc.malloc.hugetlb=1" if heeded and asks else "None"
    assert run("-c", program) == [told]
