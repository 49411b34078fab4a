"""Refuses, before the first trial starts, what would end a trial at its start."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from gpt_jax import adapters, evaluate, model, names, runs, seeds, tasks, train
from gpt_jax.checks import Options
from gpt_jax.criterion import Criterion
from gpt_jax.population import Evolve
from gpt_jax.population.evolve import check_members
from gpt_jax.sweep.plan import Plan
from gpt_jax.sweep.space import LABEL, OPTIONS

NOWHERE = Path("no-such-run")  # a trial has no folder yet
# What a run records beside the means of its losses (metrics.Writer).
ALWAYS = ("lr", "grad_norm", "skipped", "tokens", "seconds", "tokens_per_second", "mfu")


def validate(
    configs: Iterable[tuple[str, ConfigDict]],
    plan: Plan,
    known: dict | None = None,
    criterion: Criterion | None = None,
) -> None:
    """Checks configs as a run would; texts are prepared, once for all trials.

    Args:
      configs: (what, config), in order.
      plan: its pruner and metric must fit what the trials evaluate.
      known: what was checked before; parts that many trials share are checked once.
      criterion: a further one that they must be told by.

    Raises:
      ValueError: the first mistake, and which trial makes it.
    """
    known = {} if known is None else known
    for what, config in configs:
        try:
            _check(config, plan, known, {plan.criterion, criterion or plan.criterion})
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{what}: {error}") from error


def all_differ(configs: Iterable[tuple[str, ConfigDict]], plan: Plan) -> None:
    """Refuses two configs that are one run: it would be trained twice.

    Raises:
      ValueError: the first two, by what they are called.
    """
    where = re.compile("|".join(runs.WHERE))
    swept = [key for key in plan.keys if key != LABEL and not where.fullmatch(key)]
    seen: dict[str, str] = {}
    for what, config in configs:
        if OPTIONS in plan.keys:  # they may change any key
            flat = runs.flat(config)
            own = {key: x for key, x in flat.items() if not where.fullmatch(key)}
        else:
            own = {key: _at(config, key) for key in swept}
        first = seen.setdefault(seeds.text(own), what)
        if first != what:
            raise ValueError(f"{what} is the same run as {first}: leave one out")


def all_read(configs: Iterable[tuple[str, ConfigDict]], plan: Plan) -> None:
    """Refuses a key that is swept, or fixed, and that no trial reads.

    Some may leave it: a space that draws the optimizer has the rates of them all.

    Raises:
      ValueError: names the key, and who does not read it.
    """
    unread = [train.unread(config) for _, config in configs]
    swept = [key for key in plan.keys if key not in (LABEL, OPTIONS)]
    for key in (*swept, *(key for key, value in plan.fixed.items() if value)):
        if all(key in keys for keys in unread):
            raise ValueError(f"{key} is set, but {unread[0][key]} does not read it")


def metrics_of(config: ConfigDict, task: tasks.Task) -> list[str]:
    """Returns the names that a run's record will have; nothing is computed."""
    options, cfg = train.unpack(config), task.model.cfg
    hyper = train.make_hyper(options, task)
    adapter = options.adapter(model.declared(cfg))

    def sums(key, examples, in_training):
        weights = model.init(cfg, key)
        params, frozen = adapter.split(weights, key)
        if task.reference:
            frozen = adapters.with_reference(weights, frozen)
        batch = {name: x[None] for name, x in examples[0].items()}
        key = key if in_training else None
        return task.loss(adapter.join(params, frozen), frozen, batch, key, hyper)

    def recorded(name, examples, in_training=False):
        shapes = jax.eval_shape(
            lambda key: sums(key, examples, in_training), jax.random.key(0)
        )
        means = evaluate.means(dict.fromkeys(shapes, 1.0))
        return [f"{name}_{key}" for key in means]

    found = [*ALWAYS]
    for name, examples in task.evals.items():
        found += recorded(name, examples)
    # What is trained on is known once it is rolled out.
    found += recorded("train", task.train, not task.rollout)
    return [name for name in found if name != "train_perplexity"]


