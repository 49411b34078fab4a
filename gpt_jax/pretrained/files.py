"""safetensors files: a JSON header, then the numbers of every tensor; never code.

    bytes 0 to 7      the length of the header, little-endian
    the header        {"name": {"dtype", "shape", "data_offsets": [start, end]}, ...}
    the rest          the tensors, without gaps, offsets counted from here

The header is checked whole before a number is read; tensors are then read one at a
time through memory maps of their own, so a file of any size costs one tensor.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from gpt_jax.files import read_json

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
}
# Of tensors that are skipped (masks, say) only the size matters.
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2}
BYTES |= {"BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1}

LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Tensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
      path: its file.
      kind: its dtype, as the header spells it.
      shape: its shape.
      start: the byte of the file at which it begins.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        """Returns the tensor as a memory map of its own, gone with the array."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, DTYPES[self.kind])
        return np.memmap(
            self.path, DTYPES[self.kind], "r", offset=self.start, shape=self.shape
        )


def tensors(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of a folder's model.safetensors, in one file or several.

    Raises:
      ValueError: there is no such file, or one is not as the format wants it; the
        sentence names the file and, where there is one, the tensor.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return header(folder / SINGLE)
        raise ValueError(_no_weights(folder))
    homes = _index(index)
    found: dict[str, Tensor] = {}
    for name in sorted(set(homes.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{index} names {name}, which is not in {folder}")
        part = header(folder / name)
        if twice := sorted(part.keys() & found.keys()):
            raise ValueError(f"tensor {twice[0]} is in two files of {folder}")
        found |= part
    for name, home in homes.items():
        if name not in found or found[name].path.name != home:
            raise ValueError(
                f"tensor {name} is not in {folder / home}, as {INDEX} says"
            )
    return found


def header(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of one file, after checking that they fill it exactly.

    Raises:
      ValueError: see `tensors`.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise ValueError(
                f"{path} is not a safetensors file, or it is cut short: its header "
                f"should have {length:,} bytes and the file has {size:,}"
            )
        text = file.read(length)
    try:
        table = json.loads(text, object_pairs_hook=_no_twins)
        if not isinstance(table, dict):
            raise ValueError("its header is not a JSON object")
        table.pop("__metadata__", None)
        rows = {name: _row(name, entry) for name, entry in table.items()}
    except (ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a safetensors file: {reason}") from error
    _check_filled(path, rows, size - 8 - length)
    return {
        name: Tensor(path, kind, shape, 8 + length + start)
        for name, (kind, shape, start, _) in rows.items()
    }


def write(
    path: Path,
    wanted: Mapping[str, tuple[str, tuple[int, ...]]],
    value: Callable[[str], np.ndarray],
) -> None:
    """Writes one file, one tensor in memory at a time.

    Args:
      path: the file.
      wanted: (dtype as in DTYPES, shape) by name.
      value: returns the tensor of a name.
    """
    # The format wants every tensor aligned to its numbers: wide ones go first.
    names = sorted(wanted, key=lambda name: (-BYTES[wanted[name][0]], name))
    table, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        kind, shape = wanted[name]
        start, end = end, end + math.prod(shape) * BYTES[kind]
        entry = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
        table[name] = entry
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.ascontiguousarray(value(name), DTYPES[wanted[name][0]])
            assert array.shape == wanted[name][1], f"{name} has shape {array.shape}"
            file.write(array.reshape(-1).view(np.uint8).data)


def kind_of(dtype: np.dtype) -> str:
    """Returns how the format spells a dtype."""
    return next(kind for kind, known in DTYPES.items() if known == dtype)


def _row(name: str, entry) -> tuple[str, tuple[int, ...], int, int]:
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name} has no dtype, shape or place") from error
    if kind not in BYTES:
        raise ValueError(f"tensor {name} has the unknown dtype {kind!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"tensor {name} has a shape or place that is not of numbers")
    if end - start != math.prod(shape) * BYTES[kind]:
        raise ValueError(
            f"tensor {name} has {end - start:,} bytes, but shape {shape} of {kind} "
            f"needs {math.prod(shape) * BYTES[kind]:,}"
        )
    return kind, shape, start, end


def _check_filled(path: Path, rows: Mapping, size: int) -> None:
    """Raises unless the tensors stand one behind the other and fill `size` bytes."""
    reached, before = 0, "the header"
    for name, (_, _, start, end) in sorted(rows.items(), key=lambda row: row[1][2:]):
        if start != reached:
            what = "overlaps" if start < reached else "leaves a gap behind"
            raise ValueError(f"{path}: tensor {name} {what} {before}")
        if end > size:
            raise ValueError(
                f"{path} is cut short: tensor {name} ends at byte {end:,} of the data, "
                f"which has {size:,}"
            )
        reached, before = end, name
    if reached != size:
        raise ValueError(f"{path} has {size - reached:,} bytes behind its last tensor")


def _no_twins(pairs: Iterable[tuple[str, object]]) -> dict:
    found: dict = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} stands twice in the header")
        found[key] = value
    return found


def _index(path: Path) -> dict[str, str]:
    """Returns the file of every tensor, as an index says."""
    homes = read_json(path).get("weight_map")
    if not isinstance(homes, dict) or not homes:
        raise ValueError(f"{path} has no weight_map")
    for name, home in homes.items():
        # A name from a stranger must not lead out of the folder.
        if not isinstance(home, str) or Path(home).name != home:
            raise ValueError(f"{path}: the file of tensor {name} is {home!r}")
    return homes


def _no_weights(folder: Path) -> str:
    suffixes = (".bin", ".pt", ".pth", ".ckpt")
    names = sorted(p.name for p in folder.iterdir() if p.suffix in suffixes)
    if names:
        return (
            f"{folder} has {names[0]} but no {SINGLE}: pickle files can run code and "
            "are not read; save the model as safetensors"
        )
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} holds an adapter (adapter_config.json), not a model: merge it "
            "into its base with peft's merge_and_unload, and import that folder"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}"
