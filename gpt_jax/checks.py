"""What no run can have, refused before any text is read and any device is used.

A setting is refused when its type or range is wrong, when two do not go together, and
when nothing of the run reads it. Each group is checked by a small function of its own;
what one module alone decides is asked of that module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt_jax import (
    adapters,
    fork,
    model,
    names,
    optimizer,
    prepare,
    sampling,
    settings,
    sharding,
    tasks,
)
from gpt_jax.optimizer import Hyper
from gpt_jax.tasks import lm
from gpt_jax.tasks.task import SHARED

LONGEST_S = 30 * 24 * 3600  # a wait that Python can count; no run means a longer one
LARGEST = float(np.finfo(np.float32).max)
ON_SAVE_ERROR = ("stop", "continue")
RANDOM = "random"  # init_from: weights that are drawn, also where a task is for tuning

AT_LEAST_1 = (
    *("batch_size", "accumulate", "log_every", "keep", "max_skipped"),
    "heartbeat_timeout_seconds",
)
NOT_NEGATIVE = (
    *("steps", "max_tokens", "max_bytes", "max_seconds", "fit_seconds", "patience"),
    *("sample_every", "spike_window", "early_from"),
    *("eval_every", "eval_windows", "eval_batch_size", "checkpoint_every", "seed"),
)
BELOW_1 = (
    *("dropout_embed", "dropout_attn", "dropout_residual", "dropout_adapter"),
    "label_smoothing",
    *("beta1", "beta2", "momentum", "ema_decay"),
)
# Keys that are off at 0: they are refused where nothing reads them and they are on.
# Other keys always have a value; they are refused where a user has set them.
SWITCHES = (
    *("hyper.label_smoothing", "hyper.z_loss", "hyper.dropout_embed"),
    *("hyper.dropout_attn", "hyper.dropout_residual", "hyper.dropout_adapter"),
    *("data.stride", "data.skip_bad_docs", "model.n_classes", "patience"),
    "max_bytes",
)


@dataclass(frozen=True)
class Run:
    """The keys of a config that are in no group: see configs/common.py."""

    seed: int
    init_from: str
    fork: str
    allow_data_change: bool
    batch_size: int
    accumulate: int
    steps: int
    max_tokens: int
    max_bytes: int
    max_seconds: float
    fit_seconds: float
    patience: int
    spike_window: int
    max_skipped: int
    log_every: int
    eval_every: int
    early_from: int
    eval_batch_size: int
    eval_windows: int
    checkpoint_every: int
    keep: int
    on_save_error: str
    sample_every: int
    tensorboard: bool
    wandb: str
    compile_cache: str
    heartbeat_timeout_seconds: int
    data_timeout_s: float
    grace_s: float


@dataclass(frozen=True)
class Data:
    """The keys of config.data."""

    source: str
    field: str
    tokenizer: str
    folder: str
    cache: str
    val_fraction: float
    split: str
    seq_len: int
    stride: int
    workers: int
    skip_bad_docs: bool


@dataclass(frozen=True)
class Samples:
    """The keys of config.sample."""

    prompt: str
    count: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    words: bool


Tree = Mapping[str, Any]  # a config, or a group of it, as plain mappings

GROUPS: dict[str, Tree] = {
    "data": settings.declared(Data),
    "model": settings.declared(model.GPTConfig),
    "optimizer": {
        **settings.declared(optimizer.make, without=("declared", "spread", "scales")),
        "ema": bool,
    },
    "hyper": dict.fromkeys(Hyper._fields, float),
    "sample": settings.declared(Samples),
    "mesh": settings.declared(sharding.check),
}
VARIANTS = ("task", "adapter")  # groups whose keys depend on the name in them


def check(config: Tree, recipe: Tree | None = None) -> None:
    """Refuses what no run can have.

    Args:
      config: what is to run, see configs/common.py.
      recipe: the same before a user set some of its keys: those are refused where
        nothing reads them, whatever they are.

    Raises:
      ValueError: names the key, what it may be and the value found.
    """
    check_types(config)
    check_run(config)
    check_hyper(config["hyper"])
    check_model(config)
    check_data(config)
    check_samples(config["sample"])
    adapters.make({}, **config["adapter"])
    rule = config["optimizer"]
    optimizer.make({}, **{key: value for key, value in rule.items() if key != "ema"})
    sharding.check(**config["mesh"])
    check_task(config)
    check_read(config, recipe)


def check_types(config: Tree) -> None:
    """Refuses keys that there are not, and values of another type."""
    groups = dict.fromkeys((*GROUPS, *VARIANTS), Any)
    settings.fit("", config, {**settings.declared(Run), **groups})
    for group, wanted in GROUPS.items():
        settings.fit(group, config[group], wanted)
    for group in VARIANTS:
        kept = config[group]
        if not isinstance(kept, Mapping) or not isinstance(kept.get("name"), str):
            raise ValueError(
                f"{group} is {kept!r:.80}: it is a group of settings with a name, "
                "which the config's file or its options choose"
            )


def check_run(config: Tree) -> None:
    """Refuses numbers out of their range, of the keys that are in no group."""
    for key in AT_LEAST_1:
        if config[key] < 1:
            raise ValueError(f"{key} is {config[key]}: it must be at least 1")
    for key in NOT_NEGATIVE:
        if config[key] < 0:
            raise ValueError(f"{key} is {config[key]}: it must not be negative")
    for key, least in {"data_timeout_s": "above", "grace_s": "at least"}.items():
        wait = config[key]
        if wait > LONGEST_S or (wait <= 0 if least == "above" else wait < 0):
            raise ValueError(
                f"{key} is {wait}: it must be {least} 0 seconds and at most "
                f"{LONGEST_S:,}"
            )
    if config["spike_window"] == 1:
        raise ValueError("spike_window is 1: give 2 losses or more, or 0 for no guard")
    if config["seed"] >= 2**63:
        raise ValueError(f"seed is {config['seed']}: it must be below 2^63")
    fork.parse(config["fork"])
    if config["fit_seconds"]:
        names.choose(
            "fit_seconds chooses the steps while it trains, so optimizer.schedule",
            config["optimizer"]["schedule"],
            ("wsd", "constant"),
        )
    names.choose("on_save_error", config["on_save_error"], ON_SAVE_ERROR)
    if config["batch_size"] % config["accumulate"]:
        raise ValueError(
            f"batch_size {config['batch_size']} is not a multiple of accumulate "
            f"{config['accumulate']}"
        )


def check_hyper(hyper: Tree) -> None:
    """Refuses traced numbers out of their ranges."""
    for key, value in hyper.items():
        if not 0 <= value <= LARGEST:
            raise ValueError(
                f"hyper.{key} is {value}: it must be a float32 number >= 0"
            )
    for key in BELOW_1:
        if hyper[key] >= 1:
            raise ValueError(f"hyper.{key} is {hyper[key]}: it must be below 1")


def check_model(config: Tree) -> None:
    """Refuses a model that cannot be, or whose attention is another than it says."""
    fields = config["model"]
    try:  # 1 stands for the size that the tokenizer will give
        model.GPTConfig(**{**fields, "vocab_size": fields["vocab_size"] or 1})
    except ArithmeticError as error:
        raise ValueError(f"config.model: {error}") from error
    if fields["param"] == "mup" and config["optimizer"]["name"] == "sgd":
        raise ValueError(
            "model.param is mup, whose rates are those of adaptive optimizers, but "
            "optimizer.name is sgd: take adamw, lion, adafactor or muon"
        )
    off = {
        "model.attn_softcap": fields["attn_softcap"],
        "hyper.dropout_attn": config["hyper"]["dropout_attn"],
    }
    for key, value in off.items():
        if value and fields["attention"] in ("xla", "cudnn"):
            raise ValueError(
                f"model.attention {fields['attention']} does not know {key}, which is "
                f"{value}: set it to 0, or take auto or plain"
            )


def check_data(config: Tree) -> None:
    """Refuses settings that no text can be prepared or cut with."""
    data = config["data"]
    text = ("split", "val_fraction", "workers")
    prepare.check(**{key: data[key] for key in text})
    for key in ("seq_len", "stride"):
        if data[key] < 0:
            raise ValueError(
                f"data.{key} is {data[key]}: give a number of tokens, or 0 to have it "
                "chosen"
            )
    context = config["model"]["context_length"]
    lm.check_window(data["seq_len"] or context, context)


def check_samples(chosen: Tree) -> None:
    """Refuses samples that cannot be drawn."""
    sampling.check(**sample_settings(chosen))
    if chosen["count"] < 1:
        raise ValueError(f"sample.count is {chosen['count']}: it must be at least 1")


def sample_settings(chosen: Tree) -> dict[str, Any]:
    """Returns how the samples of a run are drawn, as `sample.texts` wants it."""
    own = {name: chosen[name] for name in sampling.SETTINGS if name in chosen}
    return sampling.settings(chosen["max_new_tokens"], **own)


def check_task(config: Tree) -> None:
    """Refuses a task that cannot be, or that has no weights to go on from."""
    options = {key: value for key, value in config["task"].items() if key != "name"}
    name = config["task"]["name"]
    tasks.check(name, options, config["data"])
    kind = tasks.TABLE[name]
    if kind.tuned and not config["init_from"]:
        raise ValueError(
            f"task {name} goes on from trained weights, and init_from names none: say "
            f"--config={kind.config}:run=RUN_FOLDER, or --config.init_from=...; "
            "run=none begins at random weights, to try things out"
        )
    rollouts = options.get("updates", 1)
    for key in ("steps", "eval_every", "checkpoint_every"):
        if config[key] % rollouts:
            raise ValueError(
                f"{key} {config[key]} is not a multiple of task.updates {rollouts}: so "
                "many steps share a rollout, which is not saved"
            )


def check_read(config: Tree, recipe: Tree | None) -> None:
    """Refuses settings that nothing of this run reads; see `check`."""
    for key, who in unread(config).items():
        value = _at(config, key)
        if key in SWITCHES and value:
            off = type(value)()
        elif recipe and _at(recipe, key) != value:
            off = _at(recipe, key)
        else:
            continue
        raise ValueError(
            f"{key} is {value!r}, but {who} does not read it: leave it at {off!r}"
        )


def unread(config: Tree) -> dict[str, str]:
    """Returns the dotted keys that nothing of this run reads, each with who does not.

    Keys that say where a run trains, and what it writes, are never among them.
    """
    task, rule = config["task"], config["optimizer"]
    kind = tasks.TABLE[task["name"]]
    variant = task.get("variant", task["name"])
    variant = f" ({variant})" if variant != task["name"] else ""
    found = dict.fromkeys(
        {*SHARED} - {*kind.reads(task)}, f"task {task['name']}{variant}"
    )
    for key in kind.idle(task):
        found[f"task.{key}"] = f"task {task['name']} beside its other keys"
    readers = (
        ("optimizer", optimizer.READS, rule["name"]),
        ("schedule", optimizer.SCHEDULE_READS, rule["schedule"]),
        ("adapter", adapters.READS, config["adapter"]["name"]),
    )
    for what, table, name in readers:
        others = {key for keys in table.values() for key in keys} - {
            *table.get(name, ())
        }
        found |= dict.fromkeys([f"hyper.{key}" for key in others], f"{what} {name}")
    if rule["name"] != "muon":
        found["optimizer.muon"] = f"optimizer {rule['name']}"
    if rule["name"] == "adafactor":
        found["optimizer.moment_dtype"] = "optimizer adafactor"
    found |= _unread_of_the_model(config)
    switched = {  # by a key that is off
        "optimizer.ema": ("hyper.ema_decay",),
        "spike_window": ("hyper.spike_sigma",),
        "hyper.warmup_steps": ("hyper.initial_lr_ratio",),
        "eval_every": ("patience",),
        "sample_every": [f"sample.{key}" for key in config["sample"]],
    }
    for switch, keys in switched.items():
        if not _at(config, switch):
            found |= dict.fromkeys(keys, f"a run without {switch}")
    return dict(sorted(found.items()))


def _unread_of_the_model(config: Tree) -> dict[str, str]:
    fields, found = config["model"], {}
    if fields["norm"] == "rmsnorm":
        found["model.norm_bias"] = "model.norm rmsnorm"
    if fields["param"] != "mup":
        found["model.base_width"] = f"model.param {fields['param']}"
    if not fields["norm_scale"]:
        found["model.norm_offset"] = "a model without norm_scale"
    if begins(config["init_from"]) != RANDOM:
        found["data.tokenizer"] = (
            "a run that starts from init_from, with its tokenizer,"
        )
        if config["task"]["name"] != "classify":  # whose head is drawn
            found["model.init"] = found["model.zero_init"] = "a run with init_from"
    return found


def begins(init_from: str) -> str:
    """Returns where a new run's weights come from: "random", or what is named."""
    return init_from or RANDOM


def _at(config: Tree, key: str) -> Any:
    """Returns what a config holds at a dotted key; None where it has no such key."""
    group, _, name = key.rpartition(".")
    return (config[group] if group else config).get(name)