def _check(
    config: ConfigDict, plan: Plan, known: dict, criteria: set[Criterion]
) -> None:
    train.check(config)
    train.check_fork(config, NOWHERE)
    if plan.pruner and not 0 < config.eval_every < config.steps:
        raise ValueError(
            f"eval_every is {config.eval_every} of {config.steps} steps: the pruner "
            f"{plan.pruner['name']} needs evaluations on the way"
        )
    if plan.evolve:
        evolve = Evolve(**plan.evolve)
        check_members([config, config], evolve, config.steps)
    options = train.unpack(config)
    text = (config.task, config.data, config.init_from, config.model.context_length)
    task = _once(known, ("task", *text), lambda: train.make_task(options, NOWHERE))
    if plan.pruner:
        _judged(options, plan.pruner, task)
    classes = ("model", config.model, *text)
    _once(known, classes, lambda: runs.model_config(
        config, task.tokenizer, task.classes))  # fmt: skip
    losses = ("metrics", config.task, sorted(task.evals))
    recorded = _once(known, losses, lambda: metrics_of(config, task))
    if both := sorted(plan.after.keys() & {*recorded}):
        raise ValueError(f"after has {both[0]}, which a run records: rename it")
    if plan.cost == "bytes" and "val_bpb" not in recorded:
        raise ValueError(
            f"cost is 'bytes', but task {config.task.name} does not record val_bpb, "
            "which says how many bytes its tokens are: take 'tokens'"
        )
    for criterion in criteria:
        names.choose("metric", criterion.metric, [*recorded, *plan.after])
        _same_tokens(task, criterion.metric, recorded, known)
        once = criterion.metric in plan.after
        _evaluated(config, 1 if once else train.last_step(options, task), criterion)


def _judged(config: Options, pruner: Mapping[str, Any], task: tasks.Task) -> None:
    """Refuses runs that end before a pruner first judges them."""
    by, end = pruner.get("by", "steps"), train.last_step(config, task)
    if by == "tokens":
        end *= train.tokens_per_step(config, task)
    if pruner["first"] >= end:
        where = "step " if by == "steps" else ""
        raise ValueError(
            f"the pruner {pruner['name']} first judges at {where}{pruner['first']}"
            f"{'' if by == 'steps' else ' tokens'}, but the run has {end} {by}"
        )


def _evaluated(config: ConfigDict, steps: int, criterion: Criterion) -> None:
    """Refuses runs of fewer evaluations than the criterion takes the mean of."""
    count = math.ceil(steps / config.eval_every) if config.eval_every else 1
    if count < criterion.fewest:
        raise ValueError(
            f"at is {criterion.at!r}, but a run of {steps} steps with eval_every "
            f"{config.eval_every} has {count} evaluations after its start"
        )


def _same_tokens(task: tasks.Task, metric: str, recorded: list[str], known: dict):
    """Refuses losses per token of trials whose tokens are not the same."""
    per_token = metric.endswith(("_loss", "_perplexity")) and any(
        name.endswith("_perplexity") for name in recorded
    )
    first = known.setdefault("tokenizer", task.tokenizer.sha256)
    if per_token and first != task.tokenizer.sha256:
        raise ValueError(
            f"it has another tokenizer than the first, and metric {metric} is per "
            "token, so it cannot rank them: set metric = 'val_bpb', bits per byte"
        )


def _at(config: ConfigDict, dotted: str) -> Any:
    *parents, key = dotted.split(".")
    for parent in parents:
        config = config[parent]
    value = config[key]
    return value.to_dict() if isinstance(value, ConfigDict) else value


def _once(known: dict, key: Any, make) -> Any:
    text = json.dumps(key, default=lambda part: part.to_dict())
    if text not in known:
        known[text] = make()
    return known[text]
