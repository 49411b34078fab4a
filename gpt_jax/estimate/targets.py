"""Devices that are not there, for which programs are compiled all the same.

JAX's compilers for TPUs and for NVIDIA GPUs need no device: a description of it does.

    target = targets.find("v5e-8")
    with targets.answers():
        ... a mesh of target.devices, jax.jit(...).lower(shapes).compile()
"""

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

from jax.experimental import topologies

from gpt_jax import names
from gpt_jax.devices import ACCELERATORS

# What the compilers' libraries read when they are loaded, so that they look for no
# device and print nothing of their own. A door sets it.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "-1",
}


class Kind(NamedTuple):
    """One kind of device, as far as models of time need it.

    Attributes:
      device: its name in `devices.ACCELERATORS`.
      link: bytes a second that it sends to its neighbours on one axis of the mesh.
      clock: cycles a second that a TPU's compiler counts in; 0 for a GPU.
      slices: by number of devices, the shape of a TPU's slice; none for a GPU.
    """

    device: str
    link: float
    clock: float
    slices: Mapping[int, str]

    @property
    def platform(self) -> str:
        """The platform: gpu or tpu."""
        return ACCELERATORS[self.device].platform

    @property
    def bandwidth(self) -> float:
        """Bytes a second that its memory is read with."""
        return ACCELERATORS[self.device].bandwidth


FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
CUBE |= {256: "4x8x8", 512: "8x8x8"}

# Sources: NVIDIA's data sheet of the H100 SXM (NVLink: half of 900 GB/s goes out), and
# Google Cloud's documentation of TPUs: bandwidth between chips, of which a slice of two
# dimensions gives an axis the half and one of three a third. A TPU's clock is its peak
# over what its matrix units do in a cycle (128 x 128 twice; on a v6e 256 x 256).
KINDS = {
    "v4": Kind("tpu-v4", 100e9, 1.05e9, {1: "1x1x1", **CUBE}),
    "v5e": Kind("tpu-v5e", 100e9, 1.5e9, {1: "1x1", **FLAT}),
    "v5p": Kind("tpu-v5p", 200e9, 1.75e9, {1: "1x1x1", **CUBE}),
    "v6e": Kind("tpu-v6e", 224e9, 1.75e9, {1: "1x1", **FLAT}),
    "h100": Kind("h100", 450e9, 0.0, {}),
}
NODE = 8  # GPUs that NVLink joins
NETWORK = 50e9  # bytes a second of one GPU to those of other machines: 400 Gb/s

# What XLA has to know of an H100 SXM. NVIDIA: "H100 Tensor Core GPU Architecture", and
# the CUDA C++ Programming Guide, compute capability 9.0.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 threads_per_warp: 32
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 85899345920 memory_bandwidth: 3352000000000
  l2_cache_size: 52428800
  name: "NVIDIA H100 80GB HBM3"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
CUDNN = 91200  # the version that this says, as JAX writes it
CAPABILITY = (9, 0)

# The package that holds a platform's compiler, and what installs it.
COMPILERS = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_plugins.xla_cuda13", "cuda13")}


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as the user calls them, v5e-8.
      kind: which kind.
      number: how many.
      devices: as a mesh takes them.
    """

    name: str
    kind: Kind
    number: int
    devices: list[Any]


def parse(name: str) -> tuple[Kind, int, int]:
    """Returns (kind, devices of a slice, slices) of a name such as v5e-8, 2xv5e-256.

    Raises:
      ValueError: no such kind, or no slice of that size.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name)
    if match is None or match[2] not in KINDS:
        word = match[2] if match else name.partition("-")[0]
        known = ", ".join(KINDS)
        near = "" if word in KINDS else names.did_you_mean(word, KINDS)
        raise ValueError(
            f"--device={name} is nothing to compile for: give one of {known} with the "
            f"number of devices behind it, such as v5e-8 or h100-8{near}"
        )
    kind, count, slices = KINDS[match[2]], int(match[3]), int(match[1] or 1)
    if kind.slices and count not in kind.slices:
        sizes = ", ".join(map(str, kind.slices))
        raise ValueError(
            f"--device={name}: there is no slice of {count} {match[2]}; sizes are "
            f"{sizes} (of chips, as JAX counts them)"
        )
    if count < 1 or slices < 1 or (slices > 1 and not kind.slices):
        raise ValueError(f"--device={name} is no number of devices")
    if not kind.slices and count > NODE and count % NODE:
        raise ValueError(
            f"--device={name}: GPUs come in machines of {NODE}; give a multiple of it"
        )
    return kind, count, slices


def find(name: str) -> Target:
    """Returns the devices called `name`: v5e-8, 2xv5e-256 (two slices), h100-64.

    Raises:
      ValueError: no such devices, or the package that compiles for them is not
        installed.
    """
    kind, count, slices = parse(name)
    if not installed(kind):
        _, extra = COMPILERS[kind.platform]
        raise ValueError(
            f"--device={name} needs XLA's compiler for it, which is not installed: pip "
            f'install -r requirements.txt "jax[{extra}]", best into an environment of '
            "its own"
        )
    made = _gpus(count) if kind.platform == "gpu" else _tpus(kind, count, slices)
    return Target(name, kind, count * slices, list(made))


def installed(kind: Kind) -> bool:
    """Returns whether the package that compiles for such devices is there."""
    module, _ = COMPILERS[kind.platform]
    with contextlib.suppress(ModuleNotFoundError):  # of the package that it is in
        return importlib.util.find_spec(module) is not None
    return False


def _tpus(kind: Kind, count: int, slices: int) -> Any:
    shape = kind.slices[count]
    flat = shape.count("x") == 1
    how: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    # A machine of a slice holds 4 chips, or all of a small one.
    small = {1: (1, 1, 1)} | ({8: (2, 4, 1)} if flat else {})
    how["chips_per_host_bounds"] = small.get(count, (2, 2, 1))
    if not flat:
        how["chip_config_name"] = "megacore"  # both cores of a chip as one device
    name = kind.device.removeprefix("tpu-")
    return topologies.get_topology_desc(
        f"{name}:{shape}", platform="tpu", **how
    ).devices


def _gpus(count: int) -> Any:
    machines = max(1, count // NODE)
    return topologies.get_topology_desc(
        topology_name="h100",
        platform="cuda",
        target_config=H100,
        topology=f"1x{machines}x{count // machines}",
    ).devices


@contextlib.contextmanager
def answers() -> Iterator[None]:
    """Tracing within may use cuDNN: JAX asks a GPU what it is, and here none is."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def version(word: str) -> tuple[int, ...]:
        return tuple(map(int, word.split(".")))

    replies = {
        "check_cudnn_version": lambda: CUDNN,
        "check_compute_capability": lambda asked: version(asked) <= CAPABILITY,
        "is_cuda_compute_capability_equal": lambda asked: version(asked) == CAPABILITY,
    }
    with mock.patch.multiple(cudnn, **replies):
        yield
