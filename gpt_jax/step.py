"""One update: the train state, and the only function that changes weights.

Pure and without any idea of devices, files or logging, so the same function runs
under `jit`, under `pmap`, and under `vmap` over many configurations at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import optimizer
from gpt_jax.optimizer import Hyper
from gpt_jax.tasks.task import Batch, Sums


class Guard(NamedTuple):
    """Counts of skipped updates (int32): in a row until now, and in all."""

    in_a_row: Any
    total: Any


class SpikeGuard(NamedTuple):
    """A Guard that looks for spikes; another type, so that others are saved as ever.

    Attributes:
      losses: mean losses of the last W applied updates, float32 [W], NaN before there
        were so many.
    """

    in_a_row: Any
    total: Any
    losses: Any


class TrainState(NamedTuple):
    """Everything that a step changes, and the frozen trees that it reads.

    Attributes:
      step: updates tried so far, int32.
      params: the weights that train.
      frozen: weights that do not, by name.
      opt_state: the optimizer's memory, float32.
      guard: skipped updates.
      ema: moving average of params, or None.
    """

    step: Any
    params: Any
    frozen: Any
    opt_state: Any
    guard: Guard | SpikeGuard
    ema: Any


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    hyper: Hyper,
    *,
    loss: Callable[..., Sums],
    join: Callable[[Any, Any], Any],
    tx: optimizer.Optimizer,
    reduce: Callable[[Any], Any],
) -> tuple[TrainState, Sums, dict[str, Any]]:
    """One update from A micro-batches, or none when it is not finite, or a spike.

    The gradient is that of the summed loss, added up over micro-batches and devices
    and divided once by the summed weight, so uneven masks weigh every target alike.

    Args:
      state: the state before.
      batch: arrays [A, B, ...].
      key: the run's key; folded with the step, then with the micro-batch.
      hyper: every number that may vary, traced.
      loss: (weights, frozen, batch [B, ...], key, hyper) -> Sums.
      join: (params, frozen) -> weights.
      tx: the optimizer.
      reduce: adds a tree over devices where the strategy needs it.

    Returns:
      The state after, the sums of this step, and what else to log: "lr", "grad_norm",
      "skipped_in_a_row", "skipped" and, where spikes are looked for, "spike": whether
      this loss was one.
    """
    key = jax.random.fold_in(key, state.step)

    def summed_loss(params, examples, index):
        weights = join(params, state.frozen)
        fold = jax.random.fold_in(key, index)
        sums = loss(weights, state.frozen, examples, fold, hyper)
        return sums["loss"], sums

    def gradient(index):
        examples = jax.tree.map(lambda x: x[index], batch)
        grads, sums = jax.grad(summed_loss, has_aux=True)(state.params, examples, index)
        # Sums over micro-batches need the range and precision of float32.
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

    def accumulate(total, index):
        return jax.tree.map(jnp.add, total, gradient(index)), None

    total = gradient(0)
    micro_batches = jax.tree.leaves(batch)[0].shape[0]
    if micro_batches > 1:
        total, _ = jax.lax.scan(accumulate, total, jnp.arange(1, micro_batches))
    grads, sums = reduce(total)
    weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
    grads = jax.tree.map(lambda g: g / weight, grads)

    params, opt_state, info = tx.update(
        grads, state.opt_state, state.params, state.step, hyper
    )
    ema = state.ema
    if ema is not None:
        ema = optimizer.ema_update(ema, params, hyper.ema_decay, state.step)
    # A finite norm leaves finite moments; the weights are looked at themselves.
    sound = [jnp.isfinite(x).all() for x in jax.tree.leaves(params)]
    sound += [jnp.isfinite(sums["loss"]), jnp.isfinite(info["grad_norm"])]
    good, guard = jnp.stack(sound).all(), state.guard
    if isinstance(guard, SpikeGuard):
        mean, losses = sums["loss"] / weight, guard.losses
        spike = is_spike(mean, losses, hyper.spike_sigma)
        info = {**info, "spike": spike}
        good &= ~spike
        seen = good & (sums["weight"] > 0)
        losses = jnp.where(seen, jnp.append(losses[1:], mean), losses)
        guard = guard._replace(losses=losses)
    new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(partial(jnp.where, good), new, old)
    guard = guard._replace(
        in_a_row=jnp.where(good, 0, guard.in_a_row + 1),
        total=guard.total + jnp.where(good, 0, 1),
    )
    info = {**info, "skipped_in_a_row": guard.in_a_row, "skipped": guard.total}
    return (
        TrainState(state.step + 1, params, state.frozen, opt_state, guard, ema),
        sums,
        info,
    )


def is_spike(loss: Any, losses_W: jax.Array, sigma: Any) -> jax.Array:
    """Whether a loss is over `sigma` standard deviations above the mean of others.

    False as long as one of these is NaN: there have not been enough yet.
    """
    return loss > losses_W.mean() + sigma * losses_W.std()


def start(
    params: Any,
    frozen: Any,
    tx: optimizer.Optimizer,
    *,
    ema: bool,
    spike_window: int = 0,
) -> TrainState:
    """Returns the state before the first step, from the weights that it starts with.

    An update is a spike against `spike_window` losses before it; 0 = never.
    """
    guard = Guard(in_a_row=jnp.int32(0), total=jnp.int32(0))
    if spike_window:
        guard = SpikeGuard(*guard, losses=jnp.full(spike_window, jnp.nan))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        frozen=frozen,
        opt_state=tx.init(params),
        guard=guard,
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def averaged(state: TrainState) -> Any:
    """Returns the params to judge and sample with: their average where one is kept."""
    return state.params if state.ema is None else state.ema
