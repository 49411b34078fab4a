"""What the machine is and what it can do at most: the ceilings of the roofline."""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments.benches.worker import Side, Worker, timed, versions
from gpt_jax.files import cores


def measure(*, matmul: int, copy_mb: int, tries: int):
    """Is a side: its facts are the machine's names and numbers, `go` is not used.

    Args:
      matmul: the width of the square matrices.
      copy_mb: MB that are copied.
      tries: the best of so many counts.

    The facts: platform (cpu, gpu, ...), device, gflops (a float32 matmul with all
    cores; bfloat16 on a GPU), gbytes_s (a copy with all cores, reads and writes
    counted), cores, memory_gb, python, versions.
    """
    import jax

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    facts = {
        "platform": device.platform,
        "device": cpu_name() if on_cpu else device.device_kind,
        "gflops": matmul_gflops(matmul, "float32" if on_cpu else "bfloat16", tries),
        "gbytes_s": (copy_gbytes if on_cpu else device_copy_gbytes)(copy_mb, tries),
        "cores": cores(),
        "memory_gb": round(memory_gb(), 1),
        "python": platform.python_version(),
        "versions": versions(),
    }
    return lambda: {"value": facts["gflops"]}, facts


def cpu_name() -> str:
    """Returns the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return named[0] if named else platform.processor() or platform.machine()


def memory_gb() -> float:
    """Returns the machine's memory in GB (10^9 bytes)."""
    if sys.platform == "win32":
        return 0.0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def matmul_gflops(width: int, dtype: str, tries: int) -> float:
    """Returns the rate of a square matrix product, 2 width^3 FLOPs."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((width, width), dtype)
    product = jax.jit(jnp.matmul)
    repeats = 1 if jax.devices()[0].platform == "cpu" else 20  # hides the launch
    jax.block_until_ready(product(x, x))

    def work():
        jax.block_until_ready([product(x, x) for _ in range(repeats)])

    return repeats * 2 * width**3 / min(timed(work) for _ in range(tries)) / 1e9


def copy_gbytes(megabytes: int, tries: int) -> float:
    """Returns the rate of copying memory with one thread per core, counted twice."""
    import numpy as np

    n = cores()
    size = megabytes * 10**6 // n
    pairs = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(n)]
    with ThreadPoolExecutor(n) as pool:

        def work():
            list(pool.map(lambda pair: np.copyto(*pair), pairs))

        return 2 * n * size / min(timed(work) for _ in range(tries)) / 1e9


def device_copy_gbytes(megabytes: int, tries: int) -> float:
    """Returns the rate at which an accelerator copies its own memory, counted twice."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(megabytes * 10**6 // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))

    def work():
        jax.block_until_ready([copy(x) for _ in range(20)])

    return 20 * 2 * x.nbytes / min(timed(work) for _ in range(tries)) / 1e9


def ceilings(*, toy: bool, limit_s: float) -> dict[str, Any]:
    """Returns the facts of `measure`, from a process of its own."""
    sizes = {"matmul": 128, "copy_mb": 1, "tries": 1}
    full = {"matmul": 4096, "copy_mb": 512, "tries": 5}
    side = Side("the machine", f"{__name__}:measure", sizes if toy else full)
    with Worker(side, limit_s=limit_s) as worker:
        return worker.facts
