"""First weights: how each kind of weight is drawn, by preset."""

import math
import zlib
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax.model.architecture import GPTConfig
from gpt_jax.weights import Declared

Draw = Callable[..., jax.Array]  # (key, shape, fan_in) -> an array


def _normal(std: float) -> Draw:
    return lambda key, shape, fan_in: std * jax.random.normal(key, shape)


def _uniform(gain: float) -> Draw:
    """U(-a, a) with a = gain / sqrt(fan_in)."""

    def draw(key, shape, fan_in):
        edge = gain / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, minval=-edge, maxval=edge)

    return draw


def _constant(value: float) -> Draw:
    return lambda key, shape, fan_in: jnp.full(shape, value)


def draws(cfg: GPTConfig) -> dict[str, Draw]:
    """Returns how each of weights.DRAWS is drawn under `cfg.init`."""
    zero, table = _constant(0.0), _normal(0.02 if cfg.tie_embeddings else 1.0)
    # Under mup kernels shrink with the width and a head, whose output is divided by
    # it, does not (Yang et al. 2022, table 8). At the base width all is as it was.
    wide = math.sqrt(cfg.width_ratio)
    presets: dict[str, dict[str, Draw]] = {
        # Radford et al. 2019, section 2.3: residual projections shrink with depth.
        "gpt2": {
            "kernel": _normal(0.02 / wide),
            "residual": _normal(0.02 / math.sqrt(2 * cfg.n_layers) / wide),
            "head": _normal(0.02),
            "embedding": _normal(0.02),
            "bias": zero,
        },
        # What torch.nn.Linear and torch.nn.Embedding draw.
        "torch_default": {
            "kernel": _uniform(1.0),
            "residual": _uniform(1.0),
            "head": _uniform(wide),
            "embedding": _normal(1.0),
            "bias": _uniform(wide),
        },
        # Unit variance through every kernel; an untied head starts nearly uniform.
        "modern": {
            "kernel": _uniform(math.sqrt(3.0)),
            "residual": _uniform(math.sqrt(3.0)),
            "head": _normal(0.001),
            "embedding": table,
            "bias": zero,
        },
    }
    chosen = presets[cfg.init]
    chosen |= {"residual_bias": chosen["bias"]}
    chosen |= {"scale": _constant(1.0 - cfg.norm_offset), "shift": zero}
    return chosen | ({"residual": zero, "residual_bias": zero} if cfg.zero_init else {})


def draw(declared: Declared, cfg: GPTConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Returns first weights by path; each depends on the key and its own path only."""
    how = draws(cfg)
    alike = defaultdict(list)  # drawn together, or compiling takes a second a layer
    for path, weight in declared.items():
        alike[how[weight.draw], weight.shape, weight.fan_in].append(path)
    drawn = {}
    for (one, shape, fan_in), paths in alike.items():
        numbers = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
        keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
        arrays = jax.vmap(partial(one, shape=shape, fan_in=fan_in))(keys)
        drawn |= zip(paths, arrays.astype(cfg.param_dtype), strict=True)
    return drawn
