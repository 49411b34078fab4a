"""The config of a run: checked, the same in all its processes, and unpacked."""

import json

from ml_collections import ConfigDict

from gpt_jax import (
    checks,
    processes,
    runs,
)
from gpt_jax.checks import Options


def check(config: ConfigDict, recipe: ConfigDict | None = None) -> None:
    """Refuses what no run can have; see `checks.check`.

    Raises:
      ValueError: names the key, what it may be and the value found.
    """
    checks.check(config.to_dict(), recipe.to_dict() if recipe else None)


def unread(config: ConfigDict) -> dict[str, str]:
    """Returns the keys that nothing of a run reads; see `checks.unread`."""
    return checks.unread(config.to_dict())


def unpack(config: ConfigDict) -> Options:
    """Returns a config, typed; see `checks.unpack`."""
    return checks.unpack(config.to_dict())


def check_alike(config: ConfigDict) -> None:
    """Refuses processes of one run whose configs differ.

    Raises:
      ValueError: in all processes; names the keys.
    """
    theirs = runs.as_config(json.loads(processes.first(config.to_json)))

    def compare() -> None:
        if lines := runs.difference(theirs, config):
            raise ValueError(
                "this process has another config than the first:\n  "
                + "\n  ".join(lines)
                + "\nstart all processes of a run with the same flags"
            )

    processes.in_turn(compare)
