"""Facts about devices: their memory and, by metrics.PEAK_FLOPS, their speed."""

import re
from typing import NamedTuple

from gpt_jax import metrics, names


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


# name: (platform, gigabytes, as `jax.Device.device_kind` says it). Gigabytes are those
# of the makers' data sheets: NVIDIA's of each GPU, Google Cloud's TPU documentation
# ("HBM2 capacity per chip", halved for v2 and v3, whose chips JAX shows as two).
DEVICES = {
    "b200": ("gpu", 180, "NVIDIA B200"),
    "h200": ("gpu", 141, "NVIDIA H200"),
    "h100": ("gpu", 80, "NVIDIA H100 80GB HBM3"),
    "h100-pcie": ("gpu", 80, "NVIDIA H100 PCIe"),
    "a100-80gb": ("gpu", 80, "NVIDIA A100-SXM4-80GB"),
    "a100-40gb": ("gpu", 40, "NVIDIA A100-SXM4-40GB"),
    "l40s": ("gpu", 48, "NVIDIA L40S"),
    "l4": ("gpu", 24, "NVIDIA L4"),
    "a10g": ("gpu", 24, "NVIDIA A10G"),
    "t4": ("gpu", 16, "Tesla T4"),
    "v100-32gb": ("gpu", 32, "Tesla V100-SXM2-32GB"),
    "v100-16gb": ("gpu", 16, "Tesla V100-SXM2-16GB"),
    "tpu-v6e": ("tpu", 32, "TPU v6 lite"),
    "tpu-v5p": ("tpu", 95, "TPU v5p"),
    "tpu-v5e": ("tpu", 16, "TPU v5 lite"),
    "tpu-v4": ("tpu", 32, "TPU v4"),
    "tpu-v3": ("tpu", 16, "TPU v3"),
    "tpu-v2": ("tpu", 8, "TPU v2"),
}
PLATFORMS = ("gpu", "tpu", "cpu")
UNITS = {"": 1, "b": 1}
UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", start=1)}
UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", start=1)}


def find(name: str, memory: str) -> Device:
    """Returns the device called `name`; `memory`, where not "", replaces its own.

    Args:
      name: one of DEVICES; or a platform, of which nothing else is known.
      memory: "80GB", "24GiB", a number of bytes, or "".

    Raises:
      ValueError: no such device, or no such size.
    """
    names.choose("--device", name, [*DEVICES, *PLATFORMS])
    platform, gigabytes, kind = DEVICES.get(name, (name, None, ""))
    own = gigabytes * 1000**3 if gigabytes else None
    peak = metrics.peak_flops(kind) if kind else None
    return Device(platform, parse(memory) if memory else own, peak)


def parse(size: str) -> int:
    """Returns the bytes of "80GB" (powers of 1,000) or "24GiB" (of 1,024).

    Raises:
      ValueError: it is not such a size, or nothing.
    """
    match = re.fullmatch(r"(\d+\.?\d*)\s*([a-z]*)", size.strip().lower())
    unit = UNITS.get(match[2]) if match else None
    if match is None or unit is None or not float(match[1]):
        raise ValueError(f"--memory={size} is not a size such as 80GB or 24GiB")
    return int(float(match[1]) * unit)
