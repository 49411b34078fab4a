"""Opening runs under their names, listening, leaving in good order."""

import asyncio
import contextlib
import hashlib
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gpt_jax import (
    chat,
    commands,
    files,
    generation,
    memory,
    microscope,
    model,
    runs,
    signals,
)
from gpt_jax.serve import plan
from gpt_jax.serve.compiled import Programs
from gpt_jax.serve.connections import Connections
from gpt_jax.serve.engine import Engine
from gpt_jax.serve.flow import Mail, Served
from gpt_jax.serve.guard import HOSTS
from gpt_jax.serve.http import Service, application
from gpt_jax.serve.limits import Limits
from gpt_jax.serve.numbers import Numbers

NAME = re.compile(r"[\w.:/-]{1,100}", re.ASCII)  # of a model
OPEN, OWN = 1 << 16, 100  # descriptors asked for, and those that are not sockets
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


def named(folders: Sequence[str], names: Sequence[str] = ()) -> dict[str, Path]:
    """Returns run folders by their own names, or by others in the same order.

    Raises:
      ValueError: there is none, two have one name, or there is not a name for each.
    """
    paths: dict[str, Path] = {}
    folders = [folder.strip() for folder in folders if folder.strip()]
    if names and len(names) != len(folders):
        raise ValueError(
            f"--name={','.join(names)} names {len(names)} models but --runs has "
            f"{len(folders)}: give a name for each, in their order"
        )
    if bad := [name for name in names if not NAME.fullmatch(name)]:
        raise ValueError(
            f"--name={bad[0]!r} must be 1 to 100 letters, digits, - _ . : or /"
        )
    for i, folder in enumerate(folders):
        path = Path(folder).resolve()
        name = names[i] if names else path.name
        if name in paths:
            raise ValueError(
                f"{folder} and {paths[name]} would both be served as {name!r}; give "
                "each a --name"
            )
        paths[name] = path
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
    context: int = 0,
    bits: int = 0,
    cache_dtype: str = "",
    prefix_bytes: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Served]:
    """Returns the models of run folders, their engines not yet started.

    Weights that are equal in several of them are held once: of LoRA runs over one base
    all but the adapters, which then stay beside the kernels (a run that is served alone
    has its adapter merged).

    Args:
      paths: run folders by name.
      step, weights, bits, cache_dtype: as in `runs.open`.
      sizes, queue, prefix_bytes: as in `Engine`.
      context: tokens of a text at most, the prompt's too; 0 = the model's own.
      tell: is told what memory each will need.

    Raises:
      ValueError: a folder is not a run, or not one of a model that writes; the context
        is longer than the model's; there is not memory enough, and what would fit.
    """
    held: dict[tuple, Any] = {}
    programs = Programs()
    served, alone, planned = {}, len(paths) == 1, 0.0  # bytes of those before
    for name, path in paths.items():
        few = {"bits": bits, "cache_dtype": cache_dtype}
        run = runs.open(path, step=step, weights=weights, merge=alone, **few)
        if run.model.cfg.n_classes:
            raise ValueError(
                f"{path} sorts texts into classes and cannot write; use "
                f"{commands.typed('classify')}"
            )
        template, drawn = _template(path, run.tokenizer), generation.of(path)
        if drawn.told:
            tell(f"{name}: {drawn.told}")
        gpt, params = plan.shortened(run.model, run.params, context)
        (device,) = jax.tree.leaves(params)[0].devices()
        free = memory.of_device(device) - planned
        needs = plan.check(gpt.cfg, params, sizes, free, prefix_bytes)
        planned += needs.total
        tell(f"{name} will need at most {needs.told()}")
        engine = Engine(
            model=gpt,
            params=params,
            tokenizer=run.tokenizer,
            sizes=sizes,
            queue=queue,
            ahead=True,
            prefix_bytes=prefix_bytes,
            programs=programs,
            **({} if alone else {"share": partial(share, held=held)}),
        )
        facts = {
            "created": int((path / "config.json").stat().st_mtime),
            "context_length": gpt.cfg.context_length,
            "parameters": model.count(run.model.cfg),
            "vocab_size": run.model.cfg.vocab_size,
            "step": run.step,
            **({"bits": bits} if bits else {}),
            **({"cache_dtype": cache_dtype} if cache_dtype else {}),
        }
        looks = partial(_look, path, run.step, weights)
        served[name] = Served(engine, template, facts, looks, drawn)
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
      hosts: names by which it may be asked; on loopback besides this machine's own.
      origins: sites whose pages may ask from a browser; "*" = all.
      access_log: whether a line is told of every answer.
    """

    host: str
    port: int
    key: str
    grace_s: float
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    access_log: bool = False

    @property
    def names(self) -> Sequence[str]:
        """What the server is called; none = whatever is asked for."""
        own = HOSTS if self.local else ()
        return (*own, *(name.lower() for name in self.hosts))

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
    # In a thread of its own, since uvicorn takes the signals of the main one.
    with stop.watch(), ThreadPoolExecutor(1, "server") as pool:
        work = pool.submit(
            lambda: asyncio.run(_serve(models, place, limits, stop, tell))
        )
        while not wait([work], TICK).done:  # signals are heard between two waits
            pass
        work.result()
    ended = [served.engine.close(1.0) for served in models.values()]
    return all(ended)


async def _serve(models, place: Place, limits: Limits, stop: Stop, tell) -> None:
    import uvicorn

    engines = {name: served.engine for name, served in models.items()}
    connections = Connections(limits, max(16, files.open_most(OPEN) - OWN))
    service = Service(
        *(models, limits, place.key, Numbers(engines), place.names),
        mail=(mail := Mail()),
        connections=connections,
        note=tell if place.access_log else None,
    )
    for engine in engines.values():
        engine.flush = mail.flush
    listener = _listen(place.host, place.port)
    options: dict[str, Any] = {
        "ws": "none",
        "lifespan": "off",
        "access_log": False,
        "log_level": "warning",
        "proxy_headers": False,  # addresses are those of the connections
        "timeout_graceful_shutdown": 1,
        "server_header": False,
    }
    app = connections.heard(_shared(application(service), place.origins))
    plain = uvicorn.Config(app, http="h11", **options)
    plain.load()
    watched = connections.protocol(plain.http_protocol_class)
    server = uvicorn.Server(uvicorn.Config(app, http=watched, **options))
    work = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        began = time.monotonic()
        await _start(service, listener, stop, work, tell)
        waiting = [engine for engine in engines.values() if engine.ahead]
        while not (stop.signals or work.done()):
            await asyncio.sleep(TICK)
            if waiting and all(engine.compiled.is_set() for engine in waiting):
                seconds, waiting = time.monotonic() - began, []
                tell(f"every shape of request is compiled ({seconds:.0f} s)")
        service.leaving = True
        tell("leaving: what runs may end; a second signal ends it")
        end, first = time.monotonic() + place.grace_s, stop.signals
        while time.monotonic() < end and stop.signals <= first:
            if not (connections.busy or _busy(service)):
                break
            await asyncio.sleep(TICK)
    finally:
        for served in service.models.values():
            await asyncio.to_thread(served.engine.close, 1.0)
        server.should_exit = True
        await work


def _shared(app: Callable, origins: Sequence[str]) -> Callable:
    """Returns an application that browsers may ask from pages of these sites."""
    if not origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )


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
        more = any(engine.ahead and not engine.compiled.is_set() for engine in engines)
        also = "; other shapes of requests are compiled meanwhile" if more else ""
        tell(f"serving {names} at {url} (compiled in {seconds:.0f} s{also})")


def _busy(service: Service) -> bool:
    engines = [served.engine for served in service.models.values()]
    return any(engine.running or engine.waiting for engine in engines)


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens, or raises ValueError saying why there is none.

    Who asks before the server runs is not refused but waits for it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ValueError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what does, "
            "or take another --port"
        ) from None
    return listener
