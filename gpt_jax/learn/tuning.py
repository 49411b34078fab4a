"""Holes in tuning: classes, instructions, adapters, preferences, rewards.

Shapes: B rows  T tokens  D width, inputs of a kernel  F outputs  R rank  G answers
"""

import jax
import jax.numpy as jnp

from gpt_jax import losses
from gpt_jax.attention import Sight
from gpt_jax.learn.hole import hole, normal
from gpt_jax.learn.layers import _cfg
from gpt_jax.model import layers
from gpt_jax.tasks import grpo

# ---------------------------------------------------------------- rows


@hole(6, lambda: [(normal(0, 3, 5, 4), jnp.asarray([5, 2, 3]))], grads=(0,))
def last_token(x_BTD, length_B):
    """Returns what a classifier reads of each row: its last token's, [B, D].

    Args:
      x_BTD: rows that are padded on the right.
      length_B: how many tokens each has.
    """
    return x_BTD[jnp.arange(len(x_BTD)), length_B - 1]


last_token.mistake("that is the last place of the row, which may be padding")(
    lambda x_BTD, length_B: x_BTD[:, -1]
)
last_token.mistake("off by one: the last of n tokens stands at place n - 1")(
    lambda x_BTD, length_B: x_BTD[jnp.arange(len(x_BTD)), length_B]
)
last_token.mistake(
    "that is the mean of all places: a causal model is read at its last"
)(lambda x_BTD, length_B: x_BTD.mean(1))


@hole(7, lambda: [(8, 5, 7), (6, 2, 6), (9, 4, 5)])
def answer_mask(tokens, begin, end):
    """Returns the loss mask of a conversation, float32 [T - 1]: 1 where the answer is.

    The inputs are tokens 0 to T - 2, the targets 1 to T - 1. A target counts where it
    is a token of the answer.

    Args:
      tokens: T, how many there are.
      begin: the place of the first token of the answer; at least 1.
      end: the place behind its last.
    """
    learnt_T = jnp.zeros(tokens).at[begin:end].set(1.0)
    return learnt_T[1:]  # as sft.Packed does


answer_mask.mistake("the loss is on the prompt: only the answer counts")(
    lambda tokens, begin, end: jnp.ones(tokens - 1)
)
answer_mask.mistake(
    "off by one: the mask is of targets, which stand one before their own place"
)(lambda tokens, begin, end: jnp.zeros(tokens).at[begin:end].set(1.0)[:-1])
answer_mask.mistake("it is turned round: the prompt counts, and the answer does not")(
    lambda tokens, begin, end: 1 - jnp.zeros(tokens).at[begin:end].set(1.0)[1:]
)


@hole(7, lambda: [(jnp.asarray([0, 0, 0, 1, 1, 2]),), (jnp.asarray([0, 1, 0, 1]),)])
def packing_mask(segment_T):
    """Returns bool [T, T]: whether a token (row) may see another (column).

    Several documents stand in one row; a token sees itself and those before it, of its
    own document only.

    Args:
      segment_T: int, the number of each token's document.
    """
    every = slice(0, len(segment_T))
    found = Sight(True, 0, None, segment_T[None]).mask(every, every)
    assert found is not None
    return found[0]


def _past(segment_T, before=0):
    return jnp.tril(jnp.ones((len(segment_T),) * 2, bool), before)


packing_mask.mistake("documents leak: a token sees those of another document")(_past)
packing_mask.mistake("it is not causal: a token sees those behind it")(
    lambda segment_T: segment_T[:, None] == segment_T
)
packing_mask.mistake("off by one: a token must see itself")(
    lambda segment_T: _past(segment_T, -1) & (segment_T[:, None] == segment_T)
)


# ---------------------------------------------------------------- adapters


def _low():
    return [(normal(0, 3, 6), normal(1, 6, 5), normal(2, 6, 2), normal(3, 2, 5), 8.0)]


@hole(7, _low, grads=(0, 2, 3))
def lora(x_TD, kernel_DF, a_DR, b_RF, alpha):
    """Returns x W + (x A) B * alpha / R, [T, F]; no gradient flows into W.

    Args:
      x_TD: float32.
      kernel_DF: W, frozen.
      a_DR: A.
      b_RF: B.
      alpha: the weight of the product, times the rank.
    """
    cfg = _cfg(d_ff=kernel_DF.shape[1])
    dense = layers.Dense(("embed",), ("mlp",), False, cfg)
    leaves = {"lora_a": a_DR, "lora_b": b_RF}
    leaves["lora_scale"] = jnp.float32(alpha / a_DR.shape[1])
    leaves["kernel"] = jax.lax.stop_gradient(kernel_DF)
    made: jax.Array = dense.apply({"params": leaves}, x_TD)  # type: ignore
    return made


lora.mistake("alpha is divided by the rank")(
    lambda x_TD, kernel_DF, a_DR, b_RF, alpha: (
        x_TD @ kernel_DF + alpha * (x_TD @ a_DR) @ b_RF
    )
)
lora.mistake("the product is not scaled by alpha / R")(
    lambda x_TD, kernel_DF, a_DR, b_RF, alpha: x_TD @ kernel_DF + x_TD @ a_DR @ b_RF
)
lora.mistake("the frozen product x W is missing")(
    lambda x_TD, kernel_DF, a_DR, b_RF, alpha: (
        alpha / a_DR.shape[1] * (x_TD @ a_DR) @ b_RF
    )
)


