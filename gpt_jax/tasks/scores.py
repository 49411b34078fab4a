"""How likely a model finds the targets of a batch, a few logits at a time."""

import jax.numpy as jnp

from gpt_jax import losses, mesh
from gpt_jax.losses import Head, Scores
from gpt_jax.model import GPT, GPTConfig, logits

# Of the float32 logits of one device. All at once are a tenth faster than chunks.
LOGITS_BYTES = 2**31
TILE = 128  # chunks of so many positions, or multiples, fill a matrix unit


def scores(model: GPT, params, x_BTD, target_BT, mask_BT, *, loss_chunk: int) -> Scores:
    """Returns the scores of targets under the logits of a residual stream.

    Args:
      model: the model.
      params: its weights.
      x_BTD: the normed residual stream.
      target_BT: int, the right token at each position.
      mask_BT: 0 where a position does not count.
      loss_chunk: positions whose logits exist at once; 0 = as LOGITS_BYTES allows.
    """
    chunk = loss_chunk or fitting_chunk(len(x_BTD) // mesh.sharers(), model.cfg)
    if chunk >= x_BTD.shape[1] and x_BTD.dtype == jnp.float32:
        return losses.scores(logits(model, params, x_BTD), target_BT, mask_BT)
    head = head_of(model.cfg, params)
    return losses.scores_in_chunks(head, x_BTD, target_BT, mask_BT, chunk)


def head_of(cfg: GPTConfig, params) -> Head:
    """Returns the matrix of a language model's head."""
    fixed = (cfg.vocab_size, cfg.logit_softcap)
    if cfg.tie_embeddings:
        return Head(params["embed"]["embedding"], None, True, *fixed)
    return Head(params["head"]["kernel"], params["head"].get("bias"), False, *fixed)


def fitting_chunk(rows: int, cfg: GPTConfig) -> int:
    """Returns how many positions of a device's rows have logits within LOGITS_BYTES."""
    fit = max(1, LOGITS_BYTES // (4 * max(1, rows) * cfg.vocab_rows))
    return fit // TILE * TILE or fit
