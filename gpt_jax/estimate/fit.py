"""What would make a train step fit that does not."""

import itertools
from collections.abc import Iterator
from typing import Any

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from gpt_jax.estimate import memory
from gpt_jax.estimate import plan as plans

Change = dict[str, Any]  # keys of the config and what they would be


def helps(
    config: ConfigDict, mesh: AbstractMesh, platform: str, *, needs: float, has: float
) -> list[tuple[Change, float]]:
    """Returns the least changes of a config after which its step would fit.

    Micro-batches of fewer rows, layers computed again, weights split over the devices
    that share the examples: alone, or else in pairs, or else all of them.

    Args:
      config: what does not fit.
      mesh: its devices.
      platform: of these; see `memory.per_row`.
      needs: bytes of one device that the compiler says it takes.
      has: bytes that there are.

    Returns:
      (change, bytes), the bytes by our own estimate times what it is off by here.
    """
    own = peak(plans.make(config, mesh), platform)
    found = []
    for count in (1, 2, 3):
        for changes in itertools.combinations(single(config, mesh), count):
            change = {key: value for one in changes for key, value in one.items()}
            if len(change) < sum(map(len, changes)):  # two of one kind
                continue
            changed, other = altered(config, mesh, change)
            size = peak(plans.make(changed, other), platform) * needs / own
            if size <= has:
                found.append((change, size))
        if found:
            break
    kinds: dict[tuple, tuple[Change, float]] = {}
    for change, size in found:  # of several numbers of micro-batches the fewest
        kinds.setdefault(tuple(change), (change, size))
    return list(kinds.values())


def single(config: ConfigDict, mesh: AbstractMesh) -> Iterator[Change]:
    """Yields the changes that may help."""
    sharers = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.batch_size // config.accumulate
    cut = [n for n in range(2, rows // sharers + 1) if rows % (n * sharers) == 0]
    for times in cut:
        yield {"accumulate": config.accumulate * times}
    if config.model.remat != "full":
        yield {"model.remat": "full"}
    if mesh.shape["data"] > 1:
        yield {"mesh.data": 1, "mesh.fsdp": sharers}


def altered(
    config: ConfigDict, mesh: AbstractMesh, change: Change
) -> tuple[ConfigDict, AbstractMesh]:
    """Returns a config and its mesh with some keys changed."""
    config = ConfigDict(config.to_dict())
    config.update_from_flattened_dict(change)
    lengths = {**mesh.shape} | {
        key.removeprefix("mesh."): value
        for key, value in change.items()
        if key.startswith("mesh.")
    }
    return config, mesh.update(axis_sizes=tuple(lengths.values()))


def peak(plan: plans.Plan, platform: str) -> int:
    """Returns the most bytes of one device at once, by our own estimate."""
    one = memory.per_row(plan, platform)
    return memory.measure(plan, one, plan.rows // plan.sharers).peak
