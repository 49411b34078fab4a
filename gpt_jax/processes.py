"""The processes of one run: they join, wait for each other, and agree.

JAX's own runtime connects them (`jax.distributed`). Its heartbeats end all of them when
one is lost. What waits here waits in the runtime's key-value store for as long as it
takes; on a CPU, devices that connect for a first sum give up after 30 seconds.

Every process of a run calls these functions in the same order, from its main thread.
In a run of one process each of them does its work at once.
"""

import builtins
import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the store has no public name; Orbax imports it too
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax import commands, screen

PATIENCE_MS = 7 * 24 * 3600 * 1000  # a long text is prepared in less
LEAVE_MS = 5_000  # the wait for others that fail for the same reason
# What the errors of a lost connection to another process have in their text.
LOST = ("gloo", "nccl", "coordination", "connection", "socket", "unavailable")

_numbers = itertools.count()  # of waits: the same in every process


def join(
    *,
    coordinator: str,
    count: int | None,
    index: int | None,
    heartbeat_timeout_seconds: int,
) -> None:
    """Connects this process with the others of its run; before any device is used.

    Args:
      coordinator: HOST:PORT of the first process; "" together with None and None: all
        three are what Slurm, Open MPI, Kubernetes or Cloud TPU say.
      count: how many processes there are.
      index: which of them this one is, from 0.
      heartbeat_timeout_seconds: after so long without a sign of life a process is lost,
        and the runtime ends the others.

    Raises:
      ValueError: the numbers do not fit, or nothing says which processes there are.
    """
    given = (coordinator or None, count, index)
    if None in given and given != (None, None, None):
        raise ValueError(
            "--coordinator, --processes and --process belong together: give all three, "
            "or none where Slurm, Open MPI, Kubernetes or Cloud TPU say them"
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(
            f"--process={index} of --processes={count}: processes are counted from 0"
        )
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator={coordinator} is not HOST:PORT")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM, which signals.watch watches.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *given,
            # Within a job of Slurm, say, the flags decide, and each sees all its GPUs.
            cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            shutdown_timeout_seconds=heartbeat_timeout_seconds,
        )
    except jax.errors.JaxRuntimeError as error:
        told = " ".join(str(error).split())
        raise ConnectionError(
            f"process {index} could not join the others at {coordinator} ({told}): is "
            "that HOST:PORT free there and reachable from here, and do all run?"
        ) from error
    except ValueError as error:
        raise ValueError(
            "--distributed found no Slurm, Open MPI, Kubernetes or Cloud TPU that says "
            f"which processes there are ({error}): give --coordinator=HOST:PORT, "
            "--processes and --process, or on one machine use "
            f"{commands.typed('launch')}"
        ) from error


def count() -> int:
    """Returns how many processes the run has; starts no backend."""
    return distributed.global_state.num_processes


def index() -> int:
    """Returns which of them this one is; starts no backend."""
    return distributed.global_state.process_id


def wait() -> None:
    """Returns when every process is here."""
    if count() > 1:
        _store().wait_at_barrier(f"gpt_jax/{next(_numbers)}", PATIENCE_MS)


def first(function: Callable[[], Any], *kinds: type[Exception]) -> Any:
    """Returns in all processes what `function` returns in the first, which calls it.

    Its error is raised in all: as one of `kinds`, or as the built-in error that it is.

    Args:
      function: returns what JSON can hold.
      kinds: errors that are not built in.
    """
    if count() == 1:
        return function()
    key = f"gpt_jax/{next(_numbers)}"
    if index():
        return _value(
            json.loads(_store().blocking_key_value_get(key, PATIENCE_MS)), kinds
        )
    value, error = _outcome(function)
    said = _told(error) if error else {"value": value}
    _store().key_value_set(key, json.dumps(said))
    if error:
        raise error
    return value


def in_turn(function: Callable[[], Any]) -> Any:
    """Calls `function` in the first process, then in all others; returns its value.

    So one process prepares what the others find prepared. An error in any of them is
    raised in all.
    """
    if count() == 1:
        return function()
    results = []
    first(lambda: results.append(function()))
    error = _outcome(lambda: results.append(function()))[1] if index() else None
    for number, said in enumerate(_everywhere(_told(error) if error else {"value": 0})):
        if error:
            raise error
        if "error" in said:
            said["text"] = f"process {number}: {said['text']}"
        _value(said, ())
    return results[0]


