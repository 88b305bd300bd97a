"""Bound the connections of the server: their number, and the time until the head of a request is complete.

Without these, connections that send nothing, or half a request, stay until no file descriptor is left.
"""

import asyncio
import resource
from typing import Any, cast

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_HEAD_SECONDS = 20.0
_SPARE_DESCRIPTORS = 256  # for processes, the sandbox and files
_MAX_DESCRIPTORS = 65536
_uvicorn_protocol: Any = AutoHTTPProtocol


def raise_descriptor_limit() -> int:
    """Raise the soft limit on file descriptors as far as allowed, and return how many connections it permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    return max(soft - _SPARE_DESCRIPTORS, soft // 2)


class BoundedConnection(asyncio.Protocol):
    """A connection of uvicorn that is closed if a head takes too long, or if there are too many connections."""

    def __init__(
        self, *, max_connections: int, head_seconds: float = _HEAD_SECONDS, **arguments: Any
    ) -> None:
        self._http = _uvicorn_protocol(**arguments)
        self._max_connections = max_connections
        self._head_seconds = head_seconds
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the time limit, or refuse the connection."""
        self._transport = cast(asyncio.Transport, transport)
        self._http.connection_made(transport)
        if len(self._http.connections) > self._max_connections:
            self._transport.abort()
            return
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Pass data on; a new request ends the time limit, and the first byte of the next head starts it."""
        cycle = self._http.cycle
        if cycle is None or cycle.response_complete:
            self._start_timer()
        self._http.data_received(data)
        if self._http.cycle is not cycle:
            self._stop_timer()

    def eof_received(self) -> bool | None:
        """Pass the end of the data on."""
        return self._http.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the end of the connection on."""
        self._stop_timer()
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass flow control on."""
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """Pass flow control on."""
        self._http.resume_writing()

    def _start_timer(self) -> None:
        if self._timer is None and self._transport is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._head_seconds, self._transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
