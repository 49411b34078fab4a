"""Before the paths: how many at once, the key, the limits on bodies, the counts."""

import asyncio
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from gpt_jax.serve.connections import Connections
from gpt_jax.serve.errors import Refused
from gpt_jax.serve.limits import Limits
from gpt_jax.serve.numbers import Numbers

PLAIN = (b"x-content-type-options", b"nosniff")  # no answer is another type's
HOSTS = ("localhost", "127.0.0.1", "[::1]")  # what a server on loopback is called
GONE = 499  # what the numbers call a client that left; nobody reads such an answer
AGAIN = 2  # seconds after which who was one too many may come again
HEALTH = {"/health", "/healthz", "/readyz"}  # answered however many there are
OVERRUN, OVERRUN_SECONDS = 1 << 26, 5  # of a refused body that is read nevertheless


def guarded(
    app: Callable,
    *,
    key: str,
    open_paths: set[str],
    limits: Limits,
    numbers: Numbers,
    connections: Connections,
    hosts: Collection[str],
    note: Callable[[str], None] | None = None,
) -> Callable:
    """Returns an ASGI application behind a key and limits; counts its answers.

    Every answer has an X-Request-Id: the client's own, where it sent a short one.

    Args:
      app: gets bodies whole.
      key: what clients must show; "" = nothing.
      open_paths: those that need no key.
      limits: of bodies, and of the time in which they must have come.
      numbers: where answers are counted.
      connections: know how many are answered.
      hosts: what the server is called; none = whatever is asked for. A page of another
        site in a browser here could ask, under a name of its own that leads here.
      note: is told a line of every answer: who, what, its status, how long, its id;
        nothing of what was sent.
    """

    async def asgi(scope, receive, send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        status, path, began = GONE, scope["path"], time.monotonic()
        number = (b"x-request-id", _number(scope))

        async def noting(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                heads = [*message["headers"], number, PLAIN]
                message = {**message, "headers": heads}
            await send(message)

        try:
            if path not in HEALTH and not connections.enter(scope):
                raise Refused(
                    503,
                    f"{limits.connections} requests are being answered already",
                    "overloaded",
                    AGAIN,
                )
            _check_sender(scope, hosts)
            if key and path not in open_paths:
                _check_key(scope, key)
            body = await _body(scope, receive, limits)
            await app(scope, _replayed(body, receive), noting)
        except Refused as error:
            await _refuse(error, scope, receive, noting)
        finally:
            numbers.answered(path, status)
            if note:
                seconds = time.monotonic() - began
                note(_line(scope, status, seconds, number[1]))

    return asgi


def _number(scope) -> bytes:
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    fits = re.fullmatch(rb"[\w.:/+=-]{1,128}", given)
    return given if fits else b"req_" + secrets.token_hex(16).encode()


def _line(scope, status: int, seconds: float, number: bytes) -> str:
    """Returns a line of the access log; what strangers wrote is quoted and cut."""
    who = (scope.get("client") or ["-"])[0]
    what = json.dumps(f"{scope['method']} {scope['path']}"[:200])
    return f"{who} {what} {status} {seconds:.3f} s {number.decode()}"


def _check_sender(scope, hosts: Collection[str]) -> None:
    """Refuses what a browser sends here for a page of somebody else."""
    headers = dict(scope["headers"])
    host = headers.get(b"host", b"").decode("latin-1").lower()
    if hosts and re.sub(r":\d+$", "", host) not in hosts:
        names = ", ".join(hosts)
        raise Refused(403, f"this server is called {names}, not {host:.80}", "host")
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if scope["method"] == "POST" and kind != b"application/json":
        raise Refused(415, "send application/json as the Content-Type", "not_json")


def _check_key(scope, key: str) -> None:
    given = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, shown = given.strip().partition(b" ")
    # Compares in a time that does not tell how much of a guess was right.
    right = hmac.compare_digest(shown.strip(), key.encode())
    if scheme.lower() != b"bearer" or not right:
        raise Refused(401, "this server wants an API key", "invalid_api_key")


async def _body(scope, receive, limits: Limits) -> bytes:
    """Returns the body of a request, if it is short and comes soon."""
    most = limits.body_bytes
    too_long = Refused(413, f"the body is longer than {most} bytes", "body_too_long")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if int(length[:20]) > most:  # the server has seen to it that it is a number
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(GONE, "the client has left", "gone")
                body += message.get("body", b"")
                if len(body) > most:
                    raise too_long
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise Refused(408, "the body came too slowly", "timeout") from None


def _replayed(body: bytes, receive: Callable) -> Callable:
    """Returns a `receive` that gives a body already read, then what follows."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return waiting.pop() if waiting else await receive()

    return again


async def _refuse(error: Refused, scope, receive, send) -> None:
    """Answers with an error and reads on, since who is cut off in the middle of
    sending may never see the answer."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    headers |= {"connection": "close", **error.headers}
    pairs = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    start = {"type": "http.response.start", "status": error.status, "headers": pairs}
    await send(start)
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if b"expect" not in dict(scope["headers"]) and error.status == 413:
        with suppress(TimeoutError):
            async with asyncio.timeout(OVERRUN_SECONDS):
                await _pass_over(receive)
    await send({"type": "http.response.body", "body": b""})


async def _pass_over(receive: Callable) -> None:
    """Reads the rest of a body, up to a point, and keeps nothing of it."""
    passed = 0
    while passed < OVERRUN:
        message = await receive()
        passed += len(message.get("body", b""))
        if not message.get("more_body"):
            return
