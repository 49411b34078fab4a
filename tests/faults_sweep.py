"""A trial that runs out of memory: told as that trial's end, the others go on.

Real processes under a real limit. What happens when a worker or the whole sweep is
killed is in test_sweep.py. Run by `make test-faults`; its name keeps it out of
`make test`.
"""

import resource
from pathlib import Path

import pytest

from tests.test_sweep import base, long_sweep, start, step_of, until

__all__ = ["base", "long_sweep", "start"]  # fixtures
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit"),
]


def size_of(pid):
    """Returns the address space of a process in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


@pytest.mark.fault(25)
def test_a_trial_out_of_memory_fails_alone_and_is_not_run_again(long_sweep, start):
    sweep = start(long_sweep, "--retries=0", "--workers=1")
    name, pid = until(lambda: next(iter(sweep.trials().items()), None))
    # From now on it gets no more memory than it has.
    resource.prlimit(pid, resource.RLIMIT_AS, (size_of(pid), size_of(pid)))
    code, said = sweep.end()
    assert code == 0, said
    ends = {trial: status for trial, (status, _) in sweep.results().items()}
    assert ends.pop(name) == "failed" and list(ends.values()) == ["done"] * 2
    rows = [row for row in sweep.rows() if row["name"] == name]
    assert rows[0]["reason"] and rows[0]["attempts"] == 1

    ended = {name: path.stat().st_mtime_ns for name, path in sweep.outcomes().items()}
    assert sweep.start().end()[0] == 0
    again = {name: path.stat().st_mtime_ns for name, path in sweep.outcomes().items()}
    assert again == ended  # neither those that are done nor the one that failed

    code, said = start(long_sweep, "--retries=0", "--rerun_failed").end()
    assert code == 0, said
    again = {name: path.stat().st_mtime_ns for name, path in sweep.outcomes().items()}
    changed = [trial for trial in again if again[trial] != ended.get(trial)]
    assert changed == [name] and step_of(sweep.out, name) == 300
    assert [status for status, _ in sweep.results().values()] == ["done"] * 3
