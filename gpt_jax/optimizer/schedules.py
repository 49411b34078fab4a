"""Schedules: f(step, hyper) -> the share of the peak learning rate."""

import jax.numpy as jnp

from gpt_jax.optimizer.hyper import Hyper


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
    step = jnp.asarray(step, jnp.float32)
    length = jnp.where(hyper.warmup_steps > 0, hyper.warmup_steps, 1.0)
    rising = _between(hyper.initial_lr_ratio, step / length)
    return jnp.where(step < hyper.warmup_steps, rising, after).astype(jnp.float32)


def _progress(step, begin, hyper: Hyper):
    """Returns 0 at `begin`, 1 at `decay_steps` and later; 1 when there is no room."""
    step = jnp.asarray(step, jnp.float32)
    length = hyper.decay_steps - begin
    share = (step - begin) / jnp.where(length > 0, length, 1.0)
    over = (step >= hyper.decay_steps).astype(jnp.float32)
    return jnp.where(length > 0, jnp.clip(share, 0.0, 1.0), over)


# What each schedule reads of Hyper.
WARM_UP = ("warmup_steps", "initial_lr_ratio")
SCHEDULE_READS = {
    "constant": WARM_UP,
    "cosine": (*WARM_UP, "decay_steps", "final_lr_ratio"),
    "linear": (*WARM_UP, "decay_steps", "final_lr_ratio"),
    "wsd": (*WARM_UP, "decay_steps", "final_lr_ratio", "decay_fraction"),
}
