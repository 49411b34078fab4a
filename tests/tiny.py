"""What model tests share: `cfg(**overrides)`, small; `draw`n arrays; a fast `jit`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from gpt_jax import tasks
from gpt_jax.model import GPTConfig
from gpt_jax.options import Data
from gpt_jax.weights import Weight

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
