"""What a run will need, before money is spent: parameters, FLOPs, memory, time.

`estimate` computes it from shapes, without a device; `dry` compiles the real programs
for devices that need not be there and asks their compilers.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from gpt_jax import metrics, model, sharding, train, weights
from gpt_jax.estimate import memory
from gpt_jax.estimate.device import Device, find
from gpt_jax.estimate.plan import Plan, make
from gpt_jax.weights import Declared

__all__ = ["Device", "Plan", "abstract", "estimate", "find", "make"]

# Parts of the parameters, by how their paths begin or what they hold.
PARTS = {
    "embeddings": ("embed/", "positions/"),
    "attention": ("/attn/",),
    "MLP": ("/mlp/",),
    "head": ("head/", "classifier/"),
}


def abstract(config: ConfigDict, devices: int) -> AbstractMesh:
    """Returns the mesh of a config over so many devices, of which none need exist.

    Args:
      devices: 0 = as many as mesh.data, fsdp and tensor say.

    Raises:
      ValueError: the axes do not fit (see `sharding.lengths`).
    """
    train.check(config)
    axes = {name: config.mesh[name] for name in sharding.AXES}
    count = devices or max(1, axes["data"]) * axes["fsdp"] * axes["tensor"]
    rows = config.batch_size // config.accumulate
    lengths = sharding.lengths(rows, count, on_cpu=False, **axes)
    if devices and lengths[0] * lengths[1] * lengths[2] != devices:
        raise ValueError(
            f"{devices} devices are not used by mesh.data {axes['data']} x fsdp "
            f"{axes['fsdp']} x tensor {axes['tensor']}: make their product {devices}, "
            "or set mesh.data to -1 and let fsdp x tensor divide it"
        )
    kinds = (AxisType.Auto,) * len(lengths)
    return AbstractMesh(lengths, sharding.AXES, axis_types=kinds)


def estimate(
    plan: Plan, device: Device, *, mfu: float, rows: int = 1
) -> dict[str, Any]:
    """Returns what a plan needs, as nested dicts of numbers.

    Args:
      plan: what would run.
      device: one of the devices that it would run on.
      mfu: the share of the devices' peak that the run would reach, from 0 to 1.
      rows: texts that the key-value cache holds at once.

    Raises:
      ValueError: mfu or rows are out of range.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu={mfu} must be above 0 and at most 1")
    if rows < 1:
        raise ValueError(f"--kv_rows={rows} must be at least 1")
    one = memory.per_row(plan, device.platform)
    found = memory.measure(plan, one, plan.rows // plan.sharers)
    mesh = dict(plan.mesh.shape)
    kv = memory.kv_bytes(plan.cfg, rows=rows, length=plan.cfg.context_length, mesh=mesh)
    result = {
        "mesh": mesh,
        "devices": plan.mesh.size,
        "parameters": parameters(plan),
        "memory": {k: v for k, v in found._asdict().items() if k != "looped"},
        "moments": found.moments,
        "peak": found.peak,
        "kv_cache": {"rows": rows, "length": plan.cfg.context_length, "bytes": kv},
        **work(plan, device, mfu),
    }
    if device.memory:
        fits = memory.largest(plan, one, device.memory)
        result["fits"] = {
            "memory": device.memory,
            "rows": fits,
            "batch_size": fits * plan.sharers * plan.accumulate,
        }
    return result


def parameters(plan: Plan) -> dict[str, int]:
    """Returns the number of parameters: in all, that train, and by part.

    All but "padding" are those of the true vocabulary.
    """
    state = plan.state
    held = [state.params, state.frozen.get("base", {})]
    counts = dict.fromkeys([*PARTS, "norms", "adapter", "other"], 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(held):
        name = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        counts[_part(name, plan.strategy.declared)] += model.count([leaf])
    total = model.count(plan.cfg)
    padding = sum(counts.values()) - counts["adapter"] - total
    tables = 1 if plan.cfg.tie_embeddings else 2
    counts["embeddings"] -= padding // tables
    counts["head"] -= padding - padding // tables
    trainable = model.count(state.params)
    trainable -= padding if "base" not in state.frozen else 0
    counts = {name: n for name, n in counts.items() if n}
    return {"total": total, "trainable": trainable, "padding": padding} | counts


def _part(path: str, declared: Declared) -> str:
    weight = weights.at(declared, path)
    if "rank" in weight.axes:
        return "adapter"
    if weight.draw in ("scale", "shift"):
        return "norms"
    found = (part for part, words in PARTS.items() if any(w in path for w in words))
    return next(found, "other")


def work(plan: Plan, device: Device, mfu: float) -> Mapping[str, Any]:
    """Returns FLOPs and, of a device whose speed is known, times."""
    cfg, config = plan.cfg, plan.config
    flops = metrics.flops_per_token(
        model.count(cfg),
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        head_dim=cfg.head_dim,
        seq_len=plan.task.tokens,
    )
    tokens = train.tokens_per_step(config, plan.task)
    steps = train.last_step(config, plan.task)
    result = {"flops_per_token": flops, "tokens_per_step": tokens, "steps": steps}
    if not device.peak_flops:
        return result
    rate = device.peak_flops * plan.mesh.size * mfu / flops
    times = {
        "mfu": mfu,
        "peak_flops": device.peak_flops,
        "tokens_per_second": rate,
        "step_seconds": tokens / rate,
        "run_seconds": steps * tokens / rate,
    }
    return result | times
