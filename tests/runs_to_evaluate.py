"""A run folder with a tiny model of random weights and a byte tokenizer."""

from pathlib import Path

import jax

from configs import common
from gpt_jax import model, runs, tokenizers
from gpt_jax.checkpoint import Checkpoints

BYTES = tokenizers.train("byte", [])


def make(folder: Path, *, seed: int = 1, context: int = 64) -> Path:
    """Writes the run; its weights are large enough to be sure of something."""
    config = common.base()
    config.compile_cache = ""
    config.model.update(n_layers=2, d_model=32, n_heads=4, context_length=context)
    cfg = runs.model_config(config, BYTES)
    params = jax.tree.map(lambda x: 4 * x, model.init(cfg, jax.random.key(seed)))
    runs.create(folder, config, BYTES)
    with Checkpoints(folder / "checkpoints", keep=1) as store:
        store.save(0, {"params": params}, metric=None, meta={})
    return folder