def check_same(what: str, value: str) -> None:
    """Raises a ValueError in all processes when one has another value than another."""
    values = _everywhere(value) if count() > 1 else [value]
    for number, found in enumerate(values):
        if found != values[0]:
            raise ValueError(
                f"{what} of process {number} is not that of process 0 ({found}, not "
                f"{values[0]}): all processes of a run begin with the same"
            )


def leave(code: int) -> None:
    """Disconnects before the process ends with an exit code.

    Where the others end too, all disconnect. Else this process ends here, so that they
    miss it soon instead of waiting for it.
    """
    if count() == 1 or not jax.distributed.is_initialized():
        return
    screen.out().flush()
    screen.err().flush()
    try:
        wait_ms = LEAVE_MS if code else PATIENCE_MS
        _store().wait_at_barrier("gpt_jax/leave", wait_ms)
    except jax.errors.JaxRuntimeError:
        os._exit(code)
    jax.distributed.shutdown()


def lost(error: Exception) -> str:
    """Returns what to tell of an error that another process's end caused, or ""."""
    told = " ".join(str(error).split())
    runtime = isinstance(error, jax.errors.JaxRuntimeError)
    if count() == 1 or not runtime or not any(word in told.lower() for word in LOST):
        return ""
    return (
        f"process {index()} of {count()} lost another process of this run ({told}); "
        "start all of them again with the same command: they go on from the last "
        "checkpoint"
    )


class Together:
    """A `signals.Stop` that rises in all processes at the same step.

    `look` is a collective: every process calls it at the same places of the program,
    and all see what was wished for at the call before. So no device waits for a host.
    """

    def __init__(self, own: Any):
        """Args: own: the `signals.Stop` of this process."""
        self.own, self.signal, self.late = own, 0, False
        self._late, self._last = False, None
        devices = np.array(jax.devices()).reshape(count(), -1)  # in order of processes
        mesh = Mesh(devices, ("process", "local"))
        self._split = NamedSharding(mesh, P("process"))
        self._most = jax.jit(
            lambda x: x.max(axis=0), out_shardings=NamedSharding(mesh, P())
        )

    def __bool__(self) -> bool:
        return self.signal != 0

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal that any process had."""
        return 128 + self.signal

    def look(self, late: bool = False) -> bool:
        """Tells the others of this process's signal, and whether its time is up."""
        self._late |= late  # until all know: who looks next may not look at the time
        mine = np.array([[self.own.signal, self._late]], np.int32)
        wishes = jax.make_array_from_process_local_data(self._split, mine)
        before, self._last = self._last, self._most(wishes)
        if jax.default_backend() == "cpu":  # see sharding.wait_on_cpu
            jax.block_until_ready(self._last)
        if before is not None:
            self.signal, self.late = map(int, np.asarray(before))
        return bool(self)


def together(own: Any) -> Any:
    """Returns the flag that all processes of the run see rise at the same step."""
    return own if count() == 1 else Together(own)


def _store() -> Any:
    return distributed.global_state.client


def _outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # raised in all processes by the caller
        return None, error


def _everywhere(value: Any) -> list[Any]:
    """Returns the value (JSON) of every process, in their order."""
    folder = f"gpt_jax/{next(_numbers)}"
    _store().key_value_set(f"{folder}/{index():08}", json.dumps(value))
    _store().wait_at_barrier(folder, PATIENCE_MS)
    return [
        json.loads(said) for _, said in sorted(_store().key_value_dir_get(f"{folder}/"))
    ]


def _told(error: Exception) -> dict[str, Any]:
    return {
        "error": [kind.__name__ for kind in type(error).__mro__],
        "text": str(error),
    }


def _value(said: dict[str, Any], kinds: tuple[type[Exception], ...]) -> Any:
    """Returns what a process said, or raises the error that it had."""
    if "error" not in said:
        return said["value"]
    known = {**vars(builtins), **{kind.__name__: kind for kind in kinds}}
    kind = next(known[name] for name in said["error"] if name in known)
    raise kind(said["text"])
