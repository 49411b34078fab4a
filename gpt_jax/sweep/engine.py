"""Trials as processes on the workers of dask.distributed, on one machine or many."""

import contextlib
import importlib
import importlib.util
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import files, metrics, signals
from gpt_jax.sweep import record, worker
from gpt_jax.sweep import trial as ends
from gpt_jax.sweep.record import failure
from gpt_jax.sweep.study import Study, Trial
from gpt_jax.sweep.view import View

TICK_S = 1.0  # the view is drawn anew at least so often
CONNECT_S = 10.0
SILENT_S = 600.0  # a trial that shows no sign of life for so long is told of
GONE = "the dask scheduler is gone; the same command goes on with the sweep"
TAIL = 8192  # bytes at the end of a record, for its last numbers
STOPPED = (143, 130, -15, -2)  # exit codes of a trial that was asked to leave


class Cluster(NamedTuple):
    """Where trials run.

    Attributes:
      client: dask's.
      places: the environment of each local place; None: as many as the workers have
        threads, which may change while the sweep runs.
    """

    client: Any
    places: list[dict[str, str]] | None


@dataclass
class Running:
    """A trial that runs: its place, and when it last showed that it is alive."""

    trial: Trial
    place: dict
    sign: tuple = ()
    since: float = 0.0
    told: bool = False
    killed: str = ""  # why


