"""Over HTTP: OpenAI's paths, streams, limits, and what a machine room wants to know.

    GET  /v1/models  /v1/models/NAME    what is served
    POST /v1/completions                texts continued, scored, streamed
    POST /v1/chat/completions           conversations, where a run has a template
    POST /v1/responses                  the same in OpenAI's newer form
    POST /v1/embeddings                 hidden states of texts, of length 1
    POST /tokenize  /detokenize         texts and conversations to ids, ids to texts
    POST /v1/look                       what a model does with a text, as a page
    GET  /health  /healthz  /readyz     alive; compiled and not leaving
    GET  /metrics                       numbers for Prometheus
    GET  /version  /openapi.json        which this is; all of this, for tools
    GET  /                              the page

What can be got has HEAD too. Every answer is 200 or one of `errors.STATUSES`; errors
are JSON as OpenAI's clients read it.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpt_jax import __version__
from gpt_jax.microscope.page import hashes
from gpt_jax.serve import fields, openapi, replies, wire
from gpt_jax.serve.connections import Connections
from gpt_jax.serve.errors import Refused, bad
from gpt_jax.serve.flow import (
    ENDS,
    Flow,
    Mail,
    Served,
    check_tokens,
    embeddings_of,
    prompt_ids,
    requests_of,
    text_ids,
    token_ids,
)
from gpt_jax.serve.guard import GONE, HEALTH, guarded
from gpt_jax.serve.limits import Limits
from gpt_jax.serve.numbers import Numbers
from gpt_jax.serve.replies import Text, as_json, reply
from gpt_jax.serve.responses import Response

PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html"}
FILES |= {f"/{path.name}": path.name for path in sorted(PAGE.glob("*.[cj]s*"))}
INLINE = hashes()  # of what the page of the microscope brings along
POLICY = {  # of a browser that shows the page: nothing from elsewhere, nothing old
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; "
    f"script-src 'self' {INLINE['script']}; style-src 'self' {INLINE['style']}; "
    "style-src-attr 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # or scripts of two versions would meet
}
LOOKING = threading.Lock()  # held by the thread: a client that leaves does not end it
FEW = 16  # tokens of an event that are told without a thread of their own
OPEN = {*FILES, *HEALTH, "/version"}  # need no key


@dataclass
class Service:
    """All that the paths share; `leaving` is set when no more requests are taken.

    Made where the event loop runs, to which `mail` belongs.
    """

    models: Mapping[str, Served]
    limits: Limits
    key: str  # "" = none is asked for
    numbers: Numbers
    hosts: Collection[str]  # what the server is called; none = anything
    mail: Mail
    connections: Connections
    note: Callable[[str], None] | None = None  # is told a line of every answer
    leaving: bool = False

    def __post_init__(self):
        self.forms = fields.forms(self.limits)

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
                param="model",
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
        code = "wrong_method" if error.status_code == 405 else "not_found"
        kind = Refused(error.status_code, str(error.detail), code)
        return JSONResponse(kind.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Http, error: Exception) -> Response:
        return JSONResponse(Refused(*ENDS["error"]).body(), 500)

    def got(path: str) -> Callable:
        return app.api_route(path, methods=["GET", "HEAD"])

    @got("/health")
    @got("/healthz")
    async def healthz() -> Response:
        failed = any(served.engine.failed for served in service.models.values())
        return JSONResponse({"ok": not failed}, 503 if failed else 200)

    @got("/readyz")
    async def readyz() -> Response:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @got("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @got("/metrics")
    async def metrics() -> Response:
        text, kind = service.numbers.text()
        return Response(text, media_type=kind)

    @got("/openapi.json")
    async def described() -> Response:
        return JSONResponse(openapi.description(service.limits, service.models))

    @got("/v1/models")
    async def models() -> Response:
        data = [_facts(name, served) for name, served in service.models.items()]
        return JSONResponse({"object": "list", "data": data})

    @got("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(_facts(*service.model(name)))

    def asked(form: str, answer: Callable) -> None:
        async def answered(http: Http) -> Response:
            return await answer(service, http)

        app.post(fields.PATHS[form])(answered)

    for form in ("completion", "chat", "response"):
        asked(form, partial(_generate, form=form))
    asked("embedding", _embed)
    asked("tokenize", _tokenize)
    asked("detokenize", _detokenize)
    asked("look", _look)

    def page(file: str) -> Callable:
        async def send() -> Response:
            return FileResponse(PAGE / file, headers=POLICY)

        return send

    for path, file in FILES.items():
        got(path)(page(file))
    return guarded(
        app,
        key=service.key,
        open_paths=OPEN,
        limits=service.limits,
        numbers=service.numbers,
        connections=service.connections,
        hosts=service.hosts,
        note=service.note,
    )


def _facts(name: str, served: Served) -> dict:
    head = {"id": name, "object": "model", "owned_by": "gpt_jax"}
    can = {"chat": served.template is not None, "look": served.look is not None}
    # What the page begins with; see Served.settings for who leaves them out.
    return {**head, **can, **served.facts, "suggested": served.generation.settings}


async def _asked(service: Service, http, form: str) -> Any:
    """Returns what a body asks for, or raises Refused."""
    if service.leaving:
        raise Refused(503, "the server is leaving", "leaving", 10)
    body = wire.read(await http.body())
    return wire.READERS[form](service.forms[form], body, service.limits)


def _ready(service: Service, name: str | None) -> tuple[str, Served]:
    """Returns a model that is compiled, by its name."""
    name, served = service.model(name)
    if not served.engine.ready.is_set():
        raise Refused(503, "the model is still being compiled", "starting", 5)
    return name, served


async def _in_time(http, work: Callable, deadline: float) -> Any:
    """Returns what `work` does in a thread, if it is done before the deadline.

    Whoever writes a tokenizer's rules may have made one that never ends.
    """
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            return await _unless_gone(http, asyncio.to_thread(work))
    except TimeoutError:
        raise Refused(*ENDS["late"]) from None


async def _generate(service: Service, http, form: str):
    """Answers a request for texts; the slots are free when this or its stream ends."""
    began = time.monotonic()
    ask = await _asked(service, http, form)
    name, served = _ready(service, ask.model)
    deadline = began + service.limits.seconds

    def prepared() -> tuple[list, Any]:
        prompts = prompt_ids(ask, served)
        requests = requests_of(ask, served, prompts, service.limits, deadline)
        answer = Response if form == "response" else reply
        return requests, answer(ask, name, served, prompts)

    requests, made = await _in_time(http, prepared, deadline)
    flow = Flow(served.engine, requests, service.mail)
    try:
        first = await _unless_gone(http, flow.next())
        service.numbers.first(name, time.monotonic() - began)
        if ask.stream:
            events = _events(made, flow, first)
            return _streaming(events, flow, service, began, name)
        body = await _unless_gone(http, _whole(made, flow, first))
        service.numbers.done(name, time.monotonic() - began)
    except BaseException:
        flow.close()
        raise
    return _json(body)


async def _embed(service: Service, http):
    """Answers a request for embeddings."""
    began = time.monotonic()
    ask = await _asked(service, http, "embedding")
    name, served = _ready(service, ask.model)
    deadline = began + service.limits.seconds
    work = partial(text_ids, ask.prompts, served, param="input")
    prompts = await _in_time(http, work, deadline)
    flow = Flow(served.engine, embeddings_of(ask, prompts, deadline), service.mail)
    found: list = [None] * len(prompts)
    try:
        while (piece := await _unless_gone(http, flow.next())) is not None:
            found[piece[0]] = piece[1].vector
    except BaseException:
        flow.close()
        raise
    body = replies.embeddings(name, found, encoded=ask.encoded)
    body["usage"] = wire.usage_of_prompts(sum(map(len, prompts)))
    service.numbers.done(name, time.monotonic() - began)
    return _json(await asyncio.to_thread(as_json, body))


async def _tokenize(service: Service, http):
    """Answers what the tokens of a text or a conversation are."""
    asked = await _asked(service, http, "tokenize")
    _, served = service.model(asked["model"])
    tokenizer = served.engine.tokenizer

    def work() -> dict:
        return replies.tokens(tokenizer, token_ids(asked, served), asked, served)

    end = time.monotonic() + service.limits.seconds
    return _json(as_json(await _in_time(http, work, end)))


async def _detokenize(service: Service, http):
    """Answers what the text of tokens is."""
    asked = await _asked(service, http, "detokenize")
    _, served = service.model(asked["model"])
    check_tokens(served, tokens=asked["tokens"])
    work = partial(served.engine.tokenizer.decode, asked["tokens"])
    end = time.monotonic() + service.limits.seconds
    return _json(as_json({"prompt": await _in_time(http, work, end)}))


async def _look(service: Service, http):
    """Answers the page of the microscope, of one text at a time."""
    asked = await _asked(service, http, "look")
    _, served = service.model(asked["model"])
    work = partial(_looked, served, asked["prompt"], asked["against"] or "")
    return _json(as_json({"page": await _unless_gone(http, asyncio.to_thread(work))}))


def _looked(served: Served, prompt: str, against: str) -> str:
    if served.look is None:
        raise Refused(404, "this model is not looked into here", "not_found")
    if not LOOKING.acquire(blocking=False):
        raise Refused(429, "another text is being looked at", "busy", 5)
    try:
        return served.look(prompt, against)
    except ValueError as error:  # too long, unlike each other, not of this vocabulary
        raise bad(str(error), "prompt") from None
    finally:
        LOOKING.release()


def _json(body: bytes):
    from fastapi.responses import Response

    return Response(body, media_type="application/json")


async def _whole(reply, flow: Flow, first) -> bytes:
    """Collects all pieces and returns the body."""
    texts = [Text(echo) for echo in reply.echoes for _ in range(reply.ask.drawn)]
    while first is not None:
        texts[first[0]].add(first[1])
        first = await flow.next()
    # It may be long, and others' tokens are not to wait for it.
    return await asyncio.to_thread(lambda: as_json(reply.whole(texts, flow.spent)))


async def _events(reply, flow: Flow, first) -> AsyncIterator[bytes]:
    """Yields the server-sent events of a stream."""

    def sent(told) -> list[bytes]:
        return [reply.encoded(event) for event in told]

    def counted(told: list[dict]) -> list[dict]:
        if reply.ask.counted:
            usage = reply.usage(flow.spent)
            told = [event | {"usage": usage} for event in told]
        return told

    texts = [Text("") for _ in reply.echoes for _ in range(reply.ask.n)]
    echoes = [echo for echo in reply.echoes for _ in range(reply.ask.n)]
    events = sent(counted(reply.opening()))
    try:
        while first is not None:
            i, piece = first
            text, start = texts[i], texts[i].told
            echo, echoes[i] = echoes[i], ""
            tokens = text.add(piece)
            told = (i, echo + piece.text, tokens, start, piece.reason)
            if len(tokens) > FEW:
                work = asyncio.to_thread(
                    lambda a: sent(counted(reply.pieces(*a))), told
                )
                events += await work
            else:
                events += sent(counted(reply.pieces(*told)))
            if not flow.more:  # else they share a system call, the dearest part
                yield b"".join(events)
                events.clear()
            first = await flow.next()
    except Refused as error:
        yield b"".join([*events, *sent(reply.failed(error))])
        return
    yield b"".join([*events, *sent(reply.closing(flow.spent)), reply.end])


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
