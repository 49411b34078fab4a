"""More tokens for a model that has learnt without them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from flax.traverse_util import unflatten_dict

from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import weights


def grow(params: Mapping, cfg: GPTConfig, new: Iterable[int]) -> tuple[dict, GPTConfig]:
    """Returns the weights and the model with rows for new tokens.

    A new token's row is the mean of the old ones' rows (Hewitt 2021, "Initializing new
    word embeddings for pretrained language models"), in the embedding and in a head of
    its own: its logit is then the mean of the others'. Their rows stay, bit for bit;
    their logits but for the rounding of a product of another width.

    Args:
      params: the weights, layers unrolled.
      cfg: their model.
      new: ids of the new tokens; where the model has such a row, which no token used
        till now, it is overwritten.
    """
    new = sorted({*new})
    grown = replace(cfg, vocab_size=max(cfg.vocab_size, 1 + max(new)))
    old = np.setdiff1d(np.arange(cfg.vocab_size), new)
    flat, declared = {}, weights.unrolled(cfg)
    for path, value in weights.flat(params):
        axes = declared[path].axes
        if "vocab" not in axes:
            flat[path] = value
            continue
        rows = np.moveaxis(np.asarray(value), axes.index("vocab"), 0)
        mean = rows[old].mean(0, dtype=np.float32)
        made = np.zeros((grown.vocab_rows, *rows.shape[1:]), rows.dtype)
        made[: cfg.vocab_size] = rows[: cfg.vocab_size]
        made[new] = mean
        flat[path] = np.ascontiguousarray(np.moveaxis(made, 0, axes.index("vocab")))
    return unflatten_dict(flat, sep="/"), grown
