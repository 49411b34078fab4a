"""Over HTTP: OpenAI's paths, streams, limits, and what a machine room wants to know.

    GET  /v1/models  /v1/models/NAME    what is served
    POST /v1/completions                texts continued, scored, streamed
    POST /v1/chat/completions           conversations, where a run has a template
    POST /v1/look                       what a model does with a text, as a page
    GET  /healthz  /readyz  /metrics    alive; compiled and not leaving; Prometheus
    GET  /openapi.json                  all of this, for tools
    GET  /                              the page

Every answer has one of these statuses: 200; 400 a request that cannot be; 401 without
the key; 403 the wrong Host on loopback; 404 no such model or path; 405; 408 it came too
slowly; 413 too long; 415 no JSON; 429 the queue is full (Retry-After says when to come
back); 500 a mistake of ours; 503 starting or leaving; 504 not done in time. Errors are
JSON as OpenAI's clients read it.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpt_jax.microscope.page import hashes
from gpt_jax.serve import openapi, replies, wire
from gpt_jax.serve.flow import ENDS, Flow, Mail, Served, prompt_ids, requests_of
from gpt_jax.serve.guard import GONE, guarded
from gpt_jax.serve.numbers import Numbers
from gpt_jax.serve.replies import Reply, Text
from gpt_jax.serve.wire import Limits, Refused

PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.css": "page.css"}
FILES |= {f"/{name}": name for name in ("page.js", "look.js")}
INLINE = hashes()  # of what the page of the microscope brings along
POLICY = {  # of a browser that shows the page: nothing from elsewhere
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; "
    f"script-src 'self' {INLINE['script']}; style-src 'self' {INLINE['style']}; "
    "style-src-attr 'unsafe-inline'"
}
LOOKING = threading.Lock()  # held by the thread: a client that leaves does not end it
FEW = 16  # tokens of an event that are told without a thread of their own
OPEN = {*FILES, "/healthz", "/readyz"}  # need no key


@dataclass
class Service:
    """All that the paths share; `leaving` is set when no more requests are taken.

    Made where the event loop runs, to which `mail` belongs.
    """

    models: Mapping[str, Served]
    limits: Limits
    key: str  # "" = none is asked for
    numbers: Numbers
    local: bool  # listens on loopback
    mail: Mail
    leaving: bool = False

    @property
    def ready(self) -> bool:
        """Whether every model is compiled and requests are taken."""
        engines = [served.engine for served in self.models.values()]
        ready = all(e.ready.is_set() and not e.failed for e in engines)
        return ready and not self.leaving

    def model(self, name: str | None) -> tuple[str, Served]:
        """Returns a model by its name; without one, the only one there is."""
        if name is None and len(self.models) == 1:
            name = next(iter(self.models))
        if (
            name is None or name not in self.models
        ):  # names are looked up here, never on a disk
            raise Refused(
                404,
                f"there is no model {name!r:.80}; there are: {', '.join(self.models)}",
                "model_not_found",
            )
        return name, self.models[name]


# ---------------------------------------------------------------- the application


def application(service: Service) -> Callable:
    """Returns the ASGI application; see `server.need_packages`."""
    from fastapi import FastAPI
    from fastapi import Request as Http
    from fastapi.responses import FileResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refused(_: Http, error: Refused) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def not_here(_: Http, error: HTTPException) -> Response:
        kind = Refused(error.status_code, str(error.detail), "not_found")
        return JSONResponse(kind.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Http, error: Exception) -> Response:
        return JSONResponse(Refused(*ENDS["error"]).body(), 500)

    @app.get("/healthz")
    async def healthz() -> Response:
        failed = any(served.engine.failed for served in service.models.values())
        return JSONResponse({"ok": not failed}, 503 if failed else 200)

    @app.get("/readyz")
    async def readyz() -> Response:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text, kind = service.numbers.text()
        return Response(text, media_type=kind)

    @app.get("/openapi.json")
    async def described() -> Response:
        return JSONResponse(openapi.description(service.limits, service.models))

    @app.get("/v1/models")
    async def models() -> Response:
        data = [_facts(name, served) for name, served in service.models.items()]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(_facts(*service.model(name)))

    @app.post("/v1/completions")
    async def completions(http: Http) -> Response:
        return await _generate(service, http, wire.completion)

    @app.post("/v1/chat/completions")
    async def chats(http: Http) -> Response:
        return await _generate(service, http, wire.chat)

    @app.post("/v1/look")
    async def look(http: Http) -> Response:
        name, prompt, against = wire.look(wire.read(await http.body()), service.limits)
        _, served = service.model(name)
        work = asyncio.to_thread(_looked, served, prompt, against)
        return JSONResponse({"page": await _unless_gone(http, work)})

    def page(file: str) -> Callable:
        async def send() -> Response:
            return FileResponse(PAGE / file, headers=POLICY)

        return send

    for path, file in FILES.items():
        app.get(path)(page(file))
    return guarded(
        app,
        key=service.key,
        open_paths=OPEN,
        limits=service.limits,
        numbers=service.numbers,
        local=service.local,
    )


def _facts(name: str, served: Served) -> dict:
    head = {"id": name, "object": "model", "owned_by": "gpt_jax"}
    can = {"chat": served.template is not None, "look": served.look is not None}
    return {**head, **can, **served.facts}


def _looked(served: Served, prompt: str, against: str) -> str:
    """Returns the page of the microscope; one at a time, the rest come back later."""
    if served.look is None:
        raise Refused(404, "this model is not looked into here", "not_found")
    if not LOOKING.acquire(blocking=False):
        raise Refused(429, "another text is being looked at", "busy", 5)
    try:
        return served.look(prompt, against)
    except ValueError as error:  # too long, unlike each other, not of this vocabulary
        raise Refused(400, str(error), "invalid_request") from None
    finally:
        LOOKING.release()


async def _generate(service: Service, http, form: Callable):
    """Answers a request for texts; the slots are free when this or its stream ends."""
    began = time.monotonic()
    if service.leaving:
        raise Refused(503, "the server is leaving", "leaving", 10)
    ask = form(wire.read(await http.body()), service.limits)
    name, served = service.model(ask.model)
    if not served.engine.ready.is_set():
        raise Refused(503, "the model is still being compiled", "starting", 5)
    deadline = began + service.limits.seconds

    def prepared() -> tuple[list, Reply]:
        prompts = prompt_ids(ask, served)
        requests = requests_of(ask, served, prompts, service.limits, deadline)
        return requests, replies.reply(ask, name, served.engine.tokenizer, prompts)

    try:  # whoever writes a tokenizer's rules may have made one that never ends
        async with asyncio.timeout(deadline - time.monotonic()):
            work = asyncio.to_thread(prepared)
            requests, reply = await _unless_gone(http, work)
    except TimeoutError:
        raise Refused(*ENDS["late"]) from None
    flow = Flow(served.engine, requests, service.mail)
    try:
        first = await _unless_gone(http, flow.next())
        service.numbers.first(name, time.monotonic() - began)
        if ask.stream:
            events = _events(service, reply, flow, first)
            return _streaming(events, flow, service, began, name)
        body = await _unless_gone(http, _whole(reply, flow, first))
        service.numbers.done(name, time.monotonic() - began)
    except BaseException:
        flow.close()
        raise
    from fastapi.responses import Response

    return Response(body, media_type="application/json")


async def _whole(reply: Reply, flow: Flow, first) -> bytes:
    """Collects all pieces and returns the body."""
    texts = [Text(echo) for echo in reply.echoes for _ in range(reply.ask.n)]
    while first is not None:
        texts[first[0]].add(first[1])
        first = await flow.next()
    # It may be long, and others' tokens are not to wait for it.
    return await asyncio.to_thread(lambda: _json(reply.whole(texts, flow.written)))


async def _events(service: Service, reply: Reply, flow: Flow, first) -> AsyncIterator:
    """Yields the server-sent events of a stream."""
    texts = [Text("") for _ in reply.echoes for _ in range(reply.ask.n)]
    echoes = [echo for echo in reply.echoes for _ in range(reply.ask.n)]
    events = [_event(event) for event in reply.opening()]
    try:
        while first is not None:
            i, piece = first
            text, start = texts[i], texts[i].told
            echo, echoes[i] = echoes[i], ""
            tokens = text.add(piece)
            told = (i, echo + piece.text, tokens, start, piece.reason)
            if len(tokens) > FEW:
                work = asyncio.to_thread(lambda a: _event(reply.piece(*a)), told)
                events.append(await work)
            else:
                events.append(_event(reply.piece(*told)))
            if not flow.more:  # else they share a system call, the dearest part
                yield b"".join(events)
                events.clear()
            first = await flow.next()
    except Refused as error:
        yield b"".join([*events, _event(error.body())])
        return
    events += map(_event, reply.closing(flow.written))
    yield b"".join([*events, b"data: [DONE]\n\n"])


def _event(body: dict) -> bytes:
    return b"data: " + _json(body) + b"\n\n"


def _json(body: dict) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


def _streaming(events, flow: Flow, service: Service, began: float, name: str):
    """Returns the response of a stream, which frees its slots however it ends."""
    from fastapi.responses import StreamingResponse

    class Stream(StreamingResponse):
        async def __call__(self, scope, receive, send) -> None:
            # A reader may take its time, but not for ever.
            left = 2 * service.limits.seconds
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await super().__call__(scope, receive, send)
            finally:
                flow.close()
                service.numbers.done(name, time.monotonic() - began)

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Stream(events, media_type="text/event-stream", headers=headers)


async def _unless_gone(http, work):
    """Awaits `work`, unless the client leaves before it is done."""

    async def gone():
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Refused(GONE, "the client has left", "gone")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
