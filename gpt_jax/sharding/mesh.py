"""Meshes: how many devices, and which of them stand beside each other."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gpt_jax import files
from gpt_jax.mesh import AXES

MAX_CPU_DEVICES = 8  # more host devices than this only add overhead


def set_cpu_devices(
    micro_batch: int,
    *,
    data: int,
    fsdp: int,
    tensor: int,
    cpu_devices: int,
    processes: int = 1,
) -> None:
    """Asks XLA for one CPU device per core, before JAX starts its backend.

    Element-wise work of XLA:CPU runs on one core per device, so data parallelism over
    the cores of one machine pays. The number is the largest divisor of `micro_batch`
    that is at most the number of usable cores and 8. Without effect when a backend
    runs already or when the platform is not a CPU.

    Args:
      micro_batch: examples in one micro-batch; 0 = none that devices would share.
      data, fsdp, tensor: the axes of the mesh; data -1 = choose.
      cpu_devices: the number to use in this process; 0 = choose.
      processes: how many processes share the mesh.
    """
    limit = min(files.cores(), MAX_CPU_DEVICES)
    chosen = 1
    if fsdp * tensor == 1:
        chosen = processes * _largest_divisor(micro_batch // processes, limit)
    all_of_them = max(data, chosen) * fsdp * tensor
    count = cpu_devices or math.ceil(all_of_them / processes)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend runs: its devices are used as they are
        return


def make_mesh(
    micro_batch: int, *, data: int, fsdp: int, tensor: int, cpu_devices: int
) -> Mesh:
    """Returns the mesh of devices, over all processes of the run.

    Args:
      micro_batch: examples in one micro-batch, which must divide over data x fsdp;
        0 = none that devices would share.
      data: devices along the data axis; -1 = all that are left (on a CPU: as many as
        divide `micro_batch`).
      fsdp: devices over which parameters are split, and examples too.
      tensor: devices over which matrices are split.
      cpu_devices: at most so many devices of a process on a CPU; 0 = all.

    Raises:
      ValueError: the axes ask for more devices than there are, or (with several
        processes) for fewer, or the batch does not divide.
    """
    check_axes(data=data, fsdp=fsdp, tensor=tensor, cpu_devices=cpu_devices)
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    if on_cpu and cpu_devices:
        devices = [d for d in devices if _number_in_process(d, devices) < cpu_devices]
    axes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    found = lengths(micro_batch, len(devices), on_cpu=on_cpu, **axes)
    if jax.process_count() > 1 and math.prod(found) < len(devices):
        raise ValueError(
            f"mesh.data {found[0]} x fsdp {fsdp} x tensor {tensor} takes "
            f"{math.prod(found)} of {len(devices)} devices, but the processes of a "
            "run use all that they have: make batch_size / accumulate a multiple of "
            f"{len(devices) // tensor}, or begin with fewer devices"
        )
    return arranged(found, devices[: math.prod(found)])


def arranged(axes: tuple[int, int, int], devices: Sequence[Any]) -> Mesh:
    """Returns the mesh of these devices, neighbours on it near each other in fact.

    Of several slices of TPUs, which a slower network joins, the data axis goes from
    slice to slice, or `fsdp` where it does not divide. Devices that make no grid (some
    of a slice's) stand in their order.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    outer = [1, 1, 1]
    if slices > 1:
        crossing = next((i for i in (0, 1) if axes[i] % slices == 0), None)
        if crossing is None:
            raise ValueError(
                f"mesh.data {axes[0]} and mesh.fsdp {axes[1]} are no multiples of the "
                f"{slices} slices: one of them must go from slice to slice"
            )
        outer[crossing] = slices
    inner = [length // times for length, times in zip(axes, outer, strict=True)]
    try:
        if slices > 1:
            grid = mesh_utils.create_hybrid_device_mesh(
                inner, outer, devices, allow_split_physical_axes=True
            )
        else:
            grid = mesh_utils.create_device_mesh(
                axes, devices, allow_split_physical_axes=True
            )
    # Of a part of a slice it says so by any of these.
    except (ValueError, NotImplementedError, AssertionError):
        grid = np.array(devices).reshape(axes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def lengths(
    micro_batch: int, devices: int, *, on_cpu: bool, data: int, fsdp: int, tensor: int
) -> tuple[int, int, int]:
    """Returns how long the axes of a mesh of so many devices are.

    Says what `data` -1 means, and whether all fit; arguments and errors are those of
    `make_mesh`.
    """
    if data == -1:
        left = devices // (fsdp * tensor)
        data = _largest_divisor(micro_batch // fsdp, left) if on_cpu else max(1, left)
    if data * fsdp * tensor > devices:
        raise ValueError(
            f"mesh.data {data} x fsdp {fsdp} x tensor {tensor} asks for "
            f"{data * fsdp * tensor} devices but there are {devices}"
        )
    if micro_batch % (data * fsdp):
        raise ValueError(
            f"a micro-batch of {micro_batch} examples does not divide over "
            f"{data * fsdp} devices (mesh.data {data} x fsdp {fsdp}): make batch_size "
            "/ accumulate a multiple of it, or set mesh.data"
        )
    return data, fsdp, tensor


def check_axes(*, data: int, fsdp: int, tensor: int, cpu_devices: int) -> None:
    """Raises ValueError for axes that no mesh has."""
    for name, axis in {"fsdp": fsdp, "tensor": tensor}.items():
        if axis < 1:
            raise ValueError(f"mesh.{name} is {axis}: it must be at least 1")
    if data == 0 or data < -1:
        raise ValueError(
            f"mesh.data is {data}: give a number of devices, or -1 for all"
        )
    if cpu_devices < 0:
        raise ValueError(f"mesh.cpu_devices is {cpu_devices}: 0 is all of them")


def _number_in_process(device: Any, devices: list) -> int:
    """Returns how many devices of its process come before a device."""
    mine = [d for d in devices if d.process_index == device.process_index]
    return mine.index(device)


def _largest_divisor(n: int, limit: int) -> int:
    return max(d for d in range(1, max(1, limit) + 1) if n % d == 0)
