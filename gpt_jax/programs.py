"""Compiled programs: the cache on disk, and compiling while something else runs."""

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

log = logging.getLogger(__name__)

HIT = "/jax/compilation_cache/cache_hits"
MISS = "/jax/compilation_cache/cache_misses"


def use_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, so that the next run starts sooner.

    What lies there is run as it is, so a folder that others can write to is not used:
    one warning says so. A folder that is not there is made for this user alone.
    """
    if not folder:
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        reason = fault(path)
    except OSError as error:
        reason = f"cannot be made ({error.strerror})"
    if reason:
        log.warning(
            "compile_cache %s %s: programs are compiled anew; empty it and chmod 700 "
            "it, or set compile_cache to another folder",
            path,
            reason,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def fault(path: Path) -> str:
    """Returns why others can write to a folder, so that it is not used; "" = not."""
    if not hasattr(os, "getuid"):  # Windows: a user's folders are the user's own
        return ""
    found = path.stat()
    if found.st_uid != os.getuid():
        return f"belongs to another user (id {found.st_uid})"
    if found.st_mode & 0o022:
        return f"can be written to by others (mode {found.st_mode & 0o777:o})"
    return ""


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

    Its first call waits for that, and tells how long it took and whether the cache
    had it. Arguments of other shapes are compiled for when they first come.
    """

    def __init__(self, jitted: Any, name: str, tell: Callable[[str], None]):
        """Args: what to compile; what to call it; who is told the one line."""
        self._jitted, self._name, self._tell = jitted, name, tell
        self._compiled: Future | None = None
        self._run: Any = None
        self._shapes: list[tuple[int, ...]] = []

    def begin(self, *args: Any) -> None:
        """Starts to compile for arguments like these, beside whatever comes next."""
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
        if _shapes(args) != self._shapes:
            return self._jitted(*args)
        return self._run(*args)


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
