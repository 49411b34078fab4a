"""Trials as processes on the workers of dask.distributed, on one machine or many."""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import files, metrics, signals
from gpt_jax.sweep import study as studies
from gpt_jax.sweep import worker
from gpt_jax.sweep.study import Study, Trial
from gpt_jax.sweep.view import View

TICK_S = 1.0  # the view is drawn anew at least so often
CONNECT_S = 10.0
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


@contextlib.contextmanager
def local(workers: int, accelerators: Sequence[str]) -> Iterator[Cluster]:
    """Yields a cluster on this machine: a worker per accelerator, else per core.

    Args:
      workers: their number; 0 = as many as there are accelerators or cores.
      accelerators: the machine's GPUs, as CUDA names them; each worker gets one.
    """
    distributed = _import_distributed()
    cores = files.cores()
    workers = workers or len(accelerators) or cores
    threads = str(max(1, cores // workers))
    share = dict.fromkeys(THREADS, threads)
    places = [{**share, **_device(accelerators, i)} for i in range(workers)]
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
    retries: int,
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
      retries: a trial that crashes, is killed or loses its worker runs again so often.
      check: see `Study.next`.
      view: what shows the state.
      stop: true when the sweep is to end.
      changed: called whenever a trial ended.

    Raises:
      ValueError: the metric never appeared, or all trials failed.
      OSError: the scheduler is gone.
    """
    distributed = _import_distributed()
    running: dict[Any, tuple[Trial, dict]] = {}
    told = False
    try:
        while True:
            while not stop and (place := _free(cluster, running, view)) is not None:
                if (trial := study.next(check)) is None:
                    break
                study.began(trial)
                running[_submit(study, cluster, command, trial, place)] = trial, place
            if not running:
                return
            if stop and not told:
                told = True
                keys = [future.key for future in running]
                cluster.client.run(Carried(worker.stop), keys)
            with contextlib.suppress(TimeoutError):
                distributed.wait(
                    list(running), timeout=TICK_S, return_when="FIRST_COMPLETED"
                )
            for future in [future for future in running if future.done()]:
                trial, _ = running.pop(future)
                _finish(study, trial, future, retries=retries, view=view)
                changed()
            view.update(study, _steps(study, running.values()))
    finally:
        cluster.client.cancel(list(running))


# Libraries that would each take all cores. NPROC is XLA's.
THREADS = ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def _free(cluster: Cluster, running: dict, view: View) -> dict | None:
    """Returns a place that no trial runs in, or None."""
    if cluster.places is None:
        if not running and not cluster.client.nthreads():
            view.print("waiting for workers: start `dask worker` on every machine")
            cluster.client.wait_for_workers(1)
        threads = sum(cluster.client.nthreads().values())
        return {} if len(running) < threads else None
    taken = [id(place) for _, place in running.values()]
    return next((place for place in cluster.places if id(place) not in taken), None)


def _submit(
    study: Study, cluster: Cluster, command: list[str], trial: Trial, place: dict
):
    folder = (study.out / trial.name).resolve()
    order = {
        "folder": str(folder),
        "config": _for_one_device(trial.config.to_dict()),
        "metric": study.plan.metric,
        "direction": study.plan.direction,
    }
    if study.plan.pruner:
        order["pruner"] = study.plan.pruner
        order |= {"storage": study.storage, "study": study.record["id"], "id": trial.id}
    return cluster.client.submit(
        Carried(worker.run),
        command,
        order,
        place,
        str(Path.cwd()),
        str(folder / "trial.log"),
        key=f"{study.record['id']}-{trial.name}-{trial.attempts}",
        pure=False,
    )


def _for_one_device(config: dict) -> dict:
    """Gives a trial one XLA device on a CPU: its neighbours use the other cores."""
    if not config["mesh"]["cpu_devices"]:
        config["mesh"]["cpu_devices"] = 1
    return config


def _finish(study: Study, trial: Trial, future, *, retries: int, view: View) -> None:
    """Records a trial's outcome, or lets it run again."""
    outcome = _outcome(study, trial, future)
    if outcome is None:  # asked to leave: the next sitting goes on with it
        study.again(trial)
        return
    if outcome["status"] == "failed" and not outcome.get("final"):
        if outcome.get("no_metric"):
            study.finish(trial, outcome)
            raise ValueError(f"{trial.name}: {outcome['reason']}")
        if trial.attempts <= retries:
            view.print(f"again     {trial.name}: {outcome['reason']}")
            study.again(trial)
            return
    study.finish(trial, outcome)
    value = outcome["value"]
    said = outcome["reason"] if value is None else f"{study.plan.metric} {value:.4f}"
    view.print(f"{outcome['status']:9s} {trial.name}: {said}")


def _outcome(study: Study, trial: Trial, future) -> dict | None:
    """Returns how a trial ended; None when it was asked to leave before its end."""
    if said := studies.read_outcome(study.out / trial.name):
        return said
    if future.status == "finished":
        end = future.result()
        if end["code"] in STOPPED:
            return None
        return studies.failure(_crash(end), attempts=trial.attempts)
    if future.status == "cancelled":
        raise OSError("the dask scheduler is gone; the same command goes on")
    error = future.exception()
    if type(error).__name__ == "KilledWorker":
        return studies.failure("its worker was lost", attempts=trial.attempts)
    words = " ".join(str(error).split())
    return studies.failure(f"{type(error).__name__}: {words}")


def _crash(end: dict) -> str:
    code = end["code"]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"its process {how} on {end['host']}: {end['said']}".rstrip(": ")


def _steps(study: Study, running) -> dict[str, tuple]:
    """Returns name -> (step, last step, last value, seconds) of running trials."""
    found = {}
    for trial, _ in running:
        with contextlib.suppress(OSError, ValueError):
            rows = metrics.read(study.out / trial.name)
            values = [
                row[study.plan.metric] for row in rows if study.plan.metric in row
            ]
            last = rows[-1] if rows else {"step": 0}
            value = values[-1] if values else None
            seconds = last.get("seconds", 0)
            found[trial.name] = (last["step"], trial.config.steps, value, seconds)
    return found


def _device(accelerators: Sequence[str], index: int) -> dict[str, str]:
    if not accelerators:
        return {}
    return {"CUDA_VISIBLE_DEVICES": accelerators[index % len(accelerators)]}


def _dask_config():
    return importlib.import_module("dask.config")


def _import_distributed():
    if importlib.util.find_spec("distributed") is None:
        raise ValueError(
            "a sweep needs the package distributed: pip install distributed"
        )
    return importlib.import_module("distributed")
