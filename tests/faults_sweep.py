"""Sweeps under faults from outside: memory, hangs, schedulers and databases that die.

Real processes under real faults. What happens when a worker or the whole sweep is
killed is in test_sweep.py. Run by `make test-faults`; its name keeps it out of
`make test`.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_sweep import base, free_port, long_sweep, start, step_of, until

__all__ = ["base", "long_sweep", "start"]  # fixtures
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit"),
]


def size_of(pid):
    """Returns the address space of a process in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def times_of(sweep):
    """Returns trial -> when its outcome was written."""
    return {name: path.stat().st_mtime_ns for name, path in sweep.outcomes().items()}


def all_done(sweep):
    return [status for status, _ in sweep.results().values()] == ["done"] * 3


@pytest.mark.fault(25)
def test_a_trial_out_of_memory_fails_alone_and_is_not_run_again(long_sweep, start):
    sweep = start(long_sweep, "--retries=0", "--workers=1")
    name, pid = until(lambda: next(iter(sweep.trials().items()), None))
    # From now on it gets no more memory than it has.
    resource.prlimit(pid, resource.RLIMIT_AS, (size_of(pid), size_of(pid)))
    code, said = sweep.end()
    assert code == 1 and "--rerun_failed runs them again" in said
    ends = {trial: status for trial, (status, _) in sweep.results().items()}
    assert ends.pop(name) == "failed" and list(ends.values()) == ["done"] * 2
    rows = [row for row in sweep.rows() if row["name"] == name]
    assert rows[0]["reason"] and rows[0]["crashes"] == 1

    ended = times_of(sweep)
    assert sweep.start().end()[0] == 1
    assert (
        times_of(sweep) == ended
    )  # neither those that are done nor the one that failed

    code, said = start(long_sweep, "--retries=0", "--rerun_failed").end()
    assert code == 0, said
    again = times_of(sweep)
    changed = [trial for trial in again if again[trial] != ended.get(trial)]
    assert changed == [name] and step_of(sweep.out, name) == 300
    assert all_done(sweep)


@pytest.mark.fault(25)
def test_a_trial_that_hangs_is_told_killed_and_run_again(long_sweep, start):
    sweep = start(long_sweep, "--trial_timeout=30", "--retries=3")
    name, pid = until(lambda: next(iter(sweep.trials().items()), None))
    until(lambda: step_of(sweep.out, name) >= 40)
    os.kill(pid, signal.SIGSTOP)
    code, said = sweep.end()
    assert f"again     {name}: it showed no sign of life for 30 s" in said
    assert code == 0 and all_done(sweep), said


@pytest.mark.fault(25)
def test_a_dead_scheduler_is_told_in_a_sentence_and_loses_nothing(long_sweep, start):
    port, place = free_port(), long_sweep
    dask = {
        name: [sys.executable, "-m", f"distributed.cli.dask_{name}", "--no-dashboard"]
        for name in ("scheduler", "worker")
    }
    address = f"tcp://127.0.0.1:{port}"
    options = [address, "--nthreads=1", "--memory-limit=0", "--no-nanny"]
    # They read a task before they hand it on, and what is in it is the project's.
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    processes = []

    def begin():
        words = [*dask["scheduler"], "--host=127.0.0.1", f"--port={port}"]
        for command in (words, [*dask["worker"], *options]):
            processes.append(subprocess.Popen(command, cwd=place, env=env))

    try:
        begin()
        sweep = start(long_sweep, f"--scheduler={address}")
        name, _ = until(lambda: next(iter(sweep.trials().items()), None))
        until(lambda: step_of(sweep.out, name) >= 40)
        processes[0].kill()
        code, said = sweep.end()
        assert code == 1 and "Traceback" not in said
        told = (
            "error: the dask scheduler is gone; the same command goes on with the sweep"
        )
        assert said.splitlines()[-1] == told
        processes[1].kill()
        until(lambda: not sweep.trials(), seconds=60)
        begin()
        code, said = sweep.start().end()
        assert code == 0 and all_done(sweep), said
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture
def postgres(tmp_path_factory):
    """A PostgreSQL server of its own: its URL, and what stops and starts it."""
    pytest.importorskip(
        "psycopg2", reason="needs psycopg2: pip install psycopg2-binary"
    )
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    tools = found[-1] if found else Path(shutil.which("initdb") or "absent").parent
    if not (tools / "initdb").exists():
        pytest.skip("needs PostgreSQL's initdb and pg_ctl")
    folder, port = tmp_path_factory.mktemp("postgres"), free_port()
    other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if other:  # it does not run as root
        for path in (folder, *folder.parents[:2]):
            path.chmod(0o755)
        shutil.chown(folder, "postgres")

    def tool(name, *words):
        subprocess.run([*other, tools / name, "-D", folder / "db", *words], check=True,
                       stdout=subprocess.DEVNULL, cwd=folder)  # fmt: skip

    tool("initdb", "--auth=trust", "--username=postgres")
    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    log = folder / "log"
    begin = lambda: tool("pg_ctl", "-w", "-l", log, "-o", options, "start")  # noqa: E731
    end = lambda: tool("pg_ctl", "-w", "-m", "immediate", "stop")  # noqa: E731
    begin()
    yield f"postgresql://postgres@127.0.0.1:{port}/postgres", end, begin
    end()


@pytest.mark.fault(25)
def test_a_database_that_restarts_fails_no_trial(long_sweep, start, postgres):
    """The trials report to it too: the pruner asks."""
    url, stop, begin = postgres
    text = (long_sweep / "mine.py").read_text()
    pruner = "from gpt_jax.sweep.space import median\npruner = median(200, trials=9)\n"
    (long_sweep / "mine.py").write_text(pruner + text)
    sweep = start(long_sweep, f"--storage={url}")
    name, _ = until(lambda: next(iter(sweep.trials().items()), None))
    until(lambda: step_of(sweep.out, name) >= 40)
    stop()
    log = sweep.out / name / "trial.log"
    until(lambda: "does not answer; trying again" in log.read_text())
    begin()
    code, said = sweep.end()
    assert code == 0 and "Traceback" not in said, said
    assert all_done(sweep) and not [row for row in sweep.rows() if row["crashes"]]
    assert sweep.start().end()[0] == 0  # the record is whole
