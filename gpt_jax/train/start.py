"""Where a run begins: its own checkpoint, other weights, or random ones."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from gpt_jax import (
    checkpoint,
    checks,
    files,
    fork,
    generation,
    model,
    optimizer,
    pretrained,
    processes,
    runs,
    sharding,
    stores,
    tasks,
)
from gpt_jax.checks import Options
from gpt_jax.step import TrainState
from gpt_jax.train.config import unpack
from gpt_jax.train.job import Parts, Totals, ends_by, last_step, make_hyper


def first_tokenizer(config: Options, workdir: Path) -> Path:
    """Returns the tokenizer.json that belongs to `init_from`'s weights."""
    own = workdir / "tokenizer.json"  # a run that goes on needs no other
    if not own.is_file() and (at := fork.parse(config.fork)):
        return at.trunk / "tokenizer.json"
    if published := hugging_face(config):
        if own.is_file():
            return own
        tokenizer = pretrained.tokenizer(pretrained.find(published))
        far = files.is_address(config.data.folder)
        folder = files.expand(config.data.cache if far else config.data.folder)
        path = folder / f"tokenizer-{tokenizer.sha256[:12]}.json"
        tokenizer.save(path)
        return path
    source = stores.fetched(config.init_from) / "tokenizer.json"
    if own.is_file() and not source.is_file():
        return own
    runs.read_config(config.init_from)  # refuses what is no run
    return source


def keep_companions(config: Options, workdir: Path) -> None:
    """Keeps how texts are drawn, and the chat template if the task has none."""
    if checks.begins(config.init_from) == checks.RANDOM:
        return
    at, published = fork.parse(config.fork), hugging_face(config)
    source = at.trunk if at else pretrained.find(published or config.init_from)
    if (source / generation.FILE).is_file():
        generation.of(source)  # refuses one that no text can be written by
        files.write(workdir / generation.FILE, (source / generation.FILE).read_bytes())
    if not getattr(config.task.options, "template", ""):
        pretrained.keep_template(source, workdir)


def hugging_face(config: Options) -> str:
    """Returns what `init_from=hf:...` or `gguf:...` names, "" when it names a run."""
    prefix, _, name = config.init_from.partition(":")
    return name if prefix in ("hf", "gguf") else ""


def restore(
    saves: checkpoint.Checkpoints, parts: Parts, key: jax.Array
) -> tuple[TrainState, Totals, str]:
    """Returns the newest sound state of this run, laid out, and its totals.

    Newer checkpoints are set aside. The third is the digest of the frozen trees, "" for
    none.
    """
    state, totals, frozen = restored(saves, parts, key, None)
    saves.rewind(int(state.step))
    return state, totals, frozen


def restored(
    saves: checkpoint.Checkpoints, parts: Parts, key: jax.Array, step: int | None
) -> tuple[TrainState, Totals, str]:
    """Returns the state of a step (None: the newest sound one), and as `restore`."""
    shapes = jax.eval_shape(parts.first, key)
    wanted = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        shapes,
        parts.strategy.layout(shapes),
    )
    state, meta, _ = saves.restore(wanted._replace(frozen={}), step=step)
    runs.check_tokenizer(saves.folder.parent, parts.task.tokenizer, meta)
    if wanted.frozen:
        state = state._replace(frozen=saves.load_frozen(meta["frozen"], wanted.frozen))
    return state, Totals(**meta["totals"]), meta.get("frozen", "")


def resumed(
    record: ConfigDict, workdir: Path, parts: Parts, totals: Totals, step: int
) -> tuple[Totals, list[str]]:
    """Returns the totals that a run goes on with after `step`, and what to tell of it.

    Where evaluations are of something else now, the best loss begins anew.
    """
    read = lambda: runs.read_config(workdir).to_json()  # noqa: E731
    kept = runs.as_config(json.loads(processes.first(read)))
    old, config = unpack(runs.filled(kept, record)), unpack(record)
    told = rate_moves(old, config, parts.task, step)
    if not totals.measured:  # an older run: as far as its folder can tell
        noted = processes.first(lambda: runs.fingerprint_of(workdir))
        same = noted in (None, parts.task.fingerprint)
        if same and old.eval_windows == config.eval_windows:
            totals = totals._replace(measured=parts.measured)
    if totals.measured != parts.measured:
        if totals.best < math.inf:
            told.append(
                "evaluations are of other data or windows now: the best loss, "
                f"{totals.best:.4f} until here, begins anew"
            )
        totals = totals._replace(
            best=math.inf, stale=0, measured=parts.measured, since=step + 1
        )
    return totals, told


