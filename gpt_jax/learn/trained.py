"""The quickstart trained with a reader's function in the place of the real one.

A place says where a hole's function stands in a training run, and which settings make a
run go through it. Both curves are of runs with these settings: one as it is, one with
the reader's function.

Shapes: B batch  T tokens  S keys  H query heads  G key/value heads  K head dim
D width  V vocabulary  R rows  C columns
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gpt_jax import attention, configs, metrics, model, optimizer, plots, rope, train
from gpt_jax.learn import layers as holes
from gpt_jax.learn import training
from gpt_jax.learn.hole import Hole
from gpt_jax.model import layers
from gpt_jax.model.architecture import ACTIVATIONS
from gpt_jax.optimizer import muon
from gpt_jax.tasks import lm
from gpt_jax.tasks.task import dropout_of

STEPS = 200
SAME, BETTER = 0.01, 0.9  # of the real loss: how far apart, and too good to be true


class Put(NamedTuple):
    """What a run finds in a module, a class or a dict instead of what is there."""

    owner: Any
    name: str
    value: Any


class Place(NamedTuple):
    """Where a function stands in a run.

    Attributes:
      put: function -> what it replaces.
      config: dotted keys and their values, so that a run goes through it.
    """

    put: Callable[[Callable], list[Put]]
    config: Mapping[str, Any] = {}


class Curve(NamedTuple):
    """A run's losses in nats: [(step, loss), ...]."""

    train: list[tuple[int, float]]
    val: list[tuple[int, float]]


class Trained(NamedTuple):
    """Both runs, what is to be said of them, and their picture."""

    real: Curve
    mine: Curve
    lines: list[str]
    picture: Path


def both(found: Hole, mine: Callable, path: Path, *, steps: int) -> Trained:
    """Trains the quickstart (tiny) with the real function, then with the reader's.

    Args:
      found: the hole.
      mine: the reader's function.
      path: where the picture goes.
      steps: of each run.

    Raises:
      ValueError: no training goes through this hole, or the reader's function raises.
    """
    if found.name not in PLACES:
        near = ", ".join(PLACES)
        raise ValueError(
            f"no training of the quickstart goes through {found.name}; through these "
            f"one does: {near}"
        )
    # As the package is: most real functions call what a reader's replaces.
    real, yours = run(PLACES[found.name], None, steps), own(found, mine, steps)
    draw(path, found.name, real, yours)
    return Trained(real, yours, told(real, yours), path)


def own(found: Hole, mine: Callable, steps: int) -> Curve:
    """Returns the curve of a run with the reader's function.

    Raises:
      ValueError: it raises, or what comes of it is not finite.
    """
    try:
        return run(PLACES[found.name], mine, steps)
    except NotImplementedError:
        raise ValueError(f"{found.name} is not written yet") from None
    except FloatingPointError:
        raise ValueError(f"with your {found.name} losses are not finite") from None
    except Exception as error:  # whatever the reader's code raises, inside of JAX
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"training with your {found.name} raises {type(error).__name__}: {first}"
        ) from error


