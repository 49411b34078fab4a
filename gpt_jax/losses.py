"""Losses: arrays in, float32 SUMS out; the mean is taken once, by who shows it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import mesh

HIDDEN = -1e30  # the logit of a column that only pads; finite, so no NaN

# Shape legend: B batch  T time  C time within a chunk  D width  V vocabulary
# N classes  P chosen and rejected answer.


class Scores(NamedTuple):
    """What a loss has to know of the logits of each position, float32 [B, T].

    Attributes:
      right_BT: the logit of the target.
      norm_BT: log(sum(exp(logits))).
      mean_BT: of all logits.
    """

    right_BT: jax.Array
    norm_BT: jax.Array
    mean_BT: jax.Array


def scores(logits_BTV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array) -> Scores:
    """Returns the scores of logits; arguments as in `next_token`."""
    # Replaced before any arithmetic: 0 * nan would be nan, in the gradient too.
    counts_BT1 = mask_BT[..., None] > 0
    logits_BTV = jnp.where(counts_BT1, logits_BTV, 0).astype(jnp.float32)
    target_BT1 = jnp.clip(target_BT, 0, logits_BTV.shape[-1] - 1)[..., None]
    right_BT = jnp.take_along_axis(logits_BTV, target_BT1, axis=-1)[..., 0]
    norm_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return Scores(right_BT, norm_BT, logits_BTV.mean(axis=-1))


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
    found = scores(logits_BTV, target_BT, mask_BT)
    return cross_entropy(found, mask_BT, label_smoothing, z_loss)


def cross_entropy(
    found: Scores,
    mask_BT: jax.Array,
    label_smoothing: jax.Array | float,
    z_loss: jax.Array | float,
) -> dict[str, jax.Array]:
    """Returns what `next_token` does, from scores."""
    mask_BT = mask_BT.astype(jnp.float32)
    nll_BT = found.norm_BT - found.right_BT
    even_BT = found.norm_BT - found.mean_BT
    loss_BT = nll_BT + label_smoothing * (even_BT - nll_BT) + z_loss * found.norm_BT**2
    return {
        "loss": (loss_BT * mask_BT).sum(),
        "nll": (nll_BT * mask_BT).sum(),
        "weight": mask_BT.sum(),
    }


# ---------------------------------------------------------------- a head in chunks


class Head(NamedTuple):
    """A matrix that makes logits, in place of the logits.

    Attributes:
      matrix: [V, D], or [D, V] where `turned` is not set; V may be padded.
      bias_V: or None.
      turned: whether V comes first, as in the table of tokens.
      vocab_size: what is true of V.
      softcap: cap * tanh(logit / cap); 0 = off.
    """

    matrix: jax.Array
    bias_V: jax.Array | None
    turned: bool
    vocab_size: int
    softcap: float


def scores_in_chunks(
    head: Head, x_BTD: jax.Array, target_BT: jax.Array, mask_BT: jax.Array, chunk: int
) -> Scores:
    """Returns the scores of the head's logits, of which a chunk of T exists at once.

    The backward pass computes the logits again, rounds their gradient to the dtype of
    x, and adds the gradient of the matrix up in float32. Over a mesh the matrix is
    gathered, and its gradient added up over the devices, once and not for each chunk.

    Args:
      head: the matrix.
      x_BTD: what it reads.
      target_BT: see `next_token`, as for the mask.
      mask_BT: see `next_token`.
      chunk: at most so many of the T positions at once.
    """
    chunks = -(-x_BTD.shape[1] // chunk)
    kind = _Kind(head.turned, head.vocab_size, head.softcap, chunks)
    target_BT = jnp.clip(target_BT, 0, head.vocab_size - 1)
    return _scores(kind, x_BTD, head.matrix, head.bias_V, target_BT, mask_BT > 0)


class _Kind(NamedTuple):
    """What is fixed of a head and its chunks."""

    turned: bool
    vocab_size: int
    softcap: float
    chunks: int

    @property
    def product(self) -> str:
        """The einsum of x and the matrix."""
        return "BCD,VD->BCV" if self.turned else "BCD,DV->BCV"

    def logits(self, x_BCD, matrix, bias_V):
        """Returns float32 logits; columns that only pad are hidden."""
        how = {"preferred_element_type": jnp.float32}
        y_BCV = jnp.einsum(self.product, x_BCD, matrix, **how)
        if bias_V is not None:
            y_BCV = y_BCV + bias_V[None, None].astype(jnp.float32)
        if self.softcap:
            y_BCV = self.softcap * jnp.tanh(y_BCV / self.softcap)
        column_11V = jnp.arange(y_BCV.shape[-1])[None, None]
        return jnp.where(column_11V < self.vocab_size, y_BCV, HIDDEN), column_11V


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(kind: _Kind, x_BTD, matrix, bias_V, target_BT, counts_BT) -> Scores:
    return _scores_forward(kind, x_BTD, matrix, bias_V, target_BT, counts_BT)[0]


def _scores_forward(kind, x_BTD, matrix, bias_V, target_BT, counts_BT):
    def local(x_BTD, target_BT, counts_BT, matrix, bias_V):
        def part(_, piece):
            x_BCD, target_BC, counts_BC = piece
            y_BCV, column_11V = kind.logits(x_BCD, matrix, bias_V)
            y_BCV = jnp.where(counts_BC[..., None], y_BCV, 0)
            # Compared, not indexed: the gradient of an index is a scatter.
            right_BC = jnp.where(column_11V == target_BC[..., None], y_BCV, 0).sum(-1)
            true_BCV = jnp.where(column_11V < kind.vocab_size, y_BCV, 0)
            mean_BC = true_BCV.sum(-1) / kind.vocab_size
            return None, Scores(right_BC, jax.nn.logsumexp(y_BCV, -1), mean_BC)

        pieces = _pieces((x_BTD, target_BT, counts_BT), kind.chunks)
        _, found = jax.lax.scan(part, None, pieces)
        return jax.tree.map(partial(_whole, length=x_BTD.shape[1]), found)

    run = mesh.by_examples(local, (mesh.ROWS,) * 3 + (mesh.WHOLE,) * 2, mesh.ROWS)
    gathered = _gathered(kind, matrix, x_BTD.dtype)
    found = run(x_BTD, target_BT, counts_BT, gathered, bias_V)
    return found, (x_BTD, matrix, bias_V, target_BT, counts_BT, found.norm_BT)


def _scores_backward(kind, kept, slope: Scores):
    x_BTD, matrix, bias_V, target_BT, counts_BT, norm_BT = kept
    width = 1 if kind.turned else 0  # the axis of D
    back = "BCV,VD->BCD" if kind.turned else "BCV,DV->BCD"
    outer = "BCV,BCD->VD" if kind.turned else "BCD,BCV->DV"

    def local(*arrays):
        *rows, matrix, bias_V = arrays

        def part(sums, piece):
            x_BCD, target_BC, counts_BC, norm_BC, right_BC, whole_BC, mean_BC = (
                a[..., None] if a.ndim == 2 else a for a in piece
            )
            y_BCV, column_11V = kind.logits(x_BCD, matrix, bias_V)
            d_BCV = whole_BC * jnp.exp(y_BCV - norm_BC) + mean_BC / kind.vocab_size
            d_BCV += jnp.where(column_11V == target_BC, right_BC, 0)
            if kind.softcap:
                d_BCV *= 1 - jnp.square(y_BCV / kind.softcap)
            there_BCV = counts_BC & (column_11V < kind.vocab_size)
            d_BCV = jnp.where(there_BCV, d_BCV, 0)
            small_BCV = d_BCV.astype(x_BCD.dtype)
            dx_BCD = jnp.einsum(back, small_BCV, matrix)
            pair = (small_BCV, x_BCD) if kind.turned else (x_BCD, small_BCV)
            grown = jnp.einsum(outer, *pair, preferred_element_type=jnp.float32)
            bias = None if bias_V is None else sums[1] + d_BCV.sum((0, 1))
            return (sums[0] + grown, bias), dx_BCD

        none = jnp.zeros(matrix.shape, jnp.float32)
        start = (none, None if bias_V is None else jnp.zeros(bias_V.shape, jnp.float32))
        (grown, bias), dx = jax.lax.scan(part, start, _pieces(tuple(rows), kind.chunks))
        if bias is not None:
            bias = mesh.added(bias[None], 0)[0]
        return _whole(dx, length=rows[0].shape[1]), mesh.added(grown, width), bias

    gives = (mesh.ROWS, mesh.share(matrix.shape, width), mesh.WHOLE)
    run = mesh.by_examples(local, (mesh.ROWS,) * 7 + (mesh.WHOLE,) * 2, gives)
    gathered = _gathered(kind, matrix, x_BTD.dtype)
    dx_BTD, grown, bias = run(
        *(x_BTD, target_BT, counts_BT, norm_BT),
        *(slope.right_BT, slope.norm_BT, slope.mean_BT),
        *(gathered, bias_V),
    )
    bias = None if bias_V is None else bias.astype(bias_V.dtype)
    return dx_BTD, grown.astype(matrix.dtype), bias, None, None


_scores.defvjp(_scores_forward, _scores_backward)


def _gathered(kind: _Kind, matrix, dtype):
    """Returns the matrix as products read it: rounded, whole but for the vocabulary."""
    axes = ("tensor", None) if kind.turned else (None, "tensor")
    return mesh.constrained(matrix.astype(dtype), *axes)


def _pieces(arrays: tuple[jax.Array, ...], chunks: int) -> tuple[jax.Array, ...]:
    """Returns arrays [B, T, ...] as [chunks, B, C, ...]; zeros, so mask 0, fill up."""

    def split(a):
        size = -(-a.shape[1] // chunks)
        widths = [(0, 0), (0, chunks * size - a.shape[1])] + [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, widths).reshape(len(a), chunks, size, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0)

    return tuple(map(split, arrays))


def _whole(pieces, length: int):
    """Returns [chunks, B, C, ...] as [B, T, ...]: the inverse of `_pieces`."""
    a = jnp.moveaxis(pieces, 0, 1)
    return a.reshape(len(a), -1, *a.shape[3:])[:, :length]


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
    right_B = (logits_BN.argmax(-1) == label_B).astype(jnp.float32)
    return {
        "loss": sums["loss"],
        "accuracy": (right_B * mask_B.astype(jnp.float32)).sum(),
        "weight": sums["weight"],
    }


def sequence_logp(found: Scores, mask_BT: jax.Array) -> jax.Array:
    """Returns float32 [B]: the log-probability of each row's targets, in nats.

    A row whose mask is all 0 has 0.
    """
    return ((found.right_BT - found.norm_BT) * mask_BT.astype(jnp.float32)).sum(-1)


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
        ratio_BP = ratio_BP / jnp.maximum(length_BP, 1).astype(jnp.float32)
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


def token_logp(found: Scores, mask_BT: jax.Array) -> jax.Array:
    """Returns float32 [B, T]: log-probabilities of the targets, 0 where mask is 0."""
    return jnp.where(mask_BT > 0, found.right_BT - found.norm_BT, 0)


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
    clipped_BT = (gain_BT < ratio_BT * advantage_B1).astype(jnp.float32)
    sums = {
        "weight": there_BT.max(-1).sum(),
        "entropy": -(logp_BT * mean_BT).sum(),
        "clipped": (clipped_BT * mean_BT).sum(),
    }
    if reference_BT is not None:
        # Never negative, and without bias (Schulman 2020; equation 4).
        away_BT = jax.lax.stop_gradient(reference_BT) - logp_BT
        apart_BT = jnp.exp(away_BT) - away_BT - 1
        gain_BT = gain_BT - kl * apart_BT
        sums["kl"] = (apart_BT * mean_BT).sum()
    return {"loss": -(gain_BT * weight_BT).sum(), **sums}
