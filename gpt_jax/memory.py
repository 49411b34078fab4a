"""How much memory a process may still take, where a container or a job limits it.

The machine's own figure says nothing there: a process that takes more than its control
group may is killed, and nobody tells it why. So what would need more is refused before
it is compiled or read, in one sentence (`too_large`).
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from gpt_jax.screen import size

UNLIMITED = 2.0**60  # version 1 writes a number near 2^63 for "no limit"
# Where the limit, what is used, and how much of that are files that can be dropped are
# written, of control groups version 2 and 1.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def left(root: Path = Path("/")) -> float:
    """Returns the bytes that this process's control groups leave it; inf = no limit.

    A group is limited by those above it too. `root` is another one in tests.
    """
    return min((_of_group(*place) for place in _groups(root)), default=math.inf)


def of_machine() -> float:
    """Returns the bytes of the machine's memory that programs could still have."""
    return psutil.virtual_memory().available


def of_process() -> float:
    """Returns the bytes that this process may still take."""
    return min(left(), of_machine())


def of_device(device: Any) -> float:
    """Returns the free bytes of a JAX device; of a CPU, what a process may still take.

    Likewise of a device that does not say.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return of_process()


def too_large(what: str, free: float, cure: str) -> ValueError:
    """Returns the error, one sentence, of what needs more bytes than are free.

    Args:
      what: that, and how many it needs.
      free: bytes.
      cure: what would fit.
    """
    return ValueError(f"{what}; {size(max(0.0, free))} are free; {cure}")


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yields the folders of this process's groups and of those above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0":
            top, names = root / "sys/fs/cgroup", V2
        elif "memory" in kinds.split(","):
            top, names = root / "sys/fs/cgroup/memory", V1
        else:
            continue
        # Inside a container the path may be the one outside: its own group is the top.
        own = top / path.strip("/")
        own = own if (own / names[1]).is_file() else top
        yield own, names
        yield from (
            (above, names) for above in own.parents if above.is_relative_to(top)
        )


def _of_group(folder: Path, names: tuple[str, str, str]) -> float:
    limit, used, files = names
    with contextlib.suppress(OSError, ValueError, KeyError):
        most = (folder / limit).read_text().strip()
        if most == "max" or float(most) >= UNLIMITED:
            return math.inf
        stat = (folder / "memory.stat").read_text().splitlines()
        dropped = float(dict(line.split() for line in stat)[files])
        taken = float((folder / used).read_text()) - dropped
        return max(0.0, float(most) - taken)
    return math.inf
