"""How a token is chosen: what makes some less likely, what leaves some out, the draw.

Every row has its own settings and its own key, folded with the position of the token
it chooses, so it never depends on its neighbours.

Shapes: B rows  S places of tokens  V vocabulary  N blocks of the vocabulary  M tokens
in a block
"""

import math
from collections import namedtuple
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gpt_jax.sampling import MOST, SETTINGS

# How each row chooses its tokens: traced [B] arrays, so nothing recompiles. They are
# the settings of sampling.SETTINGS, and `max_new`, how many tokens are chosen.
Sampling = namedtuple("Sampling", (*SETTINGS, "max_new"))


def penalise(logits_BV, seen_BV, penalty_B):
    """Returns logits with the seen tokens made less likely (CTRL, section 4.1).

    Positive logits are divided by the penalty, negative ones multiplied by it.
    """
    penalty_B1 = penalty_B[:, None]
    less_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, less_BV, logits_BV)


def charge(logits_BV, count_BV, sampling: Sampling):
    """Returns logits less what tokens cost that were written `count` times.

    The formula of OpenAI's API: the frequency penalty for each time, the presence
    penalty once.
    """
    each_BV = count_BV * sampling.frequency_penalty[:, None]
    once_BV = jnp.minimum(count_BV, 1) * sampling.presence_penalty[:, None]
    return logits_BV - each_BV - once_BV


def temper(logits_BV, temperature_B):
    """Returns logits / temperature, shifted so that each row's best is 0."""
    shifted_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    # The shift and the floor keep the smallest temperatures from overflowing.
    return shifted_BV / jnp.maximum(temperature_B, 1e-6)[:, None]


def keep(logits_BV, sampling: Sampling):
    """Returns tempered logits with those left out by top-k, top-p or CUTS at -inf.

    Top-p counts within what top-k left (nucleus sampling: Holtzman et al. 2020, section
    3.1). Tokens that tie with the last one kept are kept too. The best token always
    stays.
    """
    ranked_B = (sampling.top_k > 0) | (sampling.top_p < 1)
    low_B = jax.lax.cond(
        ranked_B.any(),
        lambda: _lowest_kept(logits_BV, sampling),
        lambda: jnp.zeros(len(logits_BV)),
    )
    low_B = jnp.where(ranked_B, low_B, -jnp.inf)
    for name, lowest in CUTS.items():
        low_B = jnp.maximum(low_B, lowest(logits_BV, getattr(sampling, name)))
    return jnp.where(logits_BV >= low_B[:, None], logits_BV, -jnp.inf)


def _with_share(logits_BV, share_B):
    """Min-p: relative to the best token (Nguyen et al. 2024)."""
    return jnp.log(share_B)


# Settings that leave tokens out by a bound of their own: (tempered logits [B, V], the
# setting of each row [B]) -> the smallest logit that is kept [B], -inf where it is off.
CUTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "min_p": _with_share,
}


def _lowest_kept(logits_BV, sampling):
    """Returns the smallest logit [B] that top-k and then top-p keep."""
    vocab = logits_BV.shape[-1]
    k_B = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    kth_B = _reaching(logits_BV, jnp.ones_like(logits_BV), k_B.astype(jnp.float32))
    kept_BV = logits_BV >= kth_B[:, None]
    chance_BV = jnp.where(kept_BV, jnp.exp(logits_BV), 0)
    wanted_B = sampling.top_p * chance_BV.sum(-1)
    nucleus_B = _reaching(logits_BV, chance_BV, wanted_B)
    # The rounding of a sum must not cut the tail of a row without top-p.
    return jnp.where(sampling.top_p < 1, jnp.maximum(kth_B, nucleus_B), kth_B)


