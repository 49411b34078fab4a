"""Losses: arrays in, float32 SUMS out; the mean is taken once, by who shows it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

# Shape legend: B batch  T time  C time within a chunk  D width  V vocabulary
# N classes  P chosen and rejected answer.


def next_token(
    logits_BTV: jax.Array,
    target_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    label_smoothing: jax.Array | float,
    z_loss: jax.Array | float,
) -> dict[str, jax.Array]:
    """Cross-entropy of the next token, summed over positions.

    Args:
      logits_BTV: one score per entry of the vocabulary, any float type.
      target_BT: int, the right token at each position. Under a mask of 0 any integer
        may stand there; elsewhere it must be in [0, V), which is not checked here: an
        index outside counts as its nearest valid one.
      mask_BT: the weight of each position, at least 0. Where it is 0 the position adds
        nothing to sums or gradients, whatever the logits hold (also inf and nan).
      label_smoothing: the share of the target's probability that is spread evenly over
        the whole vocabulary (Szegedy et al. 2016, section 7); traced.
      z_loss: weight of log(sum(exp(logits)))^2, which keeps logits from drifting
        (PaLM, Chowdhery et al. 2022, section 5); traced.

    Returns:
      Float32 scalars, weighted sums over B and T: "loss" (what is trained), "nll" (the
      plain negative log-likelihood in nats), "weight" (the sum of the mask).
    """
    mask_BT = mask_BT.astype(jnp.float32)
    # Replaced before any arithmetic: 0 * nan would be nan, in the gradient too.
    counts_BT1 = mask_BT[..., None] > 0
    logits_BTV = jnp.where(counts_BT1, logits_BTV, 0).astype(jnp.float32)
    vocab_size = logits_BTV.shape[-1]
    target_BT1 = jnp.clip(target_BT, 0, vocab_size - 1)[..., None]
    right_BT = jnp.take_along_axis(logits_BTV, target_BT1, axis=-1)[..., 0]
    norm_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    nll_BT = norm_BT - right_BT
    even_BT = norm_BT - logits_BTV.mean(axis=-1)
    loss_BT = nll_BT + label_smoothing * (even_BT - nll_BT) + z_loss * norm_BT**2
    return {
        "loss": (loss_BT * mask_BT).sum(),
        "nll": (nll_BT * mask_BT).sum(),
        "weight": mask_BT.sum(),
    }


def next_token_in_chunks(
    head: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    target_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    chunk: int,
    label_smoothing: jax.Array | float,
    z_loss: jax.Array | float,
) -> dict[str, jax.Array]:
    """`next_token` of head(x_BTD), of which only a chunk of T ever exists.

    The backward pass computes the logits of each chunk again: the price is one more
    product with the head's matrix.

    Args:
      head: x [B, C, D] -> logits [B, C, V]; may close over weights.
      x_BTD: what the head reads.
      target_BT: see `next_token`.
      mask_BT: see `next_token`.
      chunk: at most so many of the T positions at once.
      label_smoothing: see `next_token`.
      z_loss: see `next_token`.
    """

    def part(x_BCD, target_BC, mask_BC):
        numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        return next_token(head(x_BCD), target_BC, mask_BC, **numbers)

    return _add_chunks(part, (x_BTD, target_BT, mask_BT), chunk)


def classification(
    logits_BN: jax.Array,
    label_B: jax.Array,
    mask_B: jax.Array,
    *,
    label_smoothing: jax.Array | float,
    z_loss: jax.Array | float,
) -> dict[str, jax.Array]:
    """Cross-entropy of classes, summed over examples.

    Args:
      logits_BN: one score per class, any float type.
      label_B: int, the right class of each example.
      mask_B: the weight of each example; see `next_token`, as for what follows.
      label_smoothing: traced.
      z_loss: traced.

    Returns:
      Float32 scalars: "loss", "accuracy" (the weighted count of examples whose right
      class scores highest; the first of equal scores) and "weight".
    """
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    sums = next_token(logits_BN[:, None], label_B[:, None], mask_B[:, None], **numbers)
    right_B = logits_BN.argmax(-1) == label_B
    return {
        "loss": sums["loss"],
        "accuracy": (right_B * mask_B.astype(jnp.float32)).sum(),
        "weight": sums["weight"],
    }


def sequence_logp(
    head: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    target_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    chunk: int,
) -> jax.Array:
    """Returns float32 [B]: the log-probability of each row's targets, in nats.

    Arguments are those of `next_token_in_chunks`; a row whose mask is all 0 has 0.
    """

    def part(x_BCD, target_BC, mask_BC):
        row = partial(next_token, label_smoothing=0.0, z_loss=0.0)
        # A row is a batch of its own, so that its sum stays its own.
        rows = (head(x_BCD)[:, None], target_BC[:, None], mask_BC[:, None])
        return -jax.vmap(row)(*rows)["nll"]

    return _add_chunks(part, (x_BTD, target_BT, mask_BT), chunk)


def preference(
    policy_BP: jax.Array,
    reference_BP: jax.Array | None,
    length_BP: jax.Array,
    *,
    variant: str,
    logp: str,
    beta: float,
    label_smoothing: jax.Array | float,
) -> dict[str, jax.Array]:
    """How little the chosen answer of a pair is preferred to the rejected, over pairs.

    With c the log-probability of the chosen answer and r of the rejected one, under the
    policy, less those under the reference, and h = c - r:

      dpo   -log sigmoid(beta h)  (Rafailov et al. 2023, equation 7)
      ipo   (h - 1 / (2 beta))^2  (Azar et al. 2024, equation 17)
      orpo  -c - beta log sigmoid(log odds(c) - log odds(r)), without a reference;
            odds(c) = exp(c) / (1 - exp(c))  (Hong et al. 2024, equations 3 to 7)

    Args:
      policy_BP: log-probabilities of whole answers in nats; P = 2: chosen, rejected.
      reference_BP: the same under the reference; None for orpo.
      length_BP: tokens of the answers. A pair with an answer of none does not count.
      variant: dpo, ipo or orpo.
      logp: "sum" takes them as they are, "mean" divides each by its length; orpo is
        made of means.
      beta: above 0; how closely the policy is held to the reference (dpo, ipo), or the
        weight of the odds (orpo).
      label_smoothing: dpo only: the share of pairs that are taken to be the wrong way
        round (Mitchell 2023, "A note on DPO with noisy preferences"); traced.

    Returns:
      Float32 scalars, summed over the pairs that count: "loss"; "weight", the pairs;
      "chosen_reward" and "rejected_reward", which are beta c and beta r; "margin",
      their difference; "accuracy", the pairs whose margin is above 0, of those whose
      margin is 0, as at the start, half: neither answer is preferred.
    """
    counts_B = (length_BP > 0).all(-1)
    ratio_BP = policy_BP if reference_BP is None else policy_BP - reference_BP
    if logp == "mean":
        ratio_BP = ratio_BP / jnp.maximum(length_BP, 1)
    # A pair that does not count takes values at which no variant is singular.
    ratio_BP = jnp.where(counts_B[:, None], ratio_BP, -1.0)
    reward_BP = beta * ratio_BP
    margin_B = reward_BP[:, 0] - reward_BP[:, 1]
    loss_B = PREFERENCES[variant](ratio_BP, beta, label_smoothing)
    each = {
        "loss": loss_B,
        "weight": jnp.ones_like(loss_B),
        "chosen_reward": reward_BP[:, 0],
        "rejected_reward": reward_BP[:, 1],
        "margin": margin_B,
        "accuracy": (jnp.sign(margin_B) + 1) / 2,
    }
    return {name: jnp.where(counts_B, x_B, 0).sum() for name, x_B in each.items()}


def _dpo(ratio_BP, beta, label_smoothing):
    h_B = beta * (ratio_BP[:, 0] - ratio_BP[:, 1])
    right_B, wrong_B = jax.nn.log_sigmoid(h_B), jax.nn.log_sigmoid(-h_B)
    return -(1 - label_smoothing) * right_B - label_smoothing * wrong_B


def _ipo(ratio_BP, beta, label_smoothing):
    del label_smoothing
    return (ratio_BP[:, 0] - ratio_BP[:, 1] - 1 / (2 * beta)) ** 2


def _orpo(ratio_BP, beta, label_smoothing):
    del label_smoothing
    # A certain answer (log-probability 0) has infinite odds: stay a bit below.
    logp_BP = jnp.minimum(ratio_BP, -1e-6)
    odds_BP = logp_BP - jnp.log(-jnp.expm1(logp_BP))
    return -ratio_BP[:, 0] - beta * jax.nn.log_sigmoid(odds_BP[:, 0] - odds_BP[:, 1])


PREFERENCES = {"dpo": _dpo, "ipo": _ipo, "orpo": _orpo}


def token_logp(
    logits_BTV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """Returns float32 [B, T]: log-probabilities of the targets, 0 where mask is 0."""
    counts_BT = mask_BT > 0
    logits_BTV = jnp.where(counts_BT[..., None], logits_BTV, 0).astype(jnp.float32)
    norm_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT1 = jnp.where(counts_BT, target_BT, 0)[..., None]
    right_BT = jnp.take_along_axis(logits_BTV, target_BT1, axis=-1)[..., 0]
    return jnp.where(counts_BT, right_BT - norm_BT, 0)


def policy(
    logp_BT: jax.Array,
    old_BT: jax.Array,
    reference_BT: jax.Array | None,
    advantage_B: jax.Array,
    weight_BT: jax.Array,
    *,
    clip: float,
    kl: float,
) -> dict[str, jax.Array]:
    """The clipped policy objective of GRPO (Shao et al. 2024, equations 3 and 4).

    Args:
      logp_BT: log-probabilities of the tokens that were sampled.
      old_BT: the same under the weights that sampled them; no gradient flows there.
      reference_BT: the same under the reference, or None where kl is 0.
      advantage_B: of each completion.
      weight_BT: what each token counts, 0 outside completions. The objective of a row
        is the weighted sum over its tokens: 1 / length makes that a mean.
      clip: a token whose probability ratio has moved further than this from 1, in the
        direction that its advantage asks for, adds no gradient. 0 = off.
      kl: weight of the divergence from the reference.

    Returns:
      Float32 scalars, summed over rows: "loss"; "weight", the rows with a completion;
      and of each row's mean over its tokens "entropy" (estimated: -logp, in nats),
      "clipped" (the share of tokens that add no gradient) and, with a reference, "kl".
    """
    there_BT = (weight_BT > 0).astype(jnp.float32)
    mean_BT = there_BT / jnp.maximum(there_BT.sum(-1, keepdims=True), 1)
    advantage_B1 = advantage_B[:, None]
    ratio_BT = jnp.exp(logp_BT - jax.lax.stop_gradient(old_BT))
    held_BT = jnp.clip(ratio_BT, 1 - clip, 1 + clip) if clip else ratio_BT
    gain_BT = jnp.minimum(ratio_BT * advantage_B1, held_BT * advantage_B1)
    sums = {
        "weight": there_BT.max(-1).sum(),
        "entropy": -(logp_BT * mean_BT).sum(),
        "clipped": ((gain_BT < ratio_BT * advantage_B1) * mean_BT).sum(),
    }
    if reference_BT is not None:
        # Never negative, and without bias (Schulman 2020; equation 4).
        away_BT = jax.lax.stop_gradient(reference_BT) - logp_BT
        apart_BT = jnp.exp(away_BT) - away_BT - 1
        gain_BT = gain_BT - kl * apart_BT
        sums["kl"] = (apart_BT * mean_BT).sum()
    return {"loss": -(gain_BT * weight_BT).sum(), **sums}


def _add_chunks(part: Callable, arrays: tuple[jax.Array, ...], chunk: int):
    """Returns part(*arrays) as the sum of part over chunks of their second axis."""
    length = arrays[0].shape[1]
    chunks = -(-length // chunk)
    if chunks == 1:
        return part(*arrays)
    size = -(-length // chunks)

    def split(a):  # [B, T, ...] -> [chunks, B, C, ...]; zeros, so mask 0, fill up
        widths = [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, widths).reshape(len(a), chunks, size, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0)

    again = jax.checkpoint(part, prevent_cse=False)  # the loop prevents it
    parts = jax.lax.map(lambda piece: again(*piece), tuple(map(split, arrays)))
    return jax.tree.map(lambda sums: sums.sum(0), parts)