def rate_moves(old: Options, new: Options, task: tasks.Task, step: int) -> list[str]:
    """Returns a line where the rate of a resumed run is not what it was to be."""
    hypers = [make_hyper(config, task) for config in (old, new)]
    factor = optimizer.SCHEDULES[new.schedule]
    before, now = (float(factor(step, hyper) * hyper.lr) for hyper in hypers)
    if math.isclose(before, now, rel_tol=1e-3):
        return []
    ends, end = (int(hyper.decay_steps) for hyper in hypers)
    return [
        f"the schedule ends at step {end:,} now, not at {ends:,}: at step {step:,} the "
        f"learning rate goes from {before:.2g} to {now:.2g} "
        f"(--config.hyper.decay_steps={ends} keeps it as it was)"
    ]


def too_short(config: Options, task: tasks.Task) -> list[str]:
    """Returns a line where a run ends before its warm-up does."""
    end, warm = last_step(config, task), config.hyper.warmup_steps
    if not 0 < end <= warm:
        return []
    return [
        f"the warm-up of {warm:,.0f} steps is as long as the run of {end:,}, or "
        "longer: the learning rate does not come to hyper.lr"
    ]


def begin(
    record: ConfigDict, parts: Parts, key: jax.Array
) -> tuple[TrainState, Totals]:
    """Returns the state and totals that a new run begins with.

    They are those of `fork`'s step, or of none: `init_from`'s weights, or random ones.
    """
    config = unpack(record)
    if at := fork.parse(config.fork):
        return forked(at, record, parts, key)
    return first_state(config, parts, key), Totals(measured=parts.measured)


def check_fork(config: ConfigDict, workdir: Path) -> None:
    """Refuses a new run whose trunk is not there; one that goes on needs none."""
    started = checkpoint.Checkpoints(workdir / "checkpoints", keep=None).steps()
    if (at := fork.parse(config.fork)) and not started:
        fork.check_there(at, workdir)


def forked(
    at: fork.Fork, record: ConfigDict, parts: Parts, key: jax.Array
) -> tuple[TrainState, Totals]:
    """Returns the state of a trunk at a step, and the tokens that it has seen.

    Seconds and evaluations are those of the new run alone.

    Raises:
      ValueError: the fork would be another model, or ends before it begins.
    """
    config, task = unpack(record), parts.task
    processes.in_turn(
        lambda: fork.check_same(at, record, task.tokenizer, task.fingerprint)
    )
    if (end := last_step(config, task)) <= at.step:
        raise ValueError(
            f"{ends_by(config, task)} ends the run at step {end:,}, but it forks after "
            f"step {at.step:,}: steps count on from there, give more"
        )
    saves = checkpoint.Checkpoints(at.trunk / "checkpoints", keep=None)
    state, totals, _ = restored(saves, parts, key, at.step)
    return state, Totals(tokens=totals.tokens, measured=parts.measured)


def first_state(config: Options, parts: Parts, key: jax.Array) -> TrainState:
    """Returns the state before step 1, from `init_from`'s weights or random ones."""
    if checks.begins(config.init_from) == checks.RANDOM:
        return parts.first(key)
    cfg = parts.task.model.cfg
    if published := hugging_face(config):
        folder = pretrained.find(published)
        weights = pretrained.load(folder, replace(cfg, n_classes=0))
    else:
        weights = runs.open(config.init_from).params
    weights = model.stack(weights, cfg) if cfg.scan_layers else weights
    weights = adopt(weights, parts.task, key)
    check_positions(weights, cfg.context_length)
    checkpoint.check_same(jax.eval_shape(partial(model.init, cfg), key), weights)
    layout = parts.strategy.layout
    weights = sharding.lay_out(weights, layout(weights))
    places = layout(jax.eval_shape(parts.fresh, weights, key))
    return jax.jit(parts.fresh, out_shardings=places)(weights, key)


def check_positions(weights: Any, context_length: int) -> None:
    """Refuses learned positions that are not as many as the context is long."""
    learned = weights.get("positions", {}).get("embedding")
    if learned is not None and len(learned) != context_length:
        raise ValueError(
            f"model.context_length is {context_length}, but init_from learnt vectors "
            f"for {len(learned)} positions: take {len(learned)}, and shorter windows "
            "with data.seq_len; only models with rope can be given a longer context"
        )


def adopt(weights: Any, task: tasks.Task, key: jax.Array) -> Any:
    """Returns weights of another task, less `task.drops`, with new `task.draws`."""
    cfg = task.model.cfg
    wanted = flatten_dict(jax.eval_shape(partial(model.init, cfg), key), sep="/")
    found: dict[str, Any] = flatten_dict(weights, sep="/")  # type: ignore[assignment]
    kept = {
        path: leaf
        for path, leaf in found.items()
        if path in wanted or not any(re.search(rule, path) for rule in task.drops)
    }
    absent = [
        path
        for path in wanted.keys() - kept.keys()
        if any(re.search(rule, path) for rule in task.draws)
    ]
    if absent:

        def draw(key):  # these alone: the whole model may not fit on one device
            drawn = flatten_dict(model.init(cfg, key), sep="/")
            return {path: drawn[path] for path in absent}

        kept |= jax.jit(draw)(key)
    return unflatten_dict(kept, sep="/")
