"""A model as compiled programs that need none of this code: StableHLO by jax.export.

The folder holds two programs, the weights, the tokenizer and a runner:

    prefill.stablehlo    (weights, tokens [1, T], length [1]) -> logits [1, V], cache
    decode.stablehlo     (weights, token [1, 1], cache) -> logits [1, V], cache
    model.safetensors    the weights, by the paths that model.json lists in order
    tokenizer.json, model.json, run.py

T is any length up to the context. The programs run on CPU, CUDA, ROCm and TPU. A jax
release reads what releases of the six months before it exported (jax.export's
compatibility guarantee), so model.json holds the release and the date.
"""

import datetime
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax import commands
from gpt_jax.model import GPT, Cache, GPTConfig, Hidden, hidden, init_cache, logits
from gpt_jax.pretrained import files, runner
from gpt_jax.tokenizers import Tokenizer

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def save(folder: Path, params: Mapping, cfg: GPTConfig, tokenizer: Tokenizer) -> None:
    """Writes programs, weights, tokenizer and runner.

    Args:
      folder: exists.
      params: the weights, layers unrolled.
      cfg: their model.
      tokenizer: its tokenizer.

    Raises:
      ValueError: the model is a classifier; or the package flatbuffers, which
        jax.export needs, is absent.
    """
    if cfg.n_classes:
        raise ValueError(
            f"this model sorts texts into {cfg.n_classes} classes: only language "
            "models are exported"
        )
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "StableHLO needs the package flatbuffers: "
            f"{commands.install('flatbuffers')}"
        ) from error
    flat = {
        str(k): np.asarray(v) for k, v in flatten_dict(dict(params), sep="/").items()
    }
    for name, (function, arguments) in programs(cfg, flat).items():
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
        (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
    kinds = {path: (files.kind_of(x.dtype), x.shape) for path, x in flat.items()}
    files.write(folder / files.SINGLE, kinds, flat.__getitem__)
    tokenizer.save(folder / "tokenizer.json")
    about = {
        "weights": list(flat),
        "context_length": cfg.context_length,
        "opening": tokenizer.opening,
        "ends": list(tokenizer.ends),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }
    (folder / "model.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    (folder / "run.py").write_text(inspect.getsource(runner), "utf-8")


def programs(cfg: GPTConfig, flat: Mapping) -> dict[str, tuple[Callable, tuple]]:
    """Returns each program's function and what it takes, as shapes."""
    model, names = GPT(cfg), list(flat)
    dtype = jnp.dtype(cfg.dtype)
    empty = jax.eval_shape(lambda: init_cache(cfg, 1, cfg.context_length, dtype))

    def run(weights: list, tokens_BT, cache: Cache) -> tuple[Any, Hidden]:
        params = unflatten_dict(dict(zip(names, weights, strict=True)), sep="/")
        return params, hidden(model, params, tokens_BT, cache=cache)

    def prefill(weights, tokens_BT, length_B):
        cache = init_cache(cfg, 1, cfg.context_length, dtype)
        params, found = run(weights, tokens_BT, cache)
        last_BD = found.x_BTD[jnp.arange(1), length_B - 1]
        cache = found.cache._replace(length_B=length_B)
        return logits(model, params, last_BD), jax.tree.leaves(cache)

    def decode(weights, token_BT, cache):
        cache = jax.tree.unflatten(jax.tree.structure(empty), cache)
        params, found = run(weights, token_BT, cache)
        made = logits(model, params, found.x_BTD[:, 0])
        return made, jax.tree.leaves(found.cache)

    shape = jax.ShapeDtypeStruct
    weights = [shape(x.shape, x.dtype) for x in flat.values()]
    length_B = shape((1,), jnp.int32)
    limit = f"T <= {cfg.context_length}"
    tokens_BT = shape(jax.export.symbolic_shape("1, T", constraints=[limit]), jnp.int32)
    token_BT = shape((1, 1), jnp.int32)
    return {
        "prefill": (prefill, (weights, tokens_BT, length_B)),
        "decode": (decode, (weights, token_BT, jax.tree.leaves(empty))),
    }
