"""Rules: the direction in which a tree of weights moves, before decay and rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from gpt_jax.optimizer.hyper import Hyper


class Rule(NamedTuple):
    """A direction for a tree of weights, before decay and learning rate.

    Attributes:
      init: weights -> memory.
      update: (grads, memory, hyper) -> (directions, memory).
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Hyper], tuple[Any, Any]]


def optax_rule(
    make_tx: Callable[[Hyper], optax.GradientTransformation],
) -> Rule:
    """Wraps an Optax transformation; its memory does not depend on the numbers."""
    blank = Hyper(*(0.0 for _ in Hyper._fields))

    def update(grads, memory, hyper):
        # Optax promotes: betas to the power of a count, averages kept in bfloat16.
        with jax.numpy_dtype_promotion("standard"):
            return make_tx(hyper).update(grads, memory, grads)

    return Rule(init=lambda weights: make_tx(blank).init(weights), update=update)


def per_layer(rule: Rule) -> Rule:
    """Applies a rule to each layer of stacked weights, as if they were separate."""
    return Rule(
        init=jax.vmap(rule.init),
        update=jax.vmap(rule.update, in_axes=(0, 0, None)),
    )


def adamw(dtype) -> Rule:
    """Loshchilov & Hutter 2019, algorithm 2 (the decay is added in `make`)."""
    return optax_rule(
        lambda h: optax.scale_by_adam(b1=h.beta1, b2=h.beta2, eps=h.eps, mu_dtype=dtype)
    )


def lion(dtype) -> Rule:
    """Chen et al. 2023, algorithm 2."""
    return optax_rule(
        lambda h: optax.scale_by_lion(b1=h.beta1, b2=h.beta2, mu_dtype=dtype)
    )


def sgd(dtype) -> Rule:
    """Heavy-ball momentum: v = momentum * v + g, and the weights move along v."""
    return optax_rule(lambda h: optax.trace(decay=h.momentum, accumulator_dtype=dtype))


# Shazeer & Stern 2018, algorithm 4, without the scaling by the weights' size: the
# learning rate is absolute. Matrices of at least 128 x 128 keep row and column means.
ADAFACTOR = optax_rule(
    lambda h: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
)
