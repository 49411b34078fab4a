"""How weights move: clipping, decay, groups of rates, and five optimizers.

`make(...)` returns an `Optimizer`, a pair of functions. Which rule moves a weight, its
decay and its rate are chosen by regex over the weight's path; every number is traced
(`Hyper`), so a sweep over numbers compiles once and `jax.vmap` trains a population.
Rules are in rules.py and muon.py, schedules in schedules.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax import names, settings, weights
from gpt_jax.optimizer import rules
from gpt_jax.optimizer.hyper import Hyper
from gpt_jax.optimizer.muon import (
    QUINTIC,
    Matrices,
    matrix_shape,
    muon_rule,
    orthogonalise,
)
from gpt_jax.optimizer.rules import Rule
from gpt_jax.optimizer.schedules import (
    SCHEDULE_READS,
    SCHEDULES,
    WARM_UP,
    constant,
    cosine,
    linear,
    wsd,
)
from gpt_jax.weights import Declared

__all__ = [
    "OPTIMIZERS",
    "QUINTIC",
    "READS",
    "SCHEDULES",
    "SCHEDULE_READS",
    "WARM_UP",
    "Hyper",
    "Optimizer",
    "Rule",
    "constant",
    "cosine",
    "ema_update",
    "linear",
    "make",
    "orthogonalise",
    "wsd",
]


class Optimizer(NamedTuple):
    """A pair of pure functions.

    Attributes:
      init: params -> opt_state: float32, but see `moment_dtype`.
      update: (grads, opt_state, params, step, hyper) -> (params, opt_state, info).
        `step` counts from 0; `info` holds "lr" (of this step, before group factors)
        and "grad_norm" (of the weights that move, before clipping).
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any, dict[str, jax.Array]]]


class Place(NamedTuple):
    """What happens to one weight: its group, decay factor and rate factor."""

    group: str
    decay: float
    rate: float


