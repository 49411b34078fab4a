"""Opening runs under their names, listening, leaving in good order."""

import asyncio
import contextlib
import hashlib
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax import chat, commands, microscope, model, runs, signals
from gpt_jax.serve.engine import Engine
from gpt_jax.serve.flow import Mail, Served
from gpt_jax.serve.http import Service, application
from gpt_jax.serve.numbers import Numbers
from gpt_jax.serve.wire import Limits

LOOKED_AT = 64  # tokens of a prompt under the microscope: seconds, and few megabytes
TICK = 0.05  # seconds between two looks at whether to leave
# The engine waits for the event loop's Python at most so long; by default it is 5 ms,
# more than a decode step of a small model.
SWITCH = 0.0005


def need_packages() -> None:
    """Raises ValueError unless all that serving needs is installed."""
    needed = {"fastapi": "fastapi", "uvicorn": "uvicorn"}
    needed["prometheus_client"] = "prometheus-client"
    missing = [name for module, name in needed.items() if not find_spec(module)]
    if missing:
        raise ValueError(
            f"serving needs {' and '.join(missing)}: "
            f"{commands.install(*needed.values())}"
        )


def named(folders: Sequence[str]) -> dict[str, Path]:
    """Returns run folders by their own names.

    Raises:
      ValueError: there is none, or two have one name.
    """
    paths: dict[str, Path] = {}
    for folder in filter(None, (folder.strip() for folder in folders)):
        path = Path(folder).resolve()
        if path.name in paths:
            raise ValueError(
                f"{folder} and {paths[path.name]} would both be served as "
                f"{path.name!r}; rename one folder"
            )
        paths[path.name] = path
    if not paths:
        raise ValueError("no run to serve; name one, as in --runs=runs/quickstart")
    return paths


def open_runs(
    paths: Mapping[str, Path],
    *,
    step: int | str | None,
    weights: str,
    sizes: Sequence[int],
    queue: int,
) -> dict[str, Served]:
    """Returns the models of run folders, their engines not yet started.

    Weights that are equal in several of them are held once: of LoRA runs over one base
    all but the adapters, which then stay beside the kernels (a run that is served alone
    has its adapter merged).

    Args:
      paths: run folders by name.
      step, weights: as in `runs.open`.
      sizes, queue: as in `Engine`.

    Raises:
      ValueError: a folder is not a run, or not one of a model that writes.
    """
    held: dict[tuple, Any] = {}
    served, alone = {}, len(paths) == 1
    for name, path in paths.items():
        run = runs.open(path, step=step, weights=weights, merge=alone)
        if run.model.cfg.n_classes:
            raise ValueError(
                f"{path} sorts texts into classes and cannot write; use "
                f"{commands.typed('classify')}"
            )
        template = _template(path, run.tokenizer)
        engine = Engine(
            model=run.model,
            params=run.params,
            tokenizer=run.tokenizer,
            sizes=sizes,
            queue=queue,
            **({} if alone else {"share": partial(share, held=held)}),
        )
        facts = {
            "created": int((path / "config.json").stat().st_mtime),
            "context_length": run.model.cfg.context_length,
            "parameters": model.count(run.model.cfg),
            "vocab_size": run.model.cfg.vocab_size,
            "step": run.step,
        }
        served[name] = Served(
            engine, template, facts, partial(_look, path, run.step, weights)
        )
    return served


def _look(path: Path, step: int, weights: str, prompt: str, against: str) -> str:
    """Returns the page of the microscope; the weights are read for it, and let go."""
    found = microscope.look(
        path,
        [prompt],
        against=against,
        step=step,
        weights=weights,
        history=False,
        at_most=LOOKED_AT,
    )
    # Where a run lies on this machine is nothing that clients need to know.
    return microscope.page.make(found._replace(name=path.name))[0]


def _template(path: Path, tokenizer) -> str | None:
    """Returns the chat template of a run, if it has one and one that works."""
    template = chat.template_of(path)
    try:
        if template is not None:
            chat.check(template)
            chat.stop_ids(tokenizer, template)
    except ValueError as error:
        raise ValueError(f"{path} has a chat template, but {error}") from None
    return template


def share(params, held: dict[tuple, Any]):
    """Returns the same weights, those that `held` has already being the same arrays."""

    def one(leaf):
        data = np.asarray(leaf)
        key = (data.shape, str(data.dtype), hashlib.sha256(data.tobytes()).digest())
        return held.setdefault(key, leaf)

    return jax.tree.map(one, params)


