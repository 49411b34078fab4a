"""What tests share: `cfg(**overrides)`, small; `draw`n arrays; a fast `jit`; a run's
config `on_text`, of seconds."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import common
from gpt_jax import tasks
from gpt_jax.model import GPTConfig
from gpt_jax.options import Data
from gpt_jax.weights import Weight

SENTENCES = "the quick brown fox jumps over the lazy dog. " * 300

# Tiny programs spend their time in LLVM: without its optimisation a third of it.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(*shape, seed):
    """Returns normal numbers, float32."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weight(shape, axes, **how) -> Weight:
    """Returns the declaration of a weight that no model has."""
    like = jax.ShapeDtypeStruct(shape, "float32")
    return Weight(like, axes, **{"draw": "kernel", **how})


def task(config, progress: bool = False) -> tasks.Task:
    """Returns the task of a config, without dropout."""
    return tasks.make(
        tasks.chosen(config.task),
        model=GPTConfig(**config.model),
        text=Data(**config.data),
        dropout=(),
        progress=progress,
    )


def cfg(**overrides) -> GPTConfig:
    """Returns the default model, shrunk: 2 layers, width 32, 4 heads, 61 tokens."""
    model = common.base().model
    model.update(vocab_size=61, context_length=16, n_layers=2, d_model=32, n_heads=4)
    return GPTConfig(**{**model, **overrides})


def on_text(folder: Path) -> ConfigDict:
    """Returns the config of a run on a sentence; text and shards lie in `folder`."""
    (folder / "text.txt").write_text(SENTENCES)
    config = common.tiny(common.base())
    config.data.update(source=str(folder / "text.txt"), tokenizer="char")
    config.data.update(folder=str(folder / "data"), cache=str(folder / "cache"))
    config.model.update(context_length=16, n_layers=1)
    config.update(compile_cache="", tensorboard=False)
    return config
