"""What a server will hold in memory, told before anything is compiled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax import memory, mesh, quantised
from gpt_jax.model import GPT, GPTConfig, declared, init_cache
from gpt_jax.screen import size
from gpt_jax.serve import slots

SHORTEST = 128  # the shortest context that is offered instead of one that is too long


@dataclass(frozen=True)
class Plan:
    """What a model needs while it is served, in bytes, at the most.

    Attributes:
      rows, context: how many texts are written at once, of how many tokens at most.
      weights: of copies in other orders or types than those read from the disk.
      caches: of all rows, at the moment in which they move to a longer reach.
      prompts: the caches that prompts run on, one of each reach.
      prefixes: for what prompts begin with.
    """

    rows: int
    context: int
    weights: int
    caches: int
    prompts: int
    prefixes: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.caches + self.prompts + self.prefixes

    def told(self) -> str:
        """Returns it as a part of a sentence."""
        return (
            f"{size(self.total)} besides the weights: {size(self.caches)} for the "
            f"caches of {self.rows} texts of {self.context:,} tokens, "
            f"{size(self.prompts)} for prompts, {size(self.prefixes)} for their "
            f"beginnings, {size(self.weights)} for copies of weights"
        )


def of(cfg: GPTConfig, params: Any, sizes: Sequence[int], prefixes: int = 0) -> Plan:
    """Returns what serving takes.

    Args:
      cfg: the model.
      params: its weights.
      sizes: as in `Slots`.
      prefixes: bytes, likewise; with one size nothing is kept.
    """
    reaches = slots.reaches(cfg.context_length)
    held = _cache_bytes(cfg, sizes[-1], cfg.context_length)
    moved = held * reaches[-2] // reaches[-1] if len(reaches) > 1 else 0
    moved = moved if len(sizes) > 1 else 0  # one size alone never moves
    kernels = sum(x.nbytes for x in jax.tree.leaves(params))
    copies = kernels if sizes[0] == 1 and mesh.platform() == "cpu" else 0
    if quantised.are(params):  # they lie one way, whatever reads them
        copies = 0
    elif cfg.dtype != cfg.param_dtype:
        copies += kernels * jnp.dtype(cfg.dtype).itemsize // _width(cfg.param_dtype)
    prompts = sum(_cache_bytes(cfg, 1, reach) for reach in reaches)
    prefixes = prefixes if len(sizes) > 1 else 0
    return Plan(sizes[-1], cfg.context_length, copies, held + moved, prompts, prefixes)


def check(
    cfg: GPTConfig, params: Any, sizes: Sequence[int], free: float, prefixes: int = 0
) -> Plan:
    """Returns the plan, or raises ValueError saying what would fit into `free`."""
    plan = of(cfg, params, sizes, prefixes)
    if plan.total <= free:
        return plan
    fits = _fitting(cfg, params, sizes, free - plan.prefixes)
    cure = "nothing smaller does: free memory, or serve a smaller model"
    if fits:
        shorter, fewer = fits
        flags = f"--batches={','.join(map(str, fewer))} --context={shorter}"
        smaller = _shortened(cfg, params, shorter, fewer).total + plan.prefixes
        cure = f"{flags} needs {size(smaller)}"
    raise memory.too_large(f"serving this needs {plan.told()}", free, cure)


def _fitting(
    cfg: GPTConfig, params: Any, sizes: Sequence[int], free: float
) -> tuple[int, Sequence[int]] | None:
    """Returns the context and sizes that fit and hold the most tokens together."""
    contexts, best = [cfg.context_length], None
    while contexts[-1] >= 2 * SHORTEST:
        contexts.append(contexts[-1] // 2)
    for context in contexts:
        for count in range(len(sizes), 0, -1):
            plan = _shortened(cfg, params, context, sizes[:count])
            held = context * sizes[count - 1]
            if plan.total <= free and (best is None or held > best[0]):
                best = held, (context, sizes[:count])
    return best and best[1]


def _shortened(cfg: GPTConfig, params: Any, context: int, sizes: Sequence[int]) -> Plan:
    return of(replace(cfg, context_length=context), params, sizes)


def _cache_bytes(cfg: GPTConfig, rows: int, reach: int) -> int:
    make = partial(init_cache, cfg, rows, reach, jnp.dtype(cfg.dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))


def _width(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def shortened(model: GPT, params: Any, context: int) -> tuple[GPT, Any]:
    """Returns a model and its weights for a shorter context; 0 = as it is.

    Learnt positions beyond it are left out.

    Raises:
      ValueError: the model's own context is shorter.
    """
    cfg = model.cfg
    if not context or context == cfg.context_length:
        return model, params
    if not 0 < context < cfg.context_length:
        raise ValueError(
            f"--context={context} must be a number from 1 to the model's own context "
            f"of {cfg.context_length} tokens"
        )
    known = declared(cfg)

    def cut(path, leaf):
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        axes = known[name].axes if name in known else ()
        if "position" not in axes:
            return leaf
        return jax.lax.slice_in_dim(leaf, 0, context, axis=axes.index("position"))

    params = jax.tree_util.tree_map_with_path(cut, params)
    return GPT(replace(cfg, context_length=context)), params