@dataclass(frozen=True)
class Place:
    """Where to listen and how.

    Attributes:
      host: an address; what listens on another than 127.0.0.1 can be reached.
      port: 0 takes a free one.
      key: the API key that clients must show; "" = none.
      grace_s: seconds that running requests may go on when the server leaves.
    """

    host: str
    port: int
    key: str
    grace_s: float

    @property
    def local(self) -> bool:
        """Whether only this machine can ask."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class Stop:
    """How often the server was told to leave; SIGTERM and Ctrl-C do that here."""

    def __init__(self):
        self.signals = 0

    def watch(self) -> contextlib.AbstractContextManager[None]:
        """Counts signals while the block runs, where Python allows that."""
        return signals.told(self._count)

    def _count(self, number: int) -> None:
        self.signals += 1


def serve(
    models: Mapping[str, Served],
    place: Place,
    limits: Limits,
    *,
    stop: Stop,
    tell: Callable[[str], None],
) -> bool:
    """Listens until SIGTERM or Ctrl-C, then finishes what runs, and returns.

    Paths answer at once; requests for texts when everything is compiled. After the
    signal new requests get 503 while those that run go on for `grace_s` seconds at
    most; a second signal ends them.

    Args:
      models: what `open_runs` returned.
      place: where to listen.
      limits: of one request.
      stop: counts signals; may be raised by others too.
      tell: is told a line where the server is and what it does.

    Returns:
      whether every engine's thread ended; one that compiles cannot.

    Raises:
      ValueError: nothing can listen there.
    """
    if not (place.local or place.key):
        tell("warning: whoever reaches this port can use the models: set a key")
    sys.setswitchinterval(SWITCH)
    with stop.watch():
        asyncio.run(_serve(models, place, limits, stop, tell))
    ended = [served.engine.close(1.0) for served in models.values()]
    return all(ended)


async def _serve(models, place: Place, limits: Limits, stop: Stop, tell) -> None:
    import uvicorn

    engines = {name: served.engine for name, served in models.items()}
    numbers, mail = Numbers(engines), Mail()
    service = Service(models, limits, place.key, numbers, place.local, mail)
    for engine in engines.values():
        engine.flush = mail.flush
    listener = _listen(place.host, place.port)
    config = uvicorn.Config(
        application(service),
        http=_protocol(service.limits),
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        limit_concurrency=service.limits.connections,
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    server = uvicorn.Server(config)
    server.capture_signals = _signals_are_ours  # type: ignore[method-assign]
    work = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await _start(service, listener, stop, work, tell)
        while not (stop.signals or work.done()):
            await asyncio.sleep(TICK)
        service.leaving = True
        tell("leaving: what runs may end; a second signal ends it")
        end, first = time.monotonic() + place.grace_s, stop.signals
        answering = server.server_state.tasks
        while time.monotonic() < end and stop.signals <= first:
            if not (answering or _busy(service)):
                break
            await asyncio.sleep(TICK)
    finally:
        for served in service.models.values():
            await asyncio.to_thread(served.engine.close, 1.0)
        server.should_exit = True
        await work


async def _start(service: Service, listener, stop: Stop, work, tell) -> None:
    """Compiles; tells where the server listens, and when it is ready."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    tell(f"compiling; {url}/healthz answers already")
    began = time.monotonic()
    engines = list(dict.fromkeys(s.engine for s in service.models.values()))
    for engine in engines:
        engine.start()
    while not (service.ready or stop.signals or work.done()):
        if failed := next((e.failed for e in engines if e.failed), None):
            raise failed
        await asyncio.sleep(TICK)
    if service.ready:
        seconds = time.monotonic() - began
        names = ", ".join(service.models)
        tell(f"serving {names} at {url} (compiled in {seconds:.0f} s)")


def _busy(service: Service) -> bool:
    engines = [served.engine for served in service.models.values()]
    return any(engine.running or engine.waiting for engine in engines)


def _listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket, or raises ValueError saying why there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what does, "
            "or take another --port"
        ) from None
    return listener


@contextlib.contextmanager
def _signals_are_ours():
    """Stands in for uvicorn's own handlers, which stop listening at once."""
    yield


def _protocol(limits: Limits) -> type:
    """Returns uvicorn's HTTP/1.1 with limits to how slow the other side may be.

    A connection that sends its headers byte by byte would be open for ever, and one
    that does not read its answer too, even when it is closed: what was written must
    be sent before.
    """
    seconds = limits.read_seconds
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        held, blocked = 0, 0.0  # bytes not yet sent; seconds since there were none

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self.await_headers()
            self.watch = self.loop.call_later(seconds, self.look_at_reader)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.await_headers()

        def connection_lost(self, exc) -> None:
            super().connection_lost(exc)
            self.watch.cancel()
            if self.timer:
                self.timer.cancel()

        def look_at_reader(self) -> None:
            before, self.held = self.held, self.transport.get_write_buffer_size()
            self.blocked = self.blocked + seconds if self.held else 0.0
            stuck = self.held == before and self.blocked > seconds
            if stuck or self.blocked > 2 * limits.seconds:
                self.transport.abort()
            else:
                self.watch = self.loop.call_later(seconds, self.look_at_reader)

        def await_headers(self) -> None:
            began = self.conn.their_state is not h11.IDLE
            if began and self.timer:
                self.timer.cancel()
                self.timer = None
            elif not began and not self.timer:
                self.timer = self.loop.call_later(seconds, self.too_slow)

        def too_slow(self) -> None:
            self.timer = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                answer = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n"
                self.transport.write(answer + b"Content-Length: 0\r\n\r\n")
                self.transport.close()

    return Protocol
