"""What no run can have, refused before any text is read and any device is used.

A setting is refused when its type or range is wrong, when two do not go together, and
when nothing of the run reads it. Each group is checked by a small function of its own;
what one module alone decides is asked of that module.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
from gpt_jax.options import Data, Mesh, Run, Sample
from gpt_jax.tasks import lm
from gpt_jax.tasks.task import DROPOUTS, SHARED
from gpt_jax.weights import Declared

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
class Options(Run):
    """A config, typed: what the parts of a run are made of, and how long it goes on.

    Attributes:
      data: what is learnt from.
      model: the architecture; vocab_size 0 is that of the tokenizer.
      task: what is learnt.
      adapter: what the weights are -> which of them move.
      optimizer: what the weights are -> how they move; takes `spread` as well, see
        `optimizer.make`.
      schedule: of the learning rate.
      ema: whether a moving average of the weights is kept.
      hyper: the traced numbers, as they stand in the config.
      sample: the texts that are written on the way.
      mesh: where all that lies.
    """

    data: Data
    model: model.GPTConfig
    task: tasks.Chosen
    adapter: Callable[[Declared], adapters.Adapter]
    optimizer: Callable[..., optimizer.Optimizer]
    schedule: str
    ema: bool
    hyper: Hyper
    sample: Sample
    mesh: Mesh

    @property
    def dropout(self) -> list[str]:
        """Which rates of hyper are above zero: the others are left out of programs."""
        return [key for key in DROPOUTS if getattr(self.hyper, key) > 0]


Tree = Mapping[str, Any]  # a config, or a group of it, as plain mappings

GROUPS: dict[str, Tree] = {
    "data": settings.declared(Data),
    "model": settings.declared(model.GPTConfig),
    "optimizer": {
        **settings.declared(optimizer.make, without=("declared", "spread", "scales")),
        "ema": bool,
    },
    "hyper": dict.fromkeys(Hyper._fields, float),
    "sample": settings.declared(Sample),
    "mesh": settings.declared(Mesh),
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


def unpack(config: Tree) -> Options:
    """Returns a config that `check` has let pass, typed.

    Raises:
      ValueError: a key is not there, or of another type, or makes no part of a run.
    """
    check_types(config)
    rule = {key: x for key, x in config["optimizer"].items() if key != "ema"}
    return Options(
        **{key: config[key] for key in settings.declared(Run)},
        data=Data(**config["data"]),
        model=model.GPTConfig(**config["model"]),
        task=tasks.chosen(config["task"]),
        adapter=partial(adapters.make, **config["adapter"]),
        optimizer=partial(optimizer.make, **rule),
        schedule=rule["schedule"],
        ema=config["optimizer"]["ema"],
        hyper=Hyper(**config["hyper"]),
        sample=Sample(**config["sample"]),
        mesh=Mesh(**config["mesh"]),
    )


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
    try:
        model.GPTConfig(**fields)
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
    sampling.check(**sample_settings(Sample(**chosen)))
    if chosen["count"] < 1:
        raise ValueError(f"sample.count is {chosen['count']}: it must be at least 1")


def sample_settings(chosen: Sample) -> dict[str, Any]:
    """Returns how the samples of a run are drawn, as `sample.texts` wants it."""
    own = {k: value for k, value in vars(chosen).items() if k in sampling.SETTINGS}
    return sampling.settings(chosen.max_new_tokens, **own)


def check_task(config: Tree) -> None:
    """Refuses a task that cannot be, or that has no weights to go on from."""
    task = tasks.chosen(config["task"])
    name, kind = task.name, task.kind
    kind.check(task.options, Data(**config["data"]))
    if kind.tuned and not config["init_from"]:
        raise ValueError(
            f"task {name} goes on from trained weights, and init_from names none: say "
            f"--config={kind.config}:run=RUN_FOLDER, or --config.init_from=...; "
            "run=none begins at random weights, to try things out"
        )
    rollouts = config["task"].get("updates", 1)
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
    chosen = tasks.chosen(task)
    variant = task.get("variant", task["name"])
    variant = f" ({variant})" if variant != task["name"] else ""
    found = dict.fromkeys(
        {*SHARED} - {*chosen.kind.reads(chosen.options)},
        f"task {chosen.name}{variant}",
    )
    for key in chosen.kind.idle(chosen.options):
        found[f"task.{key}"] = f"task {chosen.name} beside its other keys"
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
    known = optimizer.OPTIMIZERS[rule["name"]]
    for key in {"muon", "moment_dtype"} - {*known.options}:
        found[f"optimizer.{key}"] = f"optimizer {rule['name']}"
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
    if fields["position"] != "rope":
        found["model.rotary_dim"] = f"model.position {fields['position']}"
    if not fields["qk_norm"]:
        found["model.qk_norm_over"] = "a model without qk_norm"
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
