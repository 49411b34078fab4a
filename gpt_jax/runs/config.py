"""The config of a run: config.json read and written, and what may change in it."""

import json
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt_jax import commands, stores
from gpt_jax.model import GPTConfig

# Where a run trains and what it writes: keys that decide nothing that is computed.
WHERE = (
    r"mesh\..*|data\.(cache|folder|workers)|compile_cache|grace_s|data_timeout_s",
    r"heartbeat_timeout_seconds|on_save_error|allow_data_change",
    r"(log|checkpoint|sample)_every|keep|sample\..*",
    r"tensorboard|wandb",
)
# What may change when a run is resumed: also how long, and how it is evaluated. All
# other keys decide the weights, and would make two runs of one.
RESUMABLE = (
    *WHERE,
    r"steps|max_(tokens|bytes|seconds|skipped)|patience|hyper\.decay_steps",
    r"eval_.*|early_from|task\.loss_chunk|model\.(remat|attention|cache_dtype)",
)
# What may change with the data, where allow_data_change says that it may.
OF_TEXT = r"data\.(source|field|val_fraction|split)"
ABSENT = "(absent)"
# Keys that older runs lack, with the value that means what such a run did; those of the
# model are the fields of GPTConfig with a default.
ADDED = {
    "fork": "",
    "fit_seconds": 0.0,
    "hyper.dropout_adapter": 0.0,
    "data.skip_bad_docs": False,
    "hyper.spike_sigma": 6.0,
    "spike_window": 0,
    "early_from": 0,
    "max_bytes": 0,
    "sample.words": False,
    "optimizer.moment_dtype": "float32",
}
TUNED = ("sft", "dpo", "grpo")  # tasks that say so where they begin at random weights
PARTS = ("data", "model", "task", "adapter", "optimizer")  # of every config


def read_config(folder: str | Path) -> ConfigDict:
    """Returns the config of a run, lists as tuples as in configs/.

    Keys that are newer than the run have the value that means what it did.

    Raises:
      ValueError: the folder is not a run, or its config.json cannot be read.
    """
    folder = stores.fetched(folder)
    path = folder / "config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        what = "is a file" if folder.is_file() else what
        if re.search(r":step=\d+$", str(folder)):
            raise ValueError(
                f"{folder} is not a run folder: a new run that goes on from a step of "
                f"another, with its optimizer memory, is --config.fork={folder}"
            )
        raise ValueError(
            f"{folder} is not a run folder: it {what}. A run is made by, for example, "
            f"{commands.typed('train')} --config=configs/quickstart.py"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        complete(tree)
        if tree.get("task", {}).get("name") in TUNED and not tree.get("init_from"):
            tree["init_from"] = "random"  # which "" meant for every task
        if absent := [part for part in PARTS if not isinstance(tree.get(part), dict)]:
            raise ValueError(f"it has no {', '.join(absent)}")
        return as_config(tree)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not a config: {error}") from error


def complete(tree: dict) -> None:
    """Gives the config of an older run the keys that are newer than it."""
    added = {**ADDED, **{f"model.{k}": x for k, x in GPTConfig.added().items()}}
    for name, value in added.items():
        part, _, key = name.rpartition(".")
        (tree.get(part, {}) if part else tree).setdefault(key, value)


def as_config(tree: dict) -> ConfigDict:
    """Returns the config that was written as JSON, lists as tuples as in configs/."""
    return ConfigDict(tuples(tree))


def filled(old: ConfigDict, new: ConfigDict) -> ConfigDict:
    """Returns an older config with exactly the keys of a newer one.

    Those that it lacks are as in the newer one.
    """
    before, after = old.to_dict(), new.to_dict()
    for key, value in after.items():
        was = before.get(key, value)
        if isinstance(value, dict):
            after[key] = {name: was.get(name, x) for name, x in value.items()}
        else:
            after[key] = was
    return ConfigDict(after)


def difference(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Returns a line `key: old -> new` for every key that is not the same."""
    before, after = _flat(_plain(old)), _flat(_plain(new))
    return [
        f"{key}: {_shown(before, key)} -> {_shown(after, key)}"
        for key in sorted({*before, *after})
        if before.get(key, ABSENT) != after.get(key, ABSENT)
    ]


def flat(config: ConfigDict) -> dict[str, Any]:
    """Returns dotted key -> value of a config, as JSON holds it."""
    return _flat(_plain(config))


def _plain(config: ConfigDict) -> dict:
    """Returns the config as JSON gives it back, so tuples and lists are equal."""
    return json.loads(json.dumps(config.to_dict()))


def as_text(config: ConfigDict) -> str:
    """Returns what config.json holds."""
    return json.dumps(_plain(config), indent=2) + "\n"


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    rows = {}
    for key, value in tree.items():
        deeper = isinstance(value, dict) and value
        rows |= _flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return rows


def _shown(rows: dict, key: str) -> str:
    return repr(rows[key]) if key in rows else ABSENT


def tuples(value: Any) -> Any:
    """Returns what JSON gives back, with its lists as tuples."""
    if isinstance(value, dict):
        return {key: tuples(inner) for key, inner in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value
