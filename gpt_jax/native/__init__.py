"""Kernels in C++ for a CPU, compiled once and kept, where a compiler is found.

XLA calls them (jax.ffi): product.cc multiplies weights of few bits, attend.cc reads a
cache. Whoever uses one has something else for where there is none; see `ready`.
"""

import ctypes
import functools
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import files, mesh

log = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.cc"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
PREFIX = ""  # of the names by which JAX knows them
PRODUCT, ATTENTION = "gpt_jax_product", "gpt_jax_attention"
LANES = 16  # numbers that are computed at once
FOLDER = "~/.cache/gpt_jax/kernels"
COMPILERS = ("c++", "g++", "clang++")
# JAX's headers warn of themselves.
FLAGS = ("-std=c++20", "-O3", "-w", "-fPIC", "-shared")
# All of this CPU's instructions, as compilers call that; or what every such CPU has.
MACHINES = ("-march=native", "-mcpu=native", "")
LONGEST_S = 300.0  # of compiling, which takes a few seconds


def ready() -> bool:
    """Returns whether programs that are traced now can call kernels.

    They can on a CPU where a compiler is found; kernels are compiled first if need be.
    """
    return mesh.platform() == "cpu" and not missing()


def product(x_ND, codes, scales, offsets, *, bits: int, outputs: int):
    """Returns float32 x @ weights [N, outputs]; see `quantised.product`."""
    like = jax.ShapeDtypeStruct((len(x_ND), outputs), jnp.float32)
    call = jax.ffi.ffi_call(PREFIX + PRODUCT, like, vmap_method="sequential")
    return call(x_ND, codes, scales, offsets, bits=np.int64(bits))


def attends(cfg: Any) -> bool:
    """Returns whether `attention` can read the cache of a model (a `GPTConfig`)."""
    return cfg.head_dim % LANES == 0 and cfg.dtype == "float32" and ready()


def attention(q_BTHK, past: Sequence[Any], place_BT, *, window: int, scale, softcap):
    """Returns float32 attention [B, T, H, K] of queries over a cache.

    Args:
      q_BTHK: float32; K a multiple of LANES.
      past: the cache: keys and values [B, G, S, K], float32, bfloat16 or int8, and what
        those of int8 are multiplied by, float32 [B, G, S, 1]; else None twice.
      place_BT: int, each query's place in it, of which it sees itself and those before.
      window: how many of the nearest it sees; 0 = all.
      scale: of the scores.
      softcap: cap * tanh(score / cap); 0 = off.
    """
    like = jax.ShapeDtypeStruct(q_BTHK.shape, jnp.float32)
    place_BT = jnp.broadcast_to(place_BT, q_BTHK.shape[:2]).astype(jnp.int32)
    call = jax.ffi.ffi_call(PREFIX + ATTENTION, like, vmap_method="sequential")
    how = {"window": np.int64(window), "softcap": np.float32(softcap)}
    none = jnp.zeros(0, jnp.float32)
    past = [none if x is None else x for x in past]
    return call(q_BTHK, *past, place_BT, scale=np.float32(scale), **how)


@functools.cache
def missing() -> str:
    """Returns why there are no kernels here; "" where there are."""
    try:
        library = _loaded()
        found = {name: getattr(library, name) for name in (PRODUCT, ATTENTION)}
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError) as error:
        return str(error)
    for name, function in found.items():
        capsule = jax.ffi.pycapsule(function)
        jax.ffi.register_ffi_target(PREFIX + name, capsule, platform="cpu")
    return ""


def _loaded() -> ctypes.CDLL:
    """Returns the library; one that is damaged is made again."""
    path = _built()
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink()
        return ctypes.CDLL(str(_built()))


def _built() -> Path:
    """Returns the library, compiled for this CPU, these sources and this jaxlib.

    Raises:
      ValueError: there is no compiler, or it failed.
    """
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    known = [*FLAGS, *MACHINES, *texts, files.cpu(), metadata.version("jaxlib")]
    path = _folder() / f"kernels-{files.digest(chr(10).join(known))[:16]}.so"
    if not path.is_file():
        files.write(path, _compiled(), durable=False)
    return path


def _folder() -> Path:
    """Returns where libraries are kept: what lies there is run, so it is private."""
    path = files.expand(FOLDER)
    files.private_folder(path)
    if others := files.open_to_others(path):
        raise ValueError(f"{path} {others}; empty it and chmod 700 it")
    return path


def _compiled() -> bytes:
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise ValueError(f"no C++ compiler was found ({', '.join(COMPILERS)})")
    log.info("compiling kernels in C++: once, a few seconds ...")
    said = ""
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        made = Path(folder) / "kernels.so"
        for machine in MACHINES:
            command = [found, *FLAGS, *filter(None, [machine])]
            command += ["-I", jax.ffi.include_dir(), *map(str, SOURCES)]
            done = subprocess.run(
                [*command, "-o", str(made)],
                **{"capture_output": True, "text": True, "timeout": LONGEST_S},
            )
            if done.returncode == 0:
                return made.read_bytes()
            said = done.stderr.strip()
    raise ValueError(f"{found} does not compile the kernels: {said[-300:]}")
