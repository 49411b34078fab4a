"""Optuna's storages and pruners: where a sweep's record lies, who stops early.

The record is a journal in the sweep's folder, or any Optuna storage URL. A database
that restarts is waited for: what it did not take is told to it again.
"""

import functools
import importlib
import importlib.util
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_jax.sweep.space import Pruner

log = logging.getLogger(__name__)

PATIENCE_S = 600.0  # a database that answers nothing for so long is gone
RETRY_S = 1.0
# What a sweep, a trial and a pruner ask of a storage and tell it.
ASKED = (
    *("create_new_study", "create_new_trial", "get_all_trials", "get_trial"),
    *("get_study_id_from_name", "get_study_name_from_id", "get_study_directions"),
    *("get_study_user_attrs", "get_study_system_attrs", "set_study_system_attr"),
    *("get_trial_id_from_study_id_trial_number", "set_trial_param"),
    *("set_trial_state_values", "set_trial_intermediate_value"),
    *("set_trial_user_attr", "set_trial_system_attr"),
)


def open_storage(where: str):
    """Returns an Optuna storage: a URL's, or the journal in a file.

    Raises:
      ValueError: it cannot be opened.
    """
    optuna = import_optuna()
    if "://" not in where:
        backend = importlib.import_module("optuna.storages.journal").JournalFileBackend
        return optuna.storages.JournalStorage(backend(where))
    secret, _, place = where.rpartition("@")  # a user and a password
    try:
        # A connection that the server has closed is noticed, and made again.
        ping = {"pool_pre_ping": True}
        opened = optuna.storages.RDBStorage(where, engine_kwargs=ping)
        opened = optuna.storages.get_storage(opened)
    except Exception as error:  # SQLAlchemy and its drivers raise whatever they like
        why = f" ({error.__cause__})" if isinstance(error, ImportError) else ""
        text = f"{str(error).splitlines()[0]}{why}"
        text = text.replace(secret, "...") if secret else text
        raise ValueError(f"the storage {place} cannot be opened: {text}") from None
    for name in ASKED:
        setattr(opened, name, patient(getattr(opened, name), place))
    return opened


def patient(ask: Callable, place: str) -> Callable:
    """Returns a function of a storage that waits while its database is away.

    Raises:
      OSError: the database has not come back in PATIENCE_S.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    @functools.wraps(ask)
    def asked(*args: Any, **kwargs: Any) -> Any:
        began = 0.0
        while True:
            try:
                return ask(*args, **kwargs)
            except UpdateFinishedTrialError:
                if not began:
                    raise
                return True  # it did take what it could not acknowledge
            except Exception as error:
                if not is_away(error):
                    raise
                if not began:
                    began = time.monotonic()
                    log.warning("the storage %s does not answer; trying again", place)
                elif time.monotonic() - began > PATIENCE_S:
                    raise OSError(
                        f"the storage {place} has not answered for {PATIENCE_S:g} s; "
                        "the same command goes on with the sweep"
                    ) from None
            time.sleep(RETRY_S)

    return asked


def is_away(error: BaseException) -> bool:
    """Whether an error says that the database cannot be reached, or is busy."""
    from sqlalchemy import exc

    lost = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)
    return isinstance(error, lost) or isinstance(error.__cause__, lost)


def make_pruner(chosen: Pruner | None, steps: int):
    """Returns Optuna's pruner for runs of so many steps."""
    pruners = import_optuna().pruners
    if chosen is None:
        return pruners.NopPruner()
    if chosen["name"] == "asha":
        return pruners.SuccessiveHalvingPruner(
            min_resource=chosen["first"], reduction_factor=chosen["factor"]
        )
    if chosen["name"] == "median":
        return pruners.MedianPruner(
            n_startup_trials=chosen["trials"], n_warmup_steps=chosen["first"] - 1
        )
    return pruners.HyperbandPruner(
        min_resource=chosen["first"],
        max_resource=steps,
        reduction_factor=chosen["factor"],
    )


def mend(journal: Path) -> None:
    """Cuts off a last line whose writer was killed; the next would be part of it."""
    if not journal.is_file():
        return
    with journal.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def import_optuna():
    """Returns Optuna, which then tells of warnings only."""
    need("optuna", "a sweep")
    optuna = importlib.import_module("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def need(package: str, what: str) -> None:
    """Raises ValueError, with what to do, where a package is absent."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs the package {package}: pip install {package}")