def run(place: Place, function: Callable | None, steps: int) -> Curve:
    """Returns the curve of a run with a function in its place; None = as it is."""
    config = configs.load("quickstart:size=tiny").unlock()
    config.update(steps=steps, eval_every=max(1, steps // 10), log_every=1)
    config.update(sample_every=0, tensorboard=False, checkpoint_every=steps)
    config.optimizer.update(name="adamw", schedule="constant")
    config.model.zero_init = False  # else some gradients begin at 0, and matter late
    for key, value in place.config.items():
        config.update_from_flattened_dict({key: value})
    with tempfile.TemporaryDirectory() as folder:
        with _replaced(place.put(function) if function else []):
            train.train(config.lock(), folder)
        rows = metrics.read(folder)
    return Curve(*(metrics.points(rows, name) for name in ("train_loss", "val_loss")))


def told(real: Curve, mine: Curve) -> list[str]:
    """Returns what is to be said of two curves."""
    step, wanted = real.val[-1]
    got = mine.val[-1][1]
    lines = [f"validation loss after {step} steps: {wanted:.3f}, with yours {got:.3f}"]
    apart = max(abs(a[1] - b[1]) for a, b in zip(real.val, mine.val, strict=True))
    if apart <= SAME * wanted:
        lines.append("it is the same curve")
    elif got < BETTER * wanted:
        lines.append("too good to be true: does something see what it is to predict?")
    else:
        lines.append(f"the curves are up to {apart:.3f} nats apart")
    return lines


def draw(path: Path, name: str, real: Curve, mine: Curve) -> None:
    """Draws both curves into a PNG file."""
    figure = plots.empty(height=4)
    axes = figure.add_subplot(
        title=f"the quickstart, tiny, and your {name}",
        xlabel="step",
        ylabel="loss (nats per token)",
    )
    # The wide one below: where both are the same curve, both are seen.
    for label, curve, color, width in (
        ("the real one", real, plots.TRAIN, 5),
        ("yours", mine, plots.BEST, 1.6),
    ):
        axes.plot(*zip(*curve.train, strict=True), color=color, lw=width / 3, alpha=0.3)
        axes.plot(
            *zip(*curve.val, strict=True),
            color=color,
            lw=width,
            marker="o",
            label=label,
        )
    axes.legend(frameon=False)
    plots.save(figure, path)


@contextlib.contextmanager
def _replaced(puts: list[Put]) -> Iterator[None]:
    """Puts values into their places, and back what was there."""
    before = [_get(put.owner, put.name) for put in puts]
    try:
        for put in puts:
            _set(*put)
        yield
    finally:
        for put, value in zip(puts, before, strict=True):
            _set(put.owner, put.name, value)


def _get(owner, name: str):
    return owner[name] if isinstance(owner, dict) else getattr(owner, name)


def _set(owner, name: str, value) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


# ---------------------------------------------------------------- attention


def _attend(read: Callable) -> list[Put]:
    """Puts `read(q_BTHK, k_BSGK, v_BSGK, sight)` in the place of attention."""
    real = attention.choose

    def here(q_BTHK, k_BSGK, v_BSGK, sight, *, scale, softcap, dropout):
        del scale, softcap, dropout  # the quickstart has the usual scale, and no more
        return read(q_BTHK, k_BSGK, v_BSGK, sight).astype(q_BTHK.dtype)

    def choose(*args, cached, **how):
        return real(*args, cached=cached, **how) if cached else here

    return [Put(attention, "choose", choose)]


def _of_heads(mine: Callable) -> list[Put]:
    """One head: (q_TK, k_SK, v_SK) -> [T, K]."""
    heads = jax.vmap(mine, in_axes=1, out_axes=1)

    def read(q_BTHK, k_BSGK, v_BSGK, sight):
        times = q_BTHK.shape[2] // k_BSGK.shape[2]
        k_BSHK, v_BSHK = (jnp.repeat(x, times, axis=2) for x in (k_BSGK, v_BSGK))
        return jax.vmap(heads)(q_BTHK, k_BSHK, v_BSHK)

    return _attend(read)


def _weigh(weights_of: Callable, mask_of: Callable) -> list[Put]:
    """Attention by the book, with these functions for its softmax and its mask."""

    def read(q_BTHK, k_BTHK, v_BTHK, sight):
        score_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK)
        score_BHTS = score_BHTS * q_BTHK.shape[-1] ** -0.5
        seen_TS = mask_of(q_BTHK.shape[1], sight.window)
        score_BHTS = jnp.where(seen_TS, score_BHTS, attention.HIDDEN)
        weight_BHTS = jax.vmap(jax.vmap(weights_of))(score_BHTS)
        return jnp.einsum("BHTS,BSHK->BTHK", weight_BHTS, v_BTHK)

    return _attend(read)


def _rope(mine: Callable) -> list[Put]:
    class Turn(NamedTuple):
        position_BT: Any
        base: Any

    def rotation(position_BT, head_dim, *, base, scaling):
        del head_dim, scaling  # seen in what is turned; the quickstart stretches none
        return Turn(position_BT, base)

    def rotate(x_BTHK, turn):
        position_BT = jnp.broadcast_to(turn.position_BT, x_BTHK.shape[:2])
        heads = jax.vmap(lambda *args: mine(*args, turn.base), (1, None), 1)
        return jax.vmap(heads)(x_BTHK, position_BT).astype(x_BTHK.dtype)

    return [Put(rope, "rotation", rotation), Put(rope, "rotate", rotate)]


# ---------------------------------------------------------------- layers


def _norm(mine: Callable, *, bias: bool) -> list[Put]:
    class Norm(layers.Norm):
        @nn.compact
        def __call__(self, x):
            scale_D = layers._weight(self, "scale", self.axes, "scale")
            rest = [scale_D]
            if bias:
                rest.append(layers._weight(self, "bias", self.axes, "shift"))
            y = mine(x.reshape(-1, x.shape[-1]).astype(jnp.float32), *rest)
            return y.reshape(x.shape).astype(self.cfg.dtype)

    return [Put(module, "Norm", Norm) for module in (layers, model)]


def _dropout(mine: Callable) -> list[Put]:
    def drop(x, rate, key):
        return x if rate is None else mine(x, rate, key)

    return [Put(module, "drop", drop) for module in (attention, layers, model)]


# ---------------------------------------------------------------- the loss


def _loss(mean: Callable) -> list[Put]:
    """Puts `mean(logits_TV, target_T, mask_T)` in the place of the training loss."""
    real = lm.make_loss

    def make_loss(gpt, token_bytes_V, *, loss_chunk, dropout):
        how = {"loss_chunk": loss_chunk, "dropout": dropout}
        measured = real(gpt, token_bytes_V, **how)

        def loss(weights, frozen, batch, key, hyper):
            if key is None:  # what is measured stays what it is
                return measured(weights, frozen, batch, key, hyper)
            on = dropout_of(key, hyper, dropout)
            found = model.hidden(gpt, weights, batch["tokens"], dropout=on)
            logits_BTV = model.logits(gpt, weights, found.x_BTD)
            rows = (logits_BTV, batch["targets"], batch["mask"])
            weight_B = batch["mask"].sum(1)
            total = (jax.vmap(mean)(*rows) * weight_B).sum()
            return {"loss": total, "nll": total, "weight": weight_B.sum()}

        return loss

    return [Put(lm, "make_loss", make_loss)]


def _loss_by_hand(mine: Callable) -> list[Put]:
    """The real loss, whose gradient is the reader's."""

    @jax.custom_vjp
    def mean(logits_TV, target_T, mask_T):
        return training.cross_entropy.real(logits_TV, target_T, mask_T)

    def forward(*args):
        return mean(*args), args

    def backward(args, slope):
        logits_TV, target_T, _ = args
        return slope * mine(logits_TV, target_T), None, None

    mean.defvjp(forward, backward)
    return _loss(mean)


# ---------------------------------------------------------------- the optimizer


def _adamw(mine: Callable) -> list[Put]:
    real = optimizer.make

    @functools.wraps(real)
    def make(declared, *, schedule, **_):
        factor_at = optimizer.SCHEDULES[schedule]

        def init(params):
            zeros = jax.tree.map(jnp.zeros_like, params)
            return {"mean": zeros, "square": zeros}

        def update(grads, memory, params, step, hyper):
            lr = factor_at(step, hyper) * hyper.lr
            made = jax.tree.map(
                lambda *leaf: mine(*leaf, step + 1, lr),
                *(params, grads, memory["mean"], memory["square"]),
            )
            outer = jax.tree.structure(params)
            new, mean, square = jax.tree.transpose(
                outer, jax.tree.structure((0, 0, 0)), made
            )
            norm = optax.tree.norm(grads)
            return new, {"mean": mean, "square": square}, {"lr": lr, "grad_norm": norm}

        return optimizer.Optimizer(init, update)

    return [Put(optimizer, "make", make)]


def _schedule(mine: Callable) -> list[Put]:
    def factor(step, hyper):
        return mine(
            step, hyper.warmup_steps, hyper.decay_steps, 1.0, hyper.final_lr_ratio
        ).astype(jnp.float32)

    return [Put(optimizer.SCHEDULES, "cosine", factor)]


def _clip(mine: Callable) -> list[Put]:
    return [Put(optimizer, "_clip", lambda slopes, norm, limit: mine(slopes, limit))]


def _orthogonalise(mine: Callable) -> list[Put]:
    return [Put(muon, "orthogonalise", jax.vmap(mine))]


PLACES: dict[str, Place] = {
    "softmax": Place(lambda mine: _weigh(mine, holes.causal_mask.real)),
    "causal_mask": Place(lambda mine: _weigh(holes.softmax.real, mine)),
    "attention": Place(_of_heads),
    "gqa": Place(
        lambda mine: _attend(lambda *args: jax.vmap(mine)(*args[:3])),
        {"model.n_kv_heads": 1},
    ),
    "rope": Place(_rope),
    "layer_norm": Place(
        functools.partial(_norm, bias=True),
        {
            **{"model.norm": "layernorm", "model.norm_scale": True},
            **{"model.norm_bias": True, "model.qk_norm": False},
        },
    ),
    "rms_norm": Place(functools.partial(_norm, bias=False), {"model.norm_scale": True}),
    "gelu": Place(
        lambda mine: [Put(ACTIVATIONS, "gelu_tanh", mine)],
        {"model.activation": "gelu_tanh"},
    ),
    "dropout": Place(_dropout, {"hyper.dropout_residual": 0.1}),
    "cross_entropy": Place(_loss),
    "cross_entropy_grad": Place(_loss_by_hand),
    "adamw": Place(  # decays every weight, and clips nothing
        _adamw,
        {
            **{"hyper.weight_decay": 0.1, "hyper.clip": 0.0},
            "optimizer.decay": ((".*", True),),
        },
    ),
    "schedule": Place(_schedule, {"optimizer.schedule": "cosine"}),
    "clip": Place(_clip, {"hyper.clip": 0.2}),
    "orthogonalise": Place(_orthogonalise, {"optimizer.name": "muon"}),
}
