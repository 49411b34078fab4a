"""product.cc, compiled for this CPU once and kept, where a C++ compiler is found."""

import ctypes
import functools
import logging
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path

import jax

from gpt_jax import files

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("product.cc")
TARGET = "gpt_jax_quantised_product"
FOLDER = "~/.cache/gpt_jax/kernels"
COMPILERS = ("c++", "g++", "clang++")
# JAX's headers warn of themselves.
FLAGS = ("-std=c++20", "-O3", "-w", "-fPIC", "-shared")
# All of this CPU's instructions, as compilers call that; or what every such CPU has.
MACHINES = ("-march=native", "-mcpu=native", "")
LONGEST_S = 300.0  # of compiling, which takes a few seconds


@functools.cache
def ready() -> bool:
    """Returns whether JAX can call the kernel; compiles it first if need be.

    One warning says why it cannot.
    """
    try:
        library = _built()
        found = getattr(ctypes.cdll.LoadLibrary(str(library)), TARGET)
    except (OSError, ValueError, AttributeError) as error:
        log.warning(
            "weights of few bits are multiplied by JAX itself, which is slower than "
            "without --bits: %s",
            error,
        )
        return False
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(found), platform="cpu")
    return True


def _built() -> Path:
    """Returns the library, compiled for this CPU, this source and this jaxlib.

    Raises:
      ValueError: there is no compiler, or it failed.
    """
    text = SOURCE.read_text(encoding="utf-8")
    key = files.digest(
        "\n".join([*FLAGS, text, files.cpu(), metadata.version("jaxlib")])
    )[:16]
    path = _folder() / f"product-{key}.so"
    if not path.is_file():
        compiled = _compiled()
        files.write(path, compiled, durable=False)
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
    log.info("compiling the product of weights of few bits: once, a few seconds ...")
    said = ""
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        made = Path(folder) / "product.so"
        for machine in MACHINES:
            command = [found, *FLAGS, *filter(None, [machine])]
            command += ["-I", jax.ffi.include_dir(), str(SOURCE), "-o", str(made)]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LONGEST_S
            )
            if done.returncode == 0:
                return made.read_bytes()
            said = done.stderr.strip()
    raise ValueError(f"{found} does not compile {SOURCE.name}: {said[-300:]}")
