"""Every accelerator once: its speed, its memory, how fast that is read."""

import re
from typing import NamedTuple


class Accelerator(NamedTuple):
    """What is known of one JAX device; what a data sheet says of a whole chip.

    Attributes:
      platform: gpu or tpu; decides which attention is used.
      pattern: what `jax.Device.device_kind`, in lower case, has in it.
      flops: dense bfloat16 FLOP/s; data sheets often print the double, for sparse
        matrices. Of a T4 and a V100, which have no bfloat16, those of float16.
      gigabytes: of its memory, 10^9 bytes each.
      bandwidth: bytes a second that its memory is read with.
    """

    platform: str
    pattern: str
    flops: float
    gigabytes: float
    bandwidth: float


# By the names that --device knows. The first whose pattern fits is the one: the more
# special ones stand first. Sources: NVIDIA's data sheet of each GPU, and Google Cloud's
# documentation of TPUs ("peak compute per chip", "HBM capacity" and "HBM bandwidth",
# halved for v2 and v3, whose chips JAX shows as two devices).
ACCELERATORS = {
    "b200": Accelerator("gpu", r"b200", 2250e12, 180, 8.0e12),  # HGX B200, of 8
    "gh200": Accelerator("gpu", r"gh200", 989.5e12, 96, 4.0e12),
    "h200-nvl": Accelerator("gpu", r"h200 nvl", 835.5e12, 141, 4.8e12),
    "h200": Accelerator("gpu", r"h200", 989.5e12, 141, 4.8e12),
    "h100-nvl": Accelerator("gpu", r"h100 nvl", 835.5e12, 94, 3.9e12),
    "h100-pcie": Accelerator("gpu", r"h100 pcie", 756e12, 80, 2.0e12),
    "h100": Accelerator("gpu", r"h100", 989.5e12, 80, 3.35e12),  # SXM
    "a100-40gb": Accelerator("gpu", r"a100.*40gb", 312e12, 40, 1.555e12),
    "a100-80gb": Accelerator("gpu", r"a100", 312e12, 80, 2.039e12),  # SXM
    "l40s": Accelerator("gpu", r"l40s", 362.05e12, 48, 0.864e12),
    "l4": Accelerator("gpu", r"\bl4\b", 121e12, 24, 0.3e12),
    "a10g": Accelerator("gpu", r"a10g", 70e12, 24, 0.6e12),
    "a10": Accelerator("gpu", r"\ba10\b", 125e12, 24, 0.6e12),
    "t4": Accelerator("gpu", r"\bt4\b", 65e12, 16, 0.3e12),
    "v100-16gb": Accelerator("gpu", r"v100.*16gb", 125e12, 16, 0.9e12),
    "v100-32gb": Accelerator("gpu", r"v100", 125e12, 32, 0.9e12),  # SXM2
    "tpu-v6e": Accelerator("tpu", r"tpu ?v6", 918e12, 32, 1.638e12),  # "TPU v6 lite"
    "tpu-v5e": Accelerator("tpu", r"tpu ?v5 ?(lite|e)", 197e12, 16, 0.819e12),
    "tpu-v5p": Accelerator("tpu", r"tpu ?v5", 459e12, 95, 2.765e12),  # also "TPU v5"
    "tpu-v4": Accelerator("tpu", r"tpu ?v4", 275e12, 32, 1.228e12),
    "tpu-v3": Accelerator("tpu", r"tpu ?v3", 61.5e12, 16, 0.45e12),
    "tpu-v2": Accelerator("tpu", r"tpu ?v2", 22.5e12, 8, 0.35e12),
}


def of_kind(device_kind: str) -> Accelerator | None:
    """Returns what is known of a device by its `jax.Device.device_kind`.

    None for a CPU and for a device that the table does not hold.
    """
    kind = device_kind.lower()
    known = ACCELERATORS.values()
    return next((found for found in known if re.search(found.pattern, kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of a device, None where it is not known."""
    found = of_kind(device_kind)
    return found.flops if found else None
