"""Refuses, before the first trial starts, what would end a trial at its start."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gpt_jax import runs, train
from gpt_jax.sweep.plan import Plan

NOWHERE = Path("no-such-run")  # a trial has no folder yet


def validate(
    configs: Iterable[tuple[str, ConfigDict]], plan: Plan, known: dict | None = None
) -> None:
    """Checks configs as a run would; texts are prepared, once for all trials.

    Args:
      configs: (what, config), in order.
      plan: its pruner and metric must fit what the trials evaluate.
      known: what was checked before; parts that many trials share are checked once.

    Raises:
      ValueError: the first mistake, and which trial makes it.
    """
    known = {} if known is None else known
    for what, config in configs:
        try:
            _check(config, plan, known)
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{what}: {error}") from error


def all_read(configs: Iterable[tuple[str, ConfigDict]], plan: Plan) -> None:
    """Refuses a key that is swept, or fixed, and that no trial reads.

    Some may leave it: a space that draws the optimizer has the rates of them all.

    Raises:
      ValueError: names the key, and who does not read it.
    """
    unread = [train.unread(config) for _, config in configs]
    for key in (*plan.keys, *(key for key, value in plan.fixed.items() if value)):
        if all(key in keys for keys in unread):
            raise ValueError(f"{key} is set, but {unread[0][key]} does not read it")


def _check(config: ConfigDict, plan: Plan, known: dict) -> None:
    train.check(config)
    if plan.pruner and not 0 < config.eval_every < config.steps:
        raise ValueError(
            f"eval_every is {config.eval_every} of {config.steps} steps: the pruner "
            f"{plan.pruner['name']} needs evaluations on the way"
        )
    if plan.pruner and plan.pruner["first"] >= config.steps:
        raise ValueError(
            f"the pruner {plan.pruner['name']} first judges at step "
            f"{plan.pruner['first']}, but the run has {config.steps} steps"
        )
    text = (config.task, config.data, config.init_from, config.model.context_length)
    task = _once(known, ("task", *text), lambda: train.make_task(config, NOWHERE))
    model = ("model", config.model, *text)
    _once(known, model, lambda: runs.model_config(config, task.tokenizer, task.classes))


def _once(known: dict, key: Any, make) -> Any:
    text = json.dumps(key, default=lambda part: part.to_dict())
    if text not in known:
        known[text] = make()
    return known[text]
