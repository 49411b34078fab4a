"""How good a model is: the task's own loss over every example exactly once."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt_jax import sharding


def compile(loss: Callable, mesh: Mesh) -> Callable:
    """Returns the jitted `(weights, frozen, batch [1, B, ...], hyper) -> Sums`."""

    def sums(weights, frozen, batch, hyper):
        return loss(weights, frozen, jax.tree.map(lambda x: x[0], batch), None, hyper)

    return jax.jit(sharding.within(mesh, sums), out_shardings=NamedSharding(mesh, P()))


def evaluate(
    weights: Any,
    frozen: Any,
    batches: Iterable[Mapping[str, Any]],
    hyper: Any,
    *,
    compiled: Callable,
    mesh: Mesh,
    interrupted: Callable[[], Any],
) -> dict[str, float] | None:
    """Adds up the sums of all batches and returns them as means.

    Args:
      weights: the model's weights, replicated over `mesh`.
      frozen: frozen trees by name.
      batches: host batches [1, B, ...]; a short one is padded with mask 0.
      hyper: the run's numbers.
      compiled: what `compile` returned.
      mesh: the devices.
      interrupted: true when the process was asked to stop.

    Returns:
      See `means`; None when interrupted.
    """

    def sums(batch):
        placed = sharding.split_rows(batch, mesh=mesh)
        return compiled(weights, frozen, placed, hyper)

    parts = collect(batches, sums, interrupted=interrupted)
    return None if parts is None else means(add(parts))


def collect(
    batches: Iterable[Mapping[str, Any]],
    sums: Callable[[Any], Any],
    *,
    interrupted: Callable[[], Any],
) -> list[Any] | None:
    """Returns `sums(batch)` of every host batch, on the host; None when interrupted."""
    parts = []
    for batch in batches:
        if interrupted():
            return None
        parts.append(sums(batch))
        sharding.wait_on_cpu(parts[-1])
    return jax.device_get(parts)


def add(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Adds up sums on the host, in float64."""
    return {name: sum(float(part[name]) for part in parts) for name in parts[0]}


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """Turns sums into the numbers that people read.

    Returns:
      loss: nats per target. perplexity: exp of the plain loss. bpb: bits per byte of
      text, comparable between tokenizers; only where the sums know the bytes. Every
      other sum is divided by the weight and keeps its name: accuracy, say.
    """
    weight = float(sums["weight"]) or 1.0
    result = {"loss": float(sums["loss"]) / weight}
    if "nll" in sums:
        nll = float(sums["nll"])
        result["perplexity"] = math.exp(min(nll / weight, 700.0))  # exp(710) overflows
        if float(sums.get("bytes", 0.0)) > 0:
            result["bpb"] = nll / math.log(2) / float(sums["bytes"])
    others = sums.keys() - {"loss", "nll", "weight", "bytes"}
    return result | {name: float(sums[name]) / weight for name in sorted(others)}
