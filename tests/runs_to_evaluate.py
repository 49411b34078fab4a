"""A run folder with a tiny model of random weights and a byte tokenizer."""

from pathlib import Path

import jax

from configs import common
from gpt_jax import model, runs, tokenizers
from gpt_jax.checkpoint import Checkpoints

BYTES = tokenizers.train("byte", [])


def make(
    folder: Path, /, *, seed: int = 1, context: int = 64, init_from: str = "", **data
) -> Path:
    """Writes the run; its weights are large enough to be sure of something.

    Args:
      folder: where.
      seed: of the weights.
      context: tokens that the model reads at once.
      init_from: as in the config.
      **data: of the config's data.
    """
    config = common.base()
    config.compile_cache, config.init_from = "", init_from
    config.data.update(data)
    config.model.update(n_layers=2, d_model=32, n_heads=4, context_length=context)
    cfg = runs.model_config(config, BYTES)
    params = jax.tree.map(lambda x: 4 * x, model.init(cfg, jax.random.key(seed)))
    runs.create(folder, config, BYTES)
    with Checkpoints(folder / "checkpoints", keep=1) as store:
        store.save(0, {"params": params}, metric=None, meta={})
    return folder
