"""Trees as tables of leaves: their digest, and what differs between two."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather


def digest(tree: Any) -> str:
    """Returns the sha256 over path, dtype, shape and bytes of every leaf, sorted."""
    total = hashlib.sha256()
    for name, leaf in sorted(named(tree), key=lambda pair: pair[0]):
        value = np.ascontiguousarray(_whole(leaf))
        total.update(f"{name} {value.dtype} {np.shape(leaf)}\n".encode())
        total.update(value.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def difference(wanted: Mapping, found: Mapping) -> list[str]:
    """Returns one line for every leaf that is not the same in two tables of leaves."""
    lines = []
    for name in sorted({*wanted, *found}):
        if name not in found:
            lines.append(f"{name}: wanted {_shown(wanted[name])}, but absent")
        elif name not in wanted:
            lines.append(f"{name}: not wanted, found {_shown(found[name])}")
        elif wanted[name] != found[name]:
            lines.append(
                f"{name}: wanted {_shown(wanted[name])}, found {_shown(found[name])}"
            )
    return lines


def check_same(wanted: Any, found: Any) -> None:
    """Raises ValueError, naming the leaves, unless two trees agree in all shapes."""
    refuse_other("these weights are", leaves(wanted), leaves(found))


def refuse_other(what: str, wanted: Mapping, found: Mapping) -> None:
    """Raises ValueError, naming the first ten leaves that differ in two tables."""
    if lines := difference(wanted, found):
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        text = "\n  ".join(lines[:10] + more)
        raise ValueError(f"{what} of another model:\n  {text}")


def leaves(tree: Any) -> dict[str, list]:
    """Returns the table of a tree: [shape, dtype] by path, as the manifest has it."""
    found = named(tree)
    for name, leaf in found:
        if not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{name} is {leaf!r}, not an array; wrap it in jnp.asarray"
            )
    return {name: [list(x.shape), str(x.dtype)] for name, x in found}


def named(tree: Any) -> list[tuple[str, Any]]:
    """Returns the leaves of a tree by their paths."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in paths
    ]


def _whole(leaf: Any) -> Any:
    """Returns an array, gathered on the host where other processes hold some of it."""
    spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return process_allgather(leaf, tiled=True) if spread else leaf


def _shown(leaf: list) -> str:
    return f"{tuple(leaf[0])} {leaf[1]}"
