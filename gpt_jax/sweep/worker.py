"""What a worker does with a trial: starts its process, watches it, says how it ended.

Dask carries these functions to the workers as code, so these need Python and dask only;
the trial itself runs in the project's folder. Standard library and distributed, nothing
else, may be imported here.
"""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

POLL_S = 0.2


def run(
    words: list[str], order: str, env: dict[str, str], cwd: str, log: str
) -> dict[str, Any]:
    """Runs `python words...` to its end and returns how that was.

    The order, a line of JSON, goes to the process's standard input. The pipe stays
    open as long as somebody wants the trial: when it closes, because the worker died
    or because the sweep asked or died, the process saves and leaves.

    Returns:
      "code", the exit code (negative: the signal that ended it), "said", the last line
      of its log, and "host".
    """
    from distributed import get_worker

    worker = get_worker()
    key = worker.get_current_task()
    trials = _trials(worker)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **env},
            start_new_session=True,  # Ctrl-C reaches the sweep only
        )
    trials[key] = process
    try:
        _tell(process, order)
        while True:
            try:
                code = process.wait(timeout=POLL_S)
                break
            except subprocess.TimeoutExpired:
                if not _wanted(worker, key):
                    _let_go(process)
    finally:
        _let_go(process)
        trials.pop(key, None)
    return {"code": code, "said": _last_line(log), "host": socket.gethostname()}


def stop(keys: list[str], dask_worker: Any) -> None:
    """Asks the trials of these tasks, where they run here, to save and leave."""
    for key, process in list(_trials(dask_worker).items()):
        if key in keys:
            _let_go(process)


def kill(keys: list[str], dask_worker: Any) -> None:
    """Ends the trials of these tasks, where they run here, at once."""
    for key, process in list(_trials(dask_worker).items()):
        if key in keys:
            process.kill()


def _trials(worker: Any) -> dict[Any, subprocess.Popen]:
    """Returns the trials that run on a worker, by their tasks."""
    if not hasattr(worker, "gpt_jax_trials"):
        worker.gpt_jax_trials = {}
    return worker.gpt_jax_trials


def _wanted(worker: Any, key: Any) -> bool:
    """Whether the scheduler still waits for this task; it forgets a dead client's."""
    task = worker.state.tasks.get(key)
    return task is not None and task.state == "executing"


def _tell(process: subprocess.Popen, order: str) -> None:
    pipe: Any = process.stdin
    with contextlib.suppress(BrokenPipeError):  # dead already: its exit code tells
        pipe.write(order.encode() + b"\n")
        pipe.flush()


def _let_go(process: subprocess.Popen) -> None:
    pipe: Any = process.stdin
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


def _last_line(log: str) -> str:
    lines = Path(log).read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else ""