# ---------------------------------------------------------------- preferences


def _pairs():
    logps = [-5 * jnp.abs(normal(seed, 4)) for seed in range(4)]
    return [(*logps, 0.5)]


@hole(7, _pairs, grads=(0, 1, 2, 3))
def dpo(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta):
    """Returns the mean DPO loss: -log sigmoid(beta ((c - c') - (r - r'))).

    No gradient flows into the reference.

    Args:
      chosen_B: log-probabilities c of the chosen answers under the policy.
      rejected_B: those r of the rejected ones.
      ref_chosen_B: c' under the reference.
      ref_rejected_B: r' under the reference.
      beta: how closely the policy is held to it.
    """
    policy_BP = jnp.stack([chosen_B, rejected_B], 1)
    reference_BP = jnp.stack([ref_chosen_B, ref_rejected_B], 1)
    sums = losses.preference(
        policy_BP,
        jax.lax.stop_gradient(reference_BP),
        jnp.ones(policy_BP.shape, jnp.int32),
        variant="dpo",
        logp="sum",
        beta=beta,
        label_smoothing=0.0,
    )
    return sums["loss"] / sums["weight"]


def _dpo(c, r, c0, r0, beta, *, detached=True):
    if detached:
        c0, r0 = jax.lax.stop_gradient((c0, r0))
    return -jax.nn.log_sigmoid(beta * ((c - c0) - (r - r0))).mean()


dpo.mistake("the reference is not detached: a gradient flows into it")(
    lambda *args: _dpo(*args, detached=False)
)
dpo.mistake("chosen and rejected have changed places")(
    lambda c, r, c0, r0, beta: _dpo(r, c, r0, c0, beta)
)
dpo.mistake("the reference is left out: compare with what it gives the answers")(
    lambda c, r, c0, r0, beta: _dpo(c, r, 0 * c0, 0 * r0, beta)
)
dpo.mistake("beta is missing")(lambda c, r, c0, r0, beta: _dpo(c, r, c0, r0, 1.0))


# ---------------------------------------------------------------- rewards


def _rewards():
    return [
        (jnp.asarray([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]),),
        (jnp.asarray([[0.5, 0.5, 0.5]]),),
    ]


@hole(7, _rewards)
def advantage(reward_NG):
    """Returns GRPO's advantage of each answer, [N, G].

    The reward less its group's mean, divided by the group's standard deviation (the
    root of the mean square) plus 1e-4.

    Args:
      reward_NG: rewards of G answers to each of N questions.
    """
    N, G = reward_NG.shape
    right_R, share_R = jnp.zeros(N * G), reward_NG.reshape(-1)
    how = {"group": G, "reward": "partial", "normalize": True}
    found = grpo.judge(right_R, share_R, **how)
    return found["advantage"].reshape(N, G)


def _less(reward_NG, axis: int | None = 1, ddof=0, spread=True):
    away = reward_NG - reward_NG.mean(axis, keepdims=True)
    std = reward_NG.std(axis, keepdims=True, ddof=ddof) if spread else 1.0
    return away / (std + 1e-4 * spread)


advantage.mistake("the mean is over all answers: take each question's own")(
    lambda reward_NG: _less(reward_NG, axis=None)
)
advantage.mistake("the mean is over the questions: take it over the answers, axis 1")(
    lambda reward_NG: _less(reward_NG, axis=0)
)
advantage.mistake("it is not divided by the standard deviation")(
    lambda reward_NG: _less(reward_NG, spread=False)
)
advantage.mistake(
    "the deviation is the root of the mean square: divide by G, not G - 1"
)(lambda reward_NG: _less(reward_NG, ddof=1))


def _drawn():
    return [(-jnp.abs(normal(0, 6)), -jnp.abs(normal(1, 6)), normal(2, 6))]


@hole(7, _drawn, grads=(0, 1, 2))
def policy_loss(logp_T, old_T, advantage_T):
    """Returns the mean policy loss: -exp(logp - old) * advantage. Not clipped.

    A gradient flows into logp alone: what was drawn, and how good it was, are facts.

    Args:
      logp_T: log-probabilities of the drawn tokens under the weights that learn.
      old_T: under those that drew them.
      advantage_T: of each token's answer.
    """
    count = logp_T.shape[0]
    sums = losses.policy(
        logp_T[:, None],
        old_T[:, None],
        None,
        jax.lax.stop_gradient(advantage_T),
        jnp.full((count, 1), 1 / count),
        clip=0.0,
        kl=0.0,
    )
    return sums["loss"]


def _policy(logp_T, old_T, advantage_T, *, old=True, gain=True, sign=-1.0):
    old_T = jax.lax.stop_gradient(old_T) if old else old_T
    advantage_T = jax.lax.stop_gradient(advantage_T) if gain else advantage_T
    return sign * (jnp.exp(logp_T - old_T) * advantage_T).mean()


policy_loss.mistake("the advantage is not detached: a gradient flows into it")(
    lambda *args: _policy(*args, gain=False)
)
policy_loss.mistake("the old log-probabilities are not detached")(
    lambda *args: _policy(*args, old=False)
)
policy_loss.mistake("neither the old log-probabilities nor the advantage are detached")(
    lambda *args: _policy(*args, old=False, gain=False)
)
policy_loss.mistake("the sign is wrong: a good answer must get likelier")(
    lambda *args: _policy(*args, sign=1.0)
)
