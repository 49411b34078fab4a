"""How weights move: schedules, clipping, and five optimizers as pure functions.

`make(...)` returns an `Optimizer`, a pair of functions. Which rule moves a weight, its
decay and its rate are chosen by regex over the weight's path; every number is traced
(`Hyper`), so a sweep over numbers compiles once and `jax.vmap` trains a population.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax import names, settings, weights
from gpt_jax.weights import Declared

# Shape legend: N matrices, R rows, C columns.


class Hyper(NamedTuple):
    """The traced numbers of a run; configs/common.py says what each one means."""

    lr: Any
    matrix_lr: Any
    weight_decay: Any
    beta1: Any
    beta2: Any
    eps: Any
    momentum: Any
    warmup_steps: Any
    initial_lr_ratio: Any
    decay_steps: Any
    decay_fraction: Any
    final_lr_ratio: Any
    clip: Any
    dropout_embed: Any
    dropout_attn: Any
    dropout_residual: Any
    dropout_adapter: Any
    label_smoothing: Any
    z_loss: Any
    ema_decay: Any
    spike_sigma: Any


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


class Rule(NamedTuple):
    """A direction for a tree of weights, before decay and learning rate.

    Attributes:
      init: weights -> memory.
      update: (grads, memory, hyper) -> (directions, memory).
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Hyper], tuple[Any, Any]]


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
    matrices = _Matrices(declared, spread)
    rules = names.choose("optimizer.name", name, OPTIMIZERS)(dtype, matrices)
    factor_at = names.choose("optimizer.schedule", schedule, SCHEDULES)

    def places(paths: Iterable[str]) -> dict[str, Place]:
        return _places(paths, declared, tuple(rules), decay, rates, freeze, muon)

    def init(params):
        leaves = _by_path(params)
        found = places(leaves)
        _check_patterns(leaves, found, rates, freeze, muon if name == "muon" else ())
        for path, place in found.items():
            if place.group == MATRICES:
                _matrix_shape(declared, path)
        return {
            group: rule.init(_float32(_of_group(leaves, found, group)))
            for group, rule in rules.items()
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
            directions, memory[group] = rules[group].update(
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
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(
        lambda old, new: (keep * old + (1.0 - keep) * new).astype(old.dtype),
        ema,
        params,
    )


# ---- schedules: f(step, hyper) -> the share of the peak learning rate ----


def constant(step, hyper: Hyper):
    """Warm-up, then 1."""
    return _warm(step, hyper, 1.0)


def cosine(step, hyper: Hyper):
    """Warm-up, then half a cosine to the final ratio at `decay_steps`."""
    share = 0.5 * (1.0 + jnp.cos(jnp.pi * _progress(step, hyper.warmup_steps, hyper)))
    return _warm(step, hyper, _between(hyper.final_lr_ratio, share))


def linear(step, hyper: Hyper):
    """Warm-up, then a line to the final ratio at `decay_steps`."""
    share = 1.0 - _progress(step, hyper.warmup_steps, hyper)
    return _warm(step, hyper, _between(hyper.final_lr_ratio, share))


def wsd(step, hyper: Hyper):
    """Warm-up, stable, decay: 1 until the last `decay_fraction` of `decay_steps`.

    The decay is a line to the final ratio (Hu et al. 2024, MiniCPM, section 4).
    """
    begin = hyper.decay_steps * (1.0 - hyper.decay_fraction)
    share = 1.0 - _progress(step, jnp.maximum(begin, hyper.warmup_steps), hyper)
    return _warm(step, hyper, _between(hyper.final_lr_ratio, share))


SCHEDULES = {"constant": constant, "cosine": cosine, "linear": linear, "wsd": wsd}


def _between(low, share):
    return low + (1.0 - low) * share


def _warm(step, hyper: Hyper, after):
    """Rises in a line from `initial_lr_ratio` at step 0 to 1 at `warmup_steps`."""
    length = jnp.where(hyper.warmup_steps > 0, hyper.warmup_steps, 1.0)
    rising = _between(hyper.initial_lr_ratio, step / length)
    return jnp.where(step < hyper.warmup_steps, rising, after).astype(jnp.float32)


def _progress(step, begin, hyper: Hyper):
    """Returns 0 at `begin`, 1 at `decay_steps` and later; 1 when there is no room."""
    length = hyper.decay_steps - begin
    share = (step - begin) / jnp.where(length > 0, length, 1.0)
    return jnp.where(length > 0, jnp.clip(share, 0.0, 1.0), step >= hyper.decay_steps)


# ---- rules ----

WEIGHTS, LAYERS, MATRICES = "weights", "layers", "matrices"  # groups, keys of opt_state


def _optax_rule(
    make_tx: Callable[[Hyper], optax.GradientTransformation],
) -> Rule:
    """Wraps an Optax transformation; its memory does not depend on the numbers."""
    blank = Hyper(*(0.0 for _ in Hyper._fields))
    return Rule(
        init=lambda weights: make_tx(blank).init(weights),
        update=lambda grads, memory, hyper: make_tx(hyper).update(grads, memory, grads),
    )


def _per_layer(rule: Rule) -> Rule:
    """Applies a rule to each layer of stacked weights, as if they were separate."""
    return Rule(
        init=jax.vmap(rule.init),
        update=jax.vmap(rule.update, in_axes=(0, 0, None)),
    )


def _adamw(dtype) -> Rule:
    """Loshchilov & Hutter 2019, algorithm 2 (the decay is added in `make`)."""
    return _optax_rule(
        lambda h: optax.scale_by_adam(b1=h.beta1, b2=h.beta2, eps=h.eps, mu_dtype=dtype)
    )


def _lion(dtype) -> Rule:
    """Chen et al. 2023, algorithm 2."""
    return _optax_rule(
        lambda h: optax.scale_by_lion(b1=h.beta1, b2=h.beta2, mu_dtype=dtype)
    )


def _sgd(dtype) -> Rule:
    """Heavy-ball momentum: v = momentum * v + g, and the weights move along v."""
    return _optax_rule(lambda h: optax.trace(decay=h.momentum, accumulator_dtype=dtype))


# Shazeer & Stern 2018, algorithm 4, without the scaling by the weights' size: the
# learning rate is absolute. Matrices of at least 128 x 128 keep row and column means.
ADAFACTOR = _optax_rule(
    lambda h: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
)


class _Matrices(NamedTuple):
    """What Muon has to know of the weights: their sides, and how to share the work."""

    declared: Declared
    spread: Callable[[jax.Array], jax.Array]


# What each optimizer does to its groups of weights.
OPTIMIZERS = {
    "adamw": lambda dtype, matrices: {WEIGHTS: _adamw(dtype)},
    "lion": lambda dtype, matrices: {WEIGHTS: _lion(dtype)},
    "sgd": lambda dtype, matrices: {WEIGHTS: _sgd(dtype)},
    "adafactor": lambda dtype, matrices: {  # keeps no average of gradients
        **{WEIGHTS: ADAFACTOR, LAYERS: _per_layer(ADAFACTOR)}
    },
    "muon": lambda dtype, matrices: {
        **{WEIGHTS: _adamw(dtype), MATRICES: _muon(dtype, matrices)}
    },
}
MOMENT_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What each optimizer and each schedule reads of Hyper, besides clip.
ADAMW_READS = ("lr", "weight_decay", "beta1", "beta2", "eps")
READS = {
    "adamw": ADAMW_READS,
    "lion": ("lr", "weight_decay", "beta1", "beta2"),
    "sgd": ("lr", "weight_decay", "momentum"),
    "adafactor": ("lr", "weight_decay"),
    "muon": (*ADAMW_READS, "matrix_lr", "momentum"),
}
WARM_UP = ("warmup_steps", "initial_lr_ratio")
SCHEDULE_READS = {
    "constant": WARM_UP,
    "cosine": (*WARM_UP, "decay_steps", "final_lr_ratio"),
    "linear": (*WARM_UP, "decay_steps", "final_lr_ratio"),
    "wsd": (*WARM_UP, "decay_steps", "final_lr_ratio", "decay_fraction"),
}


# ---- Muon ----

# Keller Jordan 2024, "Muon: an optimizer for hidden layers in neural networks".
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
STACK_LIMIT = (
    2**20
)  # larger matrices fill a device alone; stacking would only copy them


def _muon(dtype, matrices: _Matrices) -> Rule:
    """Nesterov momentum, orthogonalised, times sqrt(max(1, outputs / inputs))."""

    def update(grads, memory, hyper):
        slopes = flatten_dict(grads, sep="/")
        average = {
            path: _mix(hyper.momentum, m, slopes[path])
            for path, m in flatten_dict(memory, sep="/").items()
        }
        ahead = {
            path: _mix(hyper.momentum, m, slopes[path]) for path, m in average.items()
        }
        kept = {path: m.astype(dtype) for path, m in average.items()}
        return _nest(_orthogonal_tree(ahead, matrices)), _nest(kept)

    def init(weights):
        return jax.tree.map(lambda x: jnp.zeros_like(x, dtype), weights)

    return Rule(init, update)


def _mix(keep, old, new):
    return keep * old.astype(jnp.float32) + (1.0 - keep) * new


def _orthogonal_tree(
    slopes: dict[str, jax.Array], matrices: _Matrices
) -> dict[str, jax.Array]:
    """Orthogonalises every matrix; matrices of one shape are worked on as one stack."""
    sides = {path: _matrix_shape(matrices.declared, path) for path in slopes}
    stacks: dict[tuple, list[tuple[str, jax.Array]]] = {}
    for path, slope in slopes.items():
        n, fan_in, fan_out = sides[path]
        x_NRC = slope.reshape(n, fan_in, fan_out)
        if fan_in > fan_out:
            x_NRC = x_NRC.mT
        alone = path if fan_in * fan_out > STACK_LIMIT else ""
        stacks.setdefault((x_NRC.shape[1:], alone), []).append((path, x_NRC))
    result = {}
    for members in stacks.values():
        stack_NRC = jnp.concatenate([x_NRC for _, x_NRC in members])
        stack_NRC = orthogonalise(matrices.spread(stack_NRC))
        begin = 0
        for path, x_NRC in members:
            part_NRC = stack_NRC[begin : begin + len(x_NRC)]
            begin += len(x_NRC)
            _, fan_in, fan_out = sides[path]
            part_NRC = part_NRC.mT if fan_in > fan_out else part_NRC
            scale = max(1.0, fan_out / fan_in) ** 0.5
            result[path] = scale * part_NRC.reshape(slopes[path].shape)
    return {path: result[path] for path in slopes}


def orthogonalise(x_NRC: jax.Array) -> jax.Array:
    """Brings the singular values of N matrices (R <= C) near 1, keeping their spaces.

    Five Newton-Schulz rounds with Keller Jordan's coefficients: values end between
    about 0.7 and 1.2 unless they were tiny against the matrix's norm. A zero matrix
    stays zero.
    """
    square_N11 = jnp.sum(x_NRC * x_NRC, axis=(-2, -1), keepdims=True)
    x_NRC = x_NRC * jax.lax.rsqrt(jnp.maximum(square_N11, 1e-30))
    if x_NRC.shape[-1] < 2 * x_NRC.shape[-2]:
        return _newton_schulz(x_NRC)
    # A CPU multiplies in full float32, where the short way loses nothing: 15 -> 11 ms
    # for 4 layers of width 128. Elsewhere products are rounded (TF32, bfloat16).
    return jax.lax.platform_dependent(x_NRC, cpu=_gram, default=_newton_schulz)


def _newton_schulz(x_NRC: jax.Array) -> jax.Array:
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        g_NRR = x_NRC @ x_NRC.mT
        x_NRC = a * x_NRC + (b * g_NRR + c * (g_NRR @ g_NRR)) @ x_NRC
    return x_NRC


def _gram(x_NRC: jax.Array) -> jax.Array:
    """The same rounds on X X^T alone: each is a polynomial q of it, X becomes q X."""
    a, b, c = QUINTIC
    g_NRR = x_NRC @ x_NRC.mT
    one_RR = jnp.eye(g_NRR.shape[-1], dtype=g_NRR.dtype)

    def quintic(g_NRR):
        return a * one_RR + b * g_NRR + c * (g_NRR @ g_NRR)

    q_NRR = quintic(g_NRR)
    product_NRR = q_NRR
    for _ in range(ROUNDS - 1):
        g_NRR = q_NRR @ (g_NRR @ q_NRR)
        q_NRR = quintic(g_NRR)
        product_NRR = q_NRR @ product_NRR
    return product_NRR @ x_NRC


def _matrix_shape(declared: Declared, path: str) -> tuple[int, int, int]:
    """Returns (matrices, inputs, outputs) of a weight."""
    weight = weights.at(declared, path)
    if not weight.inputs:
        raise ValueError(
            f"optimizer.muon picks {path} of shape {weight.shape}, which is not the "
            "matrix of a layer; narrow the pattern, for example to "
            "'blocks?[_/].*kernel$'"
        )
    return math.prod(weight.counts), *weight.sides


# ---- paths and tables ----


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
