"""The device that a run would be made on, as --device and --memory name it."""

import re
from typing import NamedTuple

from gpt_jax import names
from gpt_jax.devices import ACCELERATORS

PLATFORMS = ("gpu", "tpu", "cpu")
UNITS = {"": 1, "b": 1}
UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", start=1)}
UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", start=1)}


class Device(NamedTuple):
    """What a run would be made on.

    Attributes:
      platform: gpu, tpu or cpu; decides which attention is used.
      memory: bytes of one JAX device; None = unknown.
      peak_flops: dense bfloat16 FLOP/s of one JAX device; None = unknown.
    """

    platform: str
    memory: int | None
    peak_flops: float | None


def find(name: str, memory: str) -> Device:
    """Returns the device called `name`; `memory`, where not "", replaces its own.

    Args:
      name: one of ACCELERATORS; or a platform, of which nothing else is known.
      memory: "80GB", "24GiB", a number of bytes, or "".

    Raises:
      ValueError: no such device, or no such size.
    """
    names.choose("--device", name, [*ACCELERATORS, *PLATFORMS])
    found = ACCELERATORS.get(name)
    if found is None:
        return Device(name, bytes_of(memory) if memory else None, None)
    own = int(found.gigabytes * 1000**3)
    return Device(found.platform, bytes_of(memory) if memory else own, found.flops)


def bytes_of(size: str) -> int:
    """Returns the bytes of "80GB" (powers of 1,000) or "24GiB" (of 1,024).

    Raises:
      ValueError: it is not such a size, or nothing.
    """
    match = re.fullmatch(r"(\d+\.?\d*)\s*([a-z]*)", size.strip().lower())
    unit = UNITS.get(match[2]) if match else None
    if match is None or unit is None or not float(match[1]):
        raise ValueError(f"--memory={size} is not a size such as 80GB or 24GiB")
    return int(float(match[1]) * unit)
