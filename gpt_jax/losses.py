"""Losses: arrays in, float32 SUMS out; the mean is taken once, by who shows it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Shape legend: B batch  T time  C time within a chunk  D width  V vocabulary
# N classes.


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

    length = x_BTD.shape[1]
    chunks = -(-length // chunk)
    if chunks == 1:
        return part(x_BTD, target_BT, mask_BT)
    size = -(-length // chunks)

    def split(a):  # [B, T, ...] -> [chunks, B, C, ...]; zeros, so mask 0, fill up
        widths = [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, widths).reshape(len(a), chunks, size, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0)

    pieces = tuple(map(split, (x_BTD, target_BT, mask_BT)))
    again = jax.checkpoint(part, prevent_cse=False)  # the loop prevents it
    parts = jax.lax.map(lambda piece: again(*piece), pieces)
    return jax.tree.map(lambda sums: sums.sum(0), parts)


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
