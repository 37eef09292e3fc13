"""`TimelyProtocol`: a connection whose client dawdles over a request is closed, so that idle ones cannot pile up."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentkv.server.logs import logger


class StrictConnection(h11.Connection):
    """Refuses a request that gives two lengths of its body: whoever stands before this server may believe the other.

    RFC 9112, 6.1: such a request ought to be handled as an error, and its connection must be closed. h11 itself refuses
    lengths that differ, that are no numbers, and codings other than chunked.
    """

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """As h11's."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("two lengths of one body")
        return event


class JoiningTransport:
    """Sends together what is written in one turn of the event loop: whatever it holds, a sending costs most.

    Args:
        transport: by which it sends; everything but writing, closing and aborting is left to it.
        loop: in which it is used.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send it, after this turn."""
        if not self._parts:
            self._loop.call_soon(self._send)
        self._parts.append(data)

    def close(self) -> None:
        """Close it when all is sent."""
        self._send()
        self._transport.close()

    def abort(self) -> None:
        """Close it now."""
        self._parts.clear()
        self._transport.abort()

    def _send(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(b"".join(parts))


class TimelyProtocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, and no request may take longer than `receive_seconds` to arrive.

    Args:
        receive_seconds: from the connection, or from a request's first byte on one that is kept, to its body's last.
        uvicorn: what uvicorn gives its protocols.
    """

    def __init__(self, *, receive_seconds: float, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.conn = StrictConnection(h11.SERVER, self.conn._max_incomplete_event_size)  # pyright: ignore[reportPrivateUsage]
        self._receive_seconds = receive_seconds
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request is due."""
        super().connection_made(cast("asyncio.Transport", JoiningTransport(transport, self.loop)))
        self._expect()

    def data_received(self, data: bytes) -> None:
        """A part of a request, or all of it."""
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._expect()
        else:
            self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._forget()
        super().connection_lost(exc)

    def _expect(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._receive_seconds, self._give_up)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        fields = {"client": self.client and self.client[0], "seconds": self._receive_seconds}
        logger.info("a request did not arrive in time", extra={"fields": fields})
        self.transport.abort()