@contextlib.contextmanager
def local(workers: int, accelerators: Sequence[dict[str, str]]) -> Iterator[Cluster]:
    """Yields a cluster on this machine: a worker per accelerator, else per core.

    Args:
      workers: their number; 0 = as many as there are accelerators or cores.
      accelerators: what the environment must hold for a process to use one alone; {}
        is one that cannot be shared.

    Raises:
      ValueError: the workers would fight for an accelerator that cannot be shared.
    """
    distributed = _import_distributed()
    cores = files.cores()
    workers = workers or len(accelerators) or cores
    if {} in accelerators and workers > len(accelerators):
        raise ValueError(
            f"--workers={workers}: trials at once would fight for the TPU, which one "
            "process has as a whole: leave it out, or set JAX_PLATFORMS=cpu to train "
            "on the CPU; --engine=vmap trains many trials in one process"
        )
    threads = str(max(1, cores // workers))
    share = dict.fromkeys(THREADS, threads)
    own = list(itertools.islice(itertools.cycle(accelerators or [{}]), workers))
    places = [{**share, **one} for one in own]
    # A trial that lost its worker is ours to retry, and to tell of.
    quiet = {"distributed.scheduler.allowed-failures": 0}
    with (
        _dask_config().set(quiet),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=0,  # the trials' own processes are not counted anyway
            dashboard_address="127.0.0.1:0",  # None would still ask for port 8787
            silence_logs=60,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield Cluster(client, places)


@contextlib.contextmanager
def remote(address: str) -> Iterator[Cluster]:
    """Yields the cluster of a running scheduler, say tcp://host:8786.

    Raises:
      ValueError: nobody answers there.
    """
    distributed = _import_distributed()
    # That it lost its scheduler is ours to tell, in a sentence.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    try:
        client = distributed.Client(address, timeout=CONNECT_S)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no dask scheduler answers at {address} within {CONNECT_S:g} s: start one "
            f"with `dask scheduler`, and `dask worker {address}` on every machine"
        ) from error
    with client:
        yield Cluster(client, None)


class Carried:
    """A function of worker.py that travels as code, not as a name to import.

    So workers need not find this project: they may have been started in any folder.
    """

    def __init__(self, function: Callable):
        import cloudpickle  # dask brings it

        cloudpickle.register_pickle_by_value(worker)
        self._loads, self._code = cloudpickle.loads, cloudpickle.dumps(function)
        cloudpickle.unregister_pickle_by_value(worker)

    def __reduce__(self):
        return self._loads, (self._code,)

    def __call__(self, *_: Any) -> None:
        raise AssertionError("it becomes the function itself where it is unpickled")


def run(
    study: Study,
    cluster: Cluster,
    *,
    command: list[str],
    timeout_s: float,
    environment: Mapping[str, str],
    check: Callable[[str, Any], None],
    view: View,
    stop: signals.Stop,
    changed: Callable[[], None],
) -> None:
    """Runs trials until none is left or somebody stops the sweep.

    Args:
      study: which trials.
      cluster: where.
      command: what Python is given to start a trial: its arguments.
      timeout_s: a trial whose record and log stay as they are for so long is killed,
        which counts as a crash; 0 = never.
      environment: what that of every trial holds besides its place's.
      check: see `Study.next`.
      view: what shows the state.
      stop: true when the sweep is to end.
      changed: called whenever a trial ended.

    Raises:
      ValueError: the metric never appeared, or all trials failed.
      OSError: the scheduler is gone.
    """
    distributed = _import_distributed()
    running: dict[Any, Running] = {}
    told = False
    try:
        while True:
            while not stop and (place := _free(cluster, running, view)) is not None:
                if (trial := study.next(check)) is None:
                    break
                with _reaching(distributed):
                    own = {**environment, **place}
                    future = _submit(study, cluster, command, trial, own)
                running[future] = Running(trial, place, since=time.monotonic())
            if not running:
                return
            if stop and not told:
                told = True
                _ask(cluster, worker.stop, list(running))
            with contextlib.suppress(TimeoutError), _reaching(distributed):
                distributed.wait(
                    list(running), timeout=TICK_S, return_when="FIRST_COMPLETED"
                )
            for future in _ended(cluster, study, running, timeout_s, view):
                one = running.pop(future)
                _finish(study, one, future, view=view)
                changed()
            trials = [one.trial for one in running.values()]
            view.update(study, _steps(study, trials))
    finally:
        with contextlib.suppress(Exception):  # nobody to tell, it may be gone
            cluster.client.cancel(list(running))


_numbers = itertools.count()  # of what was handed to dask

# Libraries that would each take all cores. NPROC is XLA's.
THREADS = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def _free(cluster: Cluster, running: dict, view: View) -> dict | None:
    """Returns a place that no trial runs in, or None."""
    if cluster.places is None:
        with _reaching(_import_distributed()):
            if not running and not cluster.client.nthreads():
                view.print("waiting for workers: start `dask worker` on every machine")
                cluster.client.wait_for_workers(1)
            threads = sum(cluster.client.nthreads().values())
        return {} if len(running) < threads else None
    taken = [id(one.place) for one in running.values()]
    return next((place for place in cluster.places if id(place) not in taken), None)


@contextlib.contextmanager
def _reaching(distributed: Any) -> Iterator[None]:
    """Turns all that dask raises when nobody answers into a sentence.

    Raises:
      OSError: the scheduler is gone.
    """
    lost = (OSError, distributed.CancelledError, RuntimeError)
    try:
        yield
    except TimeoutError:  # an OSError as well; the caller knows for what it waited
        raise
    except lost as error:
        raise OSError(GONE) from error


def _ask(cluster: Cluster, function: Callable, futures: list) -> None:
    """Has the workers do something with these trials, where they run."""
    with contextlib.suppress(TimeoutError), _reaching(_import_distributed()):
        cluster.client.run(Carried(function), [future.key for future in futures])


def _ended(
    cluster: Cluster, study: Study, running: dict, timeout_s: float, view: View
) -> list:
    """Returns the futures that are done; looks for signs of life of the others."""
    done, silent = [], []
    for future, one in running.items():
        if future.done():
            done.append(future)
            continue
        sign, now = _sign(study.out / one.trial.name), time.monotonic()
        if sign != one.sign:
            one.sign, one.since, one.told = sign, now, False
        quiet = now - one.since
        if timeout_s and quiet >= timeout_s:
            one.killed = f"it showed no sign of life for {timeout_s:g} s"
            one.since = now
            silent.append(future)
        elif quiet >= SILENT_S and not one.told:
            one.told = True
            then = "" if timeout_s else "; --trial_timeout ends such trials"
            view.print(
                f"silent    {one.trial.name}: no sign of life for {quiet:.0f} s{then}"
            )
    if silent:
        _ask(cluster, worker.kill, silent)
    return done


def _sign(folder: Path) -> tuple:
    """Returns what changes while a trial is alive: the sizes of its record and log."""
    found = []
    for name in (metrics.FILE, "trial.log"):
        with contextlib.suppress(OSError):
            found.append((name, (folder / name).stat().st_size))
    return tuple(found)


def _submit(
    study: Study, cluster: Cluster, command: list[str], trial: Trial, place: dict
):
    folder = (study.out / trial.name).resolve()
    order = {
        "folder": str(folder),
        "config": _for_one_device(trial.config.to_dict()),
        "criterion": study.plan.criterion,
        "after": {"file": study.plan.file, "names": [*study.plan.after]},
    }
    if study.plan.pruner:
        order["pruner"] = study.plan.pruner
        order |= {"storage": study.storage, "study": study.record["id"], "id": trial.id}
    return cluster.client.submit(
        Carried(worker.run),
        command,
        json.dumps(order),  # a text: a worker may have none of our types
        place,
        str(Path.cwd()),
        str(folder / "trial.log"),
        key=f"{study.record['id']}-{trial.name}-{next(_numbers)}",
        pure=False,
    )


def _for_one_device(config: dict) -> dict:
    """Gives a trial one XLA device on a CPU: its neighbours use the other cores."""
    if not config["mesh"]["cpu_devices"]:
        config["mesh"]["cpu_devices"] = 1
    return config


def _finish(study: Study, one: Running, future, *, view: View) -> None:
    """Records a trial's outcome, or lets it run again."""
    trial = one.trial
    outcome = _outcome(study, one, future)
    if outcome is None:  # asked to leave: the next sitting goes on with it
        study.again(trial)
        return
    if outcome["status"] == "failed" and not outcome.get("final"):
        if study.crashed(trial, outcome):
            view.print(f"again     {trial.name}: {outcome['reason']}")
            return
    else:
        study.finish(trial, outcome)
    if outcome.get("no_metric"):
        raise ValueError(f"{trial.name}: {outcome['reason']}")
    view.print(ends.line(trial.name, study.plan.metric, outcome))


def _outcome(study: Study, one: Running, future) -> dict | None:
    """Returns how a trial ended; None when it was asked to leave before its end."""
    if said := record.read_outcome(study.out / one.trial.name):
        return said
    if one.killed:
        return failure(one.killed)
    if future.status == "finished":
        with _reaching(_import_distributed()):
            end = future.result()
        return None if end["code"] in STOPPED else failure(_crash(end))
    if future.status == "cancelled":
        raise OSError(GONE)
    error = future.exception()
    if type(error).__name__ == "KilledWorker":
        return failure("its worker was lost")
    words = " ".join(str(error).split())
    return failure(f"{type(error).__name__}: {words}")


def _crash(end: dict) -> str:
    code = end["code"]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"its process {how} on {end['host']}: {end['said']}".rstrip(": ")


def _steps(study: Study, running: list[Trial]) -> dict[str, tuple]:
    """Returns name -> (step, last step, last value, seconds) of running trials."""
    found = {}
    for trial in running:
        rows = _last_rows(study.out / trial.name / metrics.FILE)
        values = [row[study.plan.metric] for row in rows if study.plan.metric in row]
        last = rows[-1] if rows else {"step": 0}
        value = values[-1] if values else None
        seconds = last.get("seconds", 0)
        found[trial.name] = (last["step"], trial.config.steps, value, seconds)
    return found


def _last_rows(path: Path) -> list[dict]:
    """Returns the last lines of a record: the whole of a long one takes long."""
    rows = []
    with contextlib.suppress(OSError):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # cut at either end
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def _dask_config():
    return importlib.import_module("dask.config")


def _import_distributed():
    if importlib.util.find_spec("distributed") is None:
        raise ValueError(
            "a sweep needs the package distributed: pip install distributed"
        )
    return importlib.import_module("distributed")
