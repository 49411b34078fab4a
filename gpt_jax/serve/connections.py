"""Connections: how slow the other side may be, and how many are answered at once.

uvicorn's own protocol does the talking. `Watched` stands between it and the socket and
knows no more of either than asyncio's Protocol and Transport; which request has come on
which connection is known by the address that ASGI tells.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from gpt_jax.serve.limits import Limits

Address = tuple[str, int]
TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)


class Connections:
    """The open connections of a server; belongs to the thread of its event loop.

    A connection is busy from when a request's head has come until the last byte of its
    answer is sent. Idle ones cost a descriptor and nothing else.
    """

    def __init__(self, limits: Limits, most_open: int):
        """Takes what a request may cost, and how many sockets may be open."""
        self.limits, self._most_open = limits, most_open
        self._open: dict[tuple, Watched] = {}  # in the order in which they came
        self._busy: set[Watched] = set()

    def protocol(self, inner: Callable[..., Any]) -> type[asyncio.Protocol]:
        """Returns a protocol that watches over another; a type, as uvicorn takes it."""
        connections = self

        class Protocol(Watched):
            def __init__(self, **given):
                super().__init__(inner(**given), connections)

        return Protocol

    @property
    def busy(self) -> int:
        """How many are being answered."""
        self._busy = {one for one in self._busy if one.busy}
        return len(self._busy)

    def heard(self, app: Callable) -> Callable:
        """Returns an ASGI application whose requests are noted on their connections."""

        async def asgi(scope, receive, send) -> None:
            one = self._of(scope)
            if one:
                one.begin()
            try:
                await app(scope, receive, send)
            finally:
                if one:
                    one.answering = False
                    if not one.busy:
                        self._busy.discard(one)

        return asgi

    def enter(self, scope) -> bool:
        """Takes a request among those that are answered, if there is room for it."""
        most = self.limits.connections
        room = len(self._busy) < most or self.busy < most
        if room and (one := self._of(scope)):
            self._busy.add(one)
        return room

    def _of(self, scope) -> "Watched | None":
        return self._open.get(tuple(scope.get("client") or ()))

    def come(self, one: "Watched", address: Address) -> None:
        """Takes a new connection; beyond the most the longest idle one has to go."""
        self._open[address] = one
        if len(self._open) > self._most_open:
            idle = (each for each in self._open.values() if not each.busy)
            next(idle, one).transport.abort()

    def gone(self, one: "Watched", address: Address) -> None:
        """Forgets a connection."""
        if self._open.get(address) is one:
            del self._open[address]
        self._busy.discard(one)


class Watched(asyncio.Protocol):
    """A connection whose other side must send and read at some pace.

    One that sends the head of a request byte by byte would be open for ever, and one
    that does not read its answer too, even when it is closed: what was written must be
    sent before.
    """

    transport: asyncio.Transport
    address: Address

    def __init__(self, inner: asyncio.Protocol, connections: Connections):
        self._inner, self._all = inner, connections
        self._loop = asyncio.get_running_loop()
        self.answering = False
        self._head: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._held, self._blocked = 0, 0.0  # bytes not sent; seconds since there are

    @property
    def busy(self) -> bool:
        """Whether a request is being answered, or its answer sent."""
        return self.answering or self.transport.get_write_buffer_size() > 0

    def begin(self) -> None:
        """Notes that the head of a request has come."""
        self.answering = True
        if self._head:
            self._head.cancel()
            self._head = None

    def connection_made(self, transport) -> None:
        self.transport = transport  # type: ignore[assignment]  # of a stream
        host, port = (transport.get_extra_info("peername") or ("", 0))[:2]
        self.address = (str(host), int(port))
        self._inner.connection_made(transport)
        self._await_head()
        self._look = self._loop.call_later(self._all.limits.read_seconds, self._reads)
        self._all.come(self, self.address)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        self._await_head()

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)
        for timer in (self._head, self._look):
            if timer:
                timer.cancel()
        self._all.gone(self, self.address)

    def _await_head(self) -> None:
        if not (self.answering or self._head):
            seconds = self._all.limits.read_seconds
            self._head = self._loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._head = None
        if not (self.answering or self.transport.is_closing()):
            self.transport.write(TOO_SLOW)
            self.transport.close()

    def _reads(self) -> None:
        """Ends a connection that reads nothing, or too long."""
        seconds = self._all.limits.read_seconds
        before, self._held = self._held, self.transport.get_write_buffer_size()
        self._blocked = self._blocked + seconds if self._held else 0.0
        stuck = self._held == before and self._blocked > seconds
        if stuck or self._blocked > 2 * self._all.limits.seconds:
            self.transport.abort()
        else:
            self._look = self._loop.call_later(seconds, self._reads)