def _reaching(logits_BV, weight_BV, wanted_B):
    """Returns the largest logit [B] such that it and those above weigh `wanted`.

    Halves the range of bit patterns, which order like the numbers 0 - logit, 31 times.
    For 50,257 logits on a CPU that takes 0.5 ms; sorting them takes 14 ms.
    """
    pattern_BV = jax.lax.bitcast_convert_type(0 - logits_BV, jnp.int32)

    def halve(i, short_B):
        tried_B = short_B + (1 << (30 - i))
        inside_BV = pattern_BV <= tried_B[:, None]
        weight_B = jnp.where(inside_BV, weight_BV, 0).sum(-1)
        return jnp.where(weight_B < wanted_B, tried_B, short_B)

    short_B = jnp.full(len(logits_BV), -1, jnp.int32)
    short_B = jax.lax.fori_loop(0, 31, halve, short_B)
    return -jax.lax.bitcast_convert_type(short_B + 1, jnp.float32)


def draw(logits_BV, key_B):
    """Returns a token id [B] for each row, with the probabilities softmax(logits).

    First a block of the vocabulary by its mass, then a token in it, each as the largest
    after adding Gumbel noise (Maddison et al. 2014, section 2). So two times sqrt(V)
    random numbers do: V of them took a tenth of a step at V = 50,257.
    """
    rows, vocab = logits_BV.shape
    width = math.isqrt(vocab - 1) + 1
    shifted_BV = logits_BV - logits_BV.max(-1, keepdims=True)
    shifted_BV = jnp.pad(
        shifted_BV, ((0, 0), (0, -vocab % width)), constant_values=-jnp.inf
    )
    blocks_BNM = shifted_BV.reshape(rows, -1, width)
    mass_BN = jnp.log(jnp.exp(blocks_BNM).sum(-1))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (2, width)))(key_B)
    block_B = (mass_BN + noise[:, 0, : mass_BN.shape[1]]).argmax(-1)
    block_BM = blocks_BNM[jnp.arange(rows), block_B]
    return block_B * width + (block_BM + noise[:, 1]).argmax(-1)


def choose(logits_BV, tokens_BS, begin_B, length_B, sampling: Sampling, key_B):
    """Returns the next token id [B] of rows that hold `length_B` tokens.

    Those from `begin_B` on were chosen before; what is before them is the prompt.
    """
    vocab = logits_BV.shape[-1]
    logits_BV = jax.lax.cond(
        (sampling.repetition_penalty != 1).any(),
        lambda: penalise(
            logits_BV,
            _written(tokens_BS, jnp.zeros_like(length_B), length_B, vocab) > 0,
            sampling.repetition_penalty,
        ),
        lambda: logits_BV,
    )
    charged_B = (sampling.frequency_penalty != 0) | (sampling.presence_penalty != 0)
    logits_BV = jax.lax.cond(
        charged_B.any(),
        lambda: charge(
            logits_BV,
            _written(tokens_BS, begin_B, length_B, vocab),
            sampling,
        ),
        lambda: logits_BV,
    )
    best_B = jax.lax.top_k(logits_BV, 1)[1][:, 0]  # argmax is ten times slower on CPU

    def drawn_or_best():
        kept_BV = keep(temper(logits_BV, sampling.temperature), sampling)
        drawn_B = draw(kept_BV, jax.vmap(jax.random.fold_in)(key_B, length_B))
        return jnp.where(sampling.temperature > 0, drawn_B, best_B)

    return jax.lax.cond((sampling.temperature > 0).any(), drawn_or_best, lambda: best_B)


def _written(tokens_BS, begin_B, length_B, vocab):
    """Returns float32 [B, V]: how often each token stands from `begin` to `length`."""
    rows, width = tokens_BS.shape
    place_1S = jnp.arange(width)[None]
    chosen_BS = (place_1S >= begin_B[:, None]) & (place_1S < length_B[:, None])
    token_BS = jnp.where(chosen_BS, tokens_BS, vocab)
    count_BV = jnp.zeros((rows, vocab), jnp.float32)
    return count_BV.at[jnp.arange(rows)[:, None], token_BS].add(1.0, mode="drop")


def rows_of(settings: Sequence[dict]) -> Sampling:
    """Returns the Sampling of rows given as dicts of its fields (checked before)."""
    whole = {"max_new", *(k for k, x in SETTINGS.items() if x.kind is int)}
    columns = {
        name: [min(row[name], MOST) for row in settings] for name in Sampling._fields
    }
    return Sampling(
        **{
            name: jnp.asarray(column, jnp.int32 if name in whole else jnp.float32)
            for name, column in columns.items()
        }
    )
