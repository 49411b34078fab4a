"""Compiled programs: the cache on disk, and compiling while something else runs."""

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import monitoring
from jax._src import compilation_cache  # what opens it has no public name

from gpt_jax import files

log = logging.getLogger(__name__)

_open_cache = compilation_cache.get_file_cache
SEAL = 64  # bytes of the digest behind a compiled program
HIT = "/jax/compilation_cache/cache_hits"
MISS = "/jax/compilation_cache/cache_misses"


def use_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, so that the next run starts sooner.

    What lies there is run, so a folder that others can write to is not used: one
    warning says so. A folder that is not there is made for this user alone. Entries
    that were damaged, or are of another CPU, are not run either: see `Checked`.
    """
    if not folder:
        return
    path, reason = _usable(folder)
    if reason:
        log.warning("compile_cache %s %s", path, reason)
        return
    compilation_cache.get_file_cache = _checked
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _usable(folder: str) -> tuple[str | Path, str]:
    """Returns where a folder is, made if need be; why it cannot be used, and a cure."""
    cure = "programs are compiled anew; set compile_cache to another folder"
    if files.is_address(folder):
        return folder, f"is an address, and has to be a folder of this machine: {cure}"
    try:
        path = files.expand(folder)
    except ValueError:
        return folder, f"needs a home folder, which nothing names: {cure}, or HOME"
    try:
        files.private_folder(path)
    except OSError as error:
        return path, f"cannot be made ({error.strerror}): {cure}"
    if not os.access(path, os.W_OK):
        return path, f"cannot be written to: {cure}"
    if others := files.open_to_others(path):
        return path, f"{others}: {cure}, or empty it and chmod 700 it"
    return path, ""


class Checked:
    """JAX's cache on the disk, whose entries are whole and of this CPU, or not used.

    JAX runs what lies there as it is: its entries have no checksum, and machine code
    for another CPU may end the process. Here a sha256 stands behind each of them, over
    it and its name, which says the CPU. One that is not as it was written is removed,
    and compiled again.

    It is what JAX calls a CacheInterface.
    """

    def __init__(self, base: Any, folder: str):
        """Args: JAX's own cache; where it is."""
        self._base, self._folder, self._path = base, Path(folder), base._path
        self._told: set[str] = set()

    def get(self, key: str) -> bytes | None:
        """Returns the compiled program of a key, None where there is none."""
        name = f"{key}-{self._machine}"
        entry = self._base.get(name)
        if entry is None:
            return None
        program, seal = entry[:-SEAL], entry[-SEAL:]
        if seal == _seal(name, program):
            return program
        with contextlib.suppress(OSError):
            self._file(name).unlink()
        self._tell(
            f"a compiled program in {self._folder} is not as it was written: it was "
            "removed and is compiled again"
        )
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a compiled program, as far as the disk lets it."""
        name = f"{key}-{self._machine}"
        try:  # whole: other processes read there
            files.write(self._file(name), value + _seal(name, value), durable=False)
        except OSError as error:
            self._tell(f"compiled programs are not kept in {self._folder}: {error}")

    @functools.cached_property
    def _machine(self) -> str:
        """The CPU, where programs are compiled for one; of others JAX knows enough."""
        return files.digest(files.cpu())[:8] if jax.default_backend() == "cpu" else ""

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}-cache"  # as JAX calls it

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            log.warning("%s", text)


def _checked(path: str) -> tuple[Any, str] | None:
    """Takes the place of what opens JAX's cache, which has no public hook."""
    found = _open_cache(path)
    # One whose size is bounded keeps accounts of its files: it stays as it is.
    if found is None or jax.config.jax_compilation_cache_max_size != -1:  # type: ignore[attr-defined]
        return found
    return Checked(found[0], path), found[1]


def _seal(name: str, program: bytes) -> bytes:
    return files.digest(name.encode() + program).encode()


def options_for_one_run(numbers: int) -> dict[str, int] | None:
    """Returns the compiler options of a program that makes `numbers` numbers, once.

    On a CPU the first weights of a small model take two seconds to compile and a
    hundredth of one to draw. Without LLVM's optimisation that is half a second, and
    drawing is five times as slow, which does not pay beyond ten million numbers.
    """
    if jax.default_backend() != "cpu" or numbers > 10_000_000:
        return None
    return {"xla_backend_optimization_level": 0}


class Program:
    """A jitted function that is compiled once, in the background if asked to.

    It tells when that begins. Its first call waits for it, and tells how long it took
    and whether the cache had it. Arguments of other shapes are compiled for when they
    first come.
    """

    def __init__(
        self,
        jitted: Any,
        name: str,
        tell: Callable[[str], None],
        ready: Callable[[], Any] = lambda: None,
    ):
        """Prepares to compile.

        Args:
          jitted: what to compile.
          name: what to call it.
          tell: is told when it is begun, and how long it took.
          ready: called once, when it is compiled.
        """
        self._jitted, self._name, self._tell = jitted, name, tell
        self._ready = ready
        self._compiled: Future | None = None
        self._run: Any = None
        self._shapes: list[tuple[int, ...]] = []

    def begin(self, *args: Any) -> None:
        """Starts to compile for arguments like these, beside whatever comes next."""
        self._tell(f"compiling {self._name}")
        began = time.monotonic()
        self._compiled, self._shapes = Future(), _shapes(args)
        work = (self._jitted.lower(*args), began, self._compiled)
        # An accelerator's compiler times its kernels: nothing may run beside it.
        if jax.default_backend() == "cpu":
            threading.Thread(target=_compile, args=work, name="compile").start()
        else:
            _compile(*work)

    def __call__(self, *args: Any) -> Any:
        """Runs the program."""
        if self._run is None:
            if self._compiled is None:
                self.begin(*args)
            assert self._compiled is not None
            self._run, seconds, event = self._compiled.result()
            self._compiled = None
            self._tell(_story(self._name, seconds, event))
            self._ready()
        if _shapes(args) != self._shapes:
            return self._jitted(*args)
        return self._run(*args)


def announced(
    function: Callable, text: str, tell: Callable[[str], None]
) -> Callable[..., Any]:
    """Returns a function that tells a line before its first call, which compiles."""
    left = [text]

    def call(*args: Any) -> Any:
        while left:
            tell(left.pop())
        return function(*args)

    return call


def _shapes(args: tuple) -> list[tuple[int, ...]]:
    return [jnp.shape(x) for x in jax.tree.leaves(args)]


def _compile(lowered: Any, began: float, result: Future) -> None:
    _watch()
    _heard.event = ""
    try:
        compiled = lowered.compile()
        result.set_result((compiled, time.monotonic() - began, _heard.event))
    except Exception as error:  # the edge of the thread: the caller raises it
        result.set_exception(error)


def _story(name: str, seconds: float, event: str) -> str:
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if event == HIT:
        return f"loaded {name} in {seconds:.1f} s: compiled before, kept in {folder}"
    kept = f", kept in {folder}" if event == MISS else ""
    return f"compiled {name} in {seconds:.1f} s{kept}"


_heard = threading.local()  # JAX reports in the thread that compiles


@functools.cache
def _watch() -> None:
    def hear(event: str, **_: Any) -> None:
        if event in (HIT, MISS):
            _heard.event = event

    monitoring.register_event_listener(hear)