def make(
    declared: Declared,
    *,
    name: str,
    schedule: str,
    decay: Sequence[tuple[str, bool | float]],
    rates: Sequence[tuple[str, float]],
    freeze: Sequence[str],
    muon: Sequence[str],
    moment_dtype: str,
    spread: Callable[[jax.Array], jax.Array] = lambda matrices_NRC: matrices_NRC,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> Optimizer:
    """Returns the optimizer `name`.

    Paths are joined by "/" and searched (`re.search`); in `decay` and `rates` the first
    match wins.

    Args:
      declared: what the weights are (weights.py).
      name: adamw, muon, lion, adafactor or sgd.
      schedule: constant, cosine, linear or wsd.
      decay: (regex, True, False or a factor of `hyper.weight_decay`); every weight must
        match one.
      rates: (regex, factor of the learning rate); 1 where none matches.
      freeze: regexes of weights that do not move; they take no memory.
      muon: regexes of the matrices that Muon takes (`hyper.matrix_lr`) when `name` is
        muon; AdamW takes the rest (`hyper.lr`).
      moment_dtype: how averages of gradients are kept (AdamW's and Lion's first moment,
        the momentum of Muon and SGD): float32, or bfloat16 for half the memory. Mean
        squares stay float32: bfloat16 steps by 1/256, and would not see the 1/1000
        that a beta2 of 0.999 moves them by.
      spread: applied to the stacks [N, R, C] that Muon orthogonalises: a sharding
        constraint over N here divides the work that devices would otherwise repeat.
      scales: by path, what directions of a weight are multiplied by (`model.rates`);
        not those of Muon, which fit every shape, and not the decay.

    Raises:
      ValueError: an unknown name or a table that cannot be here; in `init`, a weight
        without a decay rule, a pattern without a weight, or a Muon weight that is not
        a matrix.
    """
    _check_tables(decay=decay, rates=rates, freeze=freeze, muon=muon)
    dtype = names.choose("optimizer.moment_dtype", moment_dtype, MOMENT_DTYPES)
    matrices = Matrices(declared, spread)
    known = names.choose("optimizer.name", name, OPTIMIZERS)
    moves = known.rules(dtype, matrices)
    factor_at = names.choose("optimizer.schedule", schedule, SCHEDULES)

    def places(paths: Iterable[str]) -> dict[str, Place]:
        return _places(paths, declared, tuple(moves), decay, rates, freeze, muon)

    def init(params):
        leaves = _by_path(params)
        found = places(leaves)
        _check_patterns(leaves, found, rates, freeze, muon if name == "muon" else ())
        for path, place in found.items():
            if place.group == MATRICES:
                matrix_shape(declared, path)
        return {
            group: rule.init(_float32(_of_group(leaves, found, group)))
            for group, rule in moves.items()
            if any(place.group == group for place in found.values())
        }

    def update(grads, opt_state, params, step, hyper):
        leaves, slopes = _by_path(params), _by_path(grads)
        found = places(leaves)
        slopes = {path: slopes[path].astype(jnp.float32) for path in found}
        norm = optax.tree.norm(slopes)
        slopes = _clip(slopes, norm, hyper.clip)
        factor = factor_at(step, hyper)
        memory = {}
        for group in opt_state:
            directions, memory[group] = moves[group].update(
                _of_group(slopes, found, group), opt_state[group], hyper
            )
            lr = factor * (hyper.matrix_lr if group == MATRICES else hyper.lr)
            for path, direction in flatten_dict(directions, sep="/").items():
                place, old = found[path], leaves[path].astype(jnp.float32)
                pull = hyper.weight_decay * place.decay * old
                if group != MATRICES and path in scales:
                    direction = jnp.float32(scales[path]) * direction
                new = old - lr * place.rate * (direction + pull)
                leaves[path] = new.astype(leaves[path].dtype)
        params = jax.tree.unflatten(jax.tree.structure(params), leaves.values())
        return params, memory, {"lr": factor * hyper.lr, "grad_norm": norm}

    return Optimizer(init, update)


def ema_update(ema: Any, params: Any, decay: Any, step: Any) -> Any:
    """Returns the moving average of the weights after update number `step` (from 0).

    The average keeps min(decay, (1 + step) / (10 + step)) of itself, so that the
    starting weights fade early (the rule of TensorFlow's ExponentialMovingAverage).
    """
    step = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def moved(old, new):
        mixed = keep * old.astype(jnp.float32) + (1.0 - keep) * new.astype(jnp.float32)
        return mixed.astype(old.dtype)

    return jax.tree.map(moved, ema, params)


WEIGHTS, LAYERS, MATRICES = "weights", "layers", "matrices"  # groups, keys of opt_state


class Known(NamedTuple):
    """An optimizer that there is.

    Attributes:
      rules: (dtype of averages, what Muon has to know) -> the rule of each group.
      reads: what it reads of Hyper, besides clip.
      options: which of moment_dtype and muon it reads.
    """

    rules: Callable[[Any, Matrices], dict[str, Rule]]
    reads: tuple[str, ...]
    options: tuple[str, ...] = ("moment_dtype",)


ADAMW_READS = ("lr", "weight_decay", "beta1", "beta2", "eps")
OPTIMIZERS = {
    "adamw": Known(lambda dtype, _: {WEIGHTS: rules.adamw(dtype)}, ADAMW_READS),
    "lion": Known(
        lambda dtype, _: {WEIGHTS: rules.lion(dtype)},
        ("lr", "weight_decay", "beta1", "beta2"),
    ),
    "sgd": Known(
        lambda dtype, _: {WEIGHTS: rules.sgd(dtype)}, ("lr", "weight_decay", "momentum")
    ),
    "adafactor": Known(
        lambda dtype, _: {
            WEIGHTS: rules.ADAFACTOR,
            LAYERS: rules.per_layer(rules.ADAFACTOR),
        },
        ("lr", "weight_decay"),
        options=(),  # it keeps no average of gradients
    ),
    "muon": Known(
        lambda dtype, matrices: {
            **{WEIGHTS: rules.adamw(dtype), MATRICES: muon_rule(dtype, matrices)}
        },
        (*ADAMW_READS, "matrix_lr", "momentum"),
        options=("moment_dtype", "muon"),
    ),
}
READS = {name: known.reads for name, known in OPTIMIZERS.items()}
MOMENT_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _places(
    paths: Iterable[str],
    declared: Declared,
    groups: tuple[str, ...],
    decay: Sequence[tuple[str, float]],
    rates: Sequence[tuple[str, float]],
    freeze: Sequence[str],
    muon: Sequence[str],
) -> dict[str, Place]:
    """Returns the place of every weight that moves, in the order of the weights."""
    found = {}
    for path in paths:
        if _matches(freeze, path):
            continue
        group = WEIGHTS
        if MATRICES in groups and _matches(muon, path):
            group = MATRICES
        elif LAYERS in groups and "layers" in weights.at(declared, path).axes:
            group = LAYERS
        pull = _first(decay, path)
        if pull is None:
            raise ValueError(
                f"no rule of optimizer.decay matches the weight {path}; end the table "
                "with ('.*', True) or ('.*', False)"
            )
        rate = _first(rates, path)
        found[path] = Place(group, float(pull), 1.0 if rate is None else float(rate))
    return found


def _check_patterns(weights, found, rates, freeze, muon) -> None:
    """Raises when a pattern picks nothing, or when nothing is left to train."""
    tables = {"rates": [row[0] for row in rates], "freeze": freeze, "muon": muon}
    for table, patterns in tables.items():
        for pattern in patterns:
            if not any(_found(pattern, path) for path in weights):
                raise ValueError(
                    f"optimizer.{table} has the pattern {pattern!r}, which matches "
                    f"none of the {len(weights)} weights, such as {min(weights)}; "
                    "correct or remove it"
                )
    if not found:
        raise ValueError(
            f"optimizer.freeze matches all {len(weights)} weights: nothing would "
            "train; narrow its patterns"
        )


def _matches(patterns: Sequence[str], path: str) -> bool:
    return any(_found(pattern, path) for pattern in patterns)


def _first(table: Sequence[tuple[str, float]], path: str) -> float | None:
    return next((value for pattern, value in table if _found(pattern, path)), None)


def _check_tables(**tables: Sequence) -> None:
    """Raises ValueError for a table that is none, a bad regex, a negative factor."""
    kinds = settings.declared(make)
    settings.fit("optimizer", tables, {key: kinds[key] for key in tables})
    for key, table in tables.items():
        for row in table:
            pattern, factor = (row, 1) if isinstance(row, str) else row
            _found(pattern, "")
            if factor < 0:  # it would climb, or grow what should decay
                raise ValueError(
                    f"optimizer.{key} has {row!r}: its factor must be at least 0"
                )


def _found(pattern: str, path: str) -> bool:
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def _by_path(tree) -> dict[str, Any]:
    """Returns {"block_0/attn/query/kernel": leaf} in the order of the tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    key = jax.tree_util.keystr
    return {key(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _of_group(weights: dict[str, Any], found: dict[str, Place], group: str) -> dict:
    return _nest({p: weights[p] for p in found if found[p].group == group})


def _nest(weights: dict[str, Any]) -> dict:
    return unflatten_dict(weights, sep="/")


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _clip(slopes: dict[str, jax.Array], norm, limit) -> dict[str, jax.Array]:
    """Shrinks to the norm `limit`; 0 = off. A norm that is not finite shows through."""
    share = limit / jnp.where(norm > 0, norm, 1.0)
    shrink = jnp.where((limit > 0) & (norm > limit), share, 1.0)
    return {path: slope * shrink for path, slope in slopes.items()}
