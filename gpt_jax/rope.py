"""Rotary positions: frequencies, how they are stretched, and the turning itself.

Shapes: B batch  T time  H heads  K head dim
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import names, settings


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than trained on.

    `linear` divides every frequency by `factor` (Chen et al. 2023, section 3.2).
    `llama3` divides the slow ones only: wavelengths above original_context /
    low_freq_factor fully, below original_context / high_freq_factor not at all,
    in between gradually (Llama 3.1's rule).
    `yarn` leaves features alone that turn more than beta_fast times within
    original_context, divides those that turn less than beta_slow times, and goes from
    one to the other evenly over the features between (Peng et al. 2023, section 3.2).
    `longrope` divides each frequency by a number of its own, found by search, which
    holds for texts within original_context (Ding et al. 2024, section 3.2).

    The last two also multiply what is turned by attention_factor; 0 = as the papers
    say, of how many times the context is stretched: `factor`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_context: int = 0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    attention_factor: float = 0.0
    short_factors: tuple[float, ...] = ()

    def __post_init__(self):
        settings.fit("rope_scaling", vars(self), settings.declared(RopeScaling))
        names.choose("rope_scaling kind", self.kind, tuple(SCALING_READS))
        object.__setattr__(self, "short_factors", tuple(self.short_factors))
        if self.factor <= 0:
            raise ValueError(f"rope_scaling factor {self.factor} must be above 0")
        reads = {"kind", "factor", *SCALING_READS[self.kind]}
        if unread := [k for k, x in vars(self).items() if x and k not in reads]:
            raise ValueError(
                f"rope_scaling {self.kind} does not read {unread[0]}: leave it out"
            )
        for low, high in (
            ("low_freq_factor", "high_freq_factor"),
            ("beta_slow", "beta_fast"),
        ):
            if low in reads and not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"rope_scaling {self.kind} needs 0 < {low} < {high}, not "
                    f"{getattr(self, low)} and {getattr(self, high)}"
                )
        least = 2 if self.kind == "longrope" else 1
        if "original_context" in reads and self.original_context < least:
            raise ValueError(
                f"rope_scaling original_context {self.original_context} must be the "
                "context length that the model was first trained on"
            )
        if self.attention_factor < 0:
            raise ValueError(
                f"rope_scaling attention_factor {self.attention_factor} is below 0; 0 "
                "means as the paper says"
            )
        if self.kind == "longrope" and not all(x > 0 for x in self.short_factors):
            raise ValueError("rope_scaling short_factors must be numbers above 0")

    @property
    def size(self) -> float:
        """What features that are turned are multiplied by."""
        if self.attention_factor or self.factor <= 1:
            return self.attention_factor or 1.0
        if self.kind == "yarn":
            return 0.1 * math.log(self.factor) + 1  # section 3.4
        if self.kind == "longrope":
            longer = math.log(self.factor) / math.log(self.original_context)
            return math.sqrt(1 + longer)
        return 1.0


# What each kind reads beside its factor.
SCALING_READS = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_context"),
    "yarn": ("original_context", "beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("original_context", "short_factors", "attention_factor"),
}


class Rotation(NamedTuple):
    """The angles of rotary positions, [B or 1, T, 1, K/2]."""

    cos: jax.Array
    sin: jax.Array


def rope_frequencies(
    head_dim: int, *, base: float, scaling: RopeScaling | None
) -> jax.Array:
    """Returns the angle per position of each pair of features, [K/2] float32."""
    power = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / base**power
    if scaling is None:
        return frequency
    if scaling.kind == "longrope":
        return frequency / jnp.asarray(scaling.short_factors, jnp.float32)
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "yarn":
        slow_share = _yarn_ramp(head_dim, base, scaling)
        return slow_share * slow + (1 - slow_share) * frequency
    turns = scaling.original_context * frequency / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    fast_share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return fast_share * frequency + (1 - fast_share) * slow


def _yarn_ramp(head_dim: int, base: float, scaling: RopeScaling) -> jax.Array:
    """Returns how much of each pair's frequency is divided, from 0 to 1, [K/2]."""

    def pair(turns: float) -> float:
        """Returns which pair of features turns so often within the first context."""
        length = scaling.original_context / (2 * math.pi * turns)
        return head_dim * math.log(length) / (2 * math.log(base))

    first = max(math.floor(pair(scaling.beta_fast)), 0)
    last = min(math.ceil(pair(scaling.beta_slow)), head_dim - 1)
    width = last - first or 0.001  # then it is a step
    pairs_P = jnp.arange(head_dim // 2, dtype=jnp.float32)
    return jnp.clip((pairs_P - first) / width, 0.0, 1.0)


def rotation(
    position_BT, features: int, *, base: float, scaling: RopeScaling | None
) -> Rotation:
    """Returns the rotation of each position (RoFormer, Su et al. 2021, section 3.2).

    Of the first `features` of every head: all, or some (Black et al. 2022, section
    2.2.1, "GPT-NeoX-20B").
    """
    frequency_F = rope_frequencies(features, base=base, scaling=scaling)
    position_BT11 = position_BT.astype(jnp.float32)[..., None, None]
    angle_BT1F = position_BT11 * frequency_F[None, None, None]
    turn = Rotation(jnp.cos(angle_BT1F), jnp.sin(angle_BT1F))
    if scaling is None or scaling.size == 1.0:
        return turn
    return Rotation(*(scaling.size * x for x in turn))


def rotate(x_BTHK, turn: Rotation):
    """Rotates feature i with feature i + R/2 by its position's angle, in float32.

    R is how many features the rotation is of; those behind them stay as they are.
    """
    half = turn.cos.shape[-1]
    cuts = 2 if 2 * half == x_BTHK.shape[-1] else (half, 2 * half)
    a, b, *rest = jnp.split(x_BTHK.astype(jnp.float32), cuts, axis=-1)
    turned = (a * turn.cos - b * turn.sin, b * turn.cos + a * turn.sin, *rest)
    return jnp.concatenate(turned, axis=-1).astype(x_BTHK.dtype)
