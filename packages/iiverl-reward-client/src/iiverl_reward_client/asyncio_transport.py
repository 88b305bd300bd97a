"""HTTP/1.1 over asyncio, as an httpx transport that stays cheap with hundreds of connections.

httpx's own transport scans its connection pool at every request, so its cost grows with concurrency. Here a request
takes the most recently used connection or opens one; the caller bounds their number.
"""

import asyncio
import ssl
import zlib
from typing import TypeAlias, cast

import h11
import httpx

_MAX_RESPONSE_BYTES = 64 * 2**20
_DEFAULT_PORTS = {"http": 80, "https": 443}
# A server may close a connection while a request is on its way; retry only on one that was idle for this long.
_IDLE_SECONDS = 1.0
_HAPPY_EYEBALLS_SECONDS = 0.25

_Origin: TypeAlias = tuple[str, str, int]
_Answer: TypeAlias = tuple[int, list[tuple[bytes, bytes]], bytes]


class AsyncioTransport(httpx.AsyncBaseTransport):
    """Sends httpx requests over persistent connections and reads responses whole.

    Of httpx's timeouts it uses `connect` and `read`, the latter for the whole response. It has no proxies, no HTTP/2,
    and ignores environment variables; use httpx's own transport for these. It belongs to one event loop.
    """

    def __init__(self, ssl_context: ssl.SSLContext | None = None) -> None:
        self._ssl_context = ssl_context
        self._idle: dict[_Origin, list[_Connection]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request and return the response.

        Raises:
            httpx.TransportError: no connection, no response in time, or one that is not HTTP.
        """
        content = await request.aread()
        timeouts = request.extensions.get("timeout", {})
        url = request.url
        origin = (url.scheme, url.raw_host.decode("ascii"), url.port or _DEFAULT_PORTS.get(url.scheme, 0))
        idle = self._idle.setdefault(origin, [])
        connection = _newest_open(idle)
        if connection is not None:
            try:
                return await self._exchange(connection, idle, request, content, timeouts.get("read"))
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                if connection.heard or connection.idle_seconds < _IDLE_SECONDS:
                    raise
        connection = await self._connect(origin, timeouts.get("connect"))
        return await self._exchange(connection, idle, request, content, timeouts.get("read"))

    async def aclose(self) -> None:
        """Close the idle connections."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()

    async def _exchange(
        self,
        connection: "_Connection",
        idle: list["_Connection"],
        request: httpx.Request,
        content: bytes,
        seconds: float | None,
    ) -> httpx.Response:
        status, headers, body = await connection.exchange(request, content, seconds)
        if connection.reusable:
            idle.append(connection)
        headers, body = _unpacked(headers, body)
        return httpx.Response(status, headers=headers, content=body, request=request)

    async def _connect(self, origin: _Origin, seconds: float | None) -> "_Connection":
        scheme, host, port = origin
        if scheme not in _DEFAULT_PORTS:
            raise httpx.UnsupportedProtocol(f"{scheme!r} is neither http nor https")
        if scheme == "https" and self._ssl_context is None:
            self._ssl_context = httpx.create_ssl_context()
        context = self._ssl_context if scheme == "https" else None
        try:
            async with asyncio.timeout(seconds):
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection, host, port, ssl=context, happy_eyeballs_delay=_HAPPY_EYEBALLS_SECONDS
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection within {seconds:g} s") from error
        except OSError as error:
            raise httpx.ConnectError(str(error) or type(error).__name__) from error
        return connection


def _unpacked(headers: list[tuple[bytes, bytes]], body: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Decompress a body, to at most as many bytes as a response may have.

    Raises:
        httpx.DecodingError: it is longer, or not compressed as its headers say.
    """
    encodings = [value.lower() for name, value in headers if name.lower() == b"content-encoding"]
    if not encodings or encodings == [b"identity"]:
        return headers, body
    if encodings not in ([b"gzip"], [b"deflate"]):
        raise httpx.DecodingError(f"the answer is compressed as {b', '.join(encodings)[:40]!r}, unasked")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # finds out which of the two
    try:
        unpacked = unpacker.decompress(body, _MAX_RESPONSE_BYTES)
    except zlib.error as error:
        raise httpx.DecodingError(f"the answer cannot be decompressed: {error}") from None
    if unpacker.unconsumed_tail:
        raise httpx.DecodingError(f"the answer is longer than {_MAX_RESPONSE_BYTES} bytes")
    kept = [(n, v) for n, v in headers if n.lower() not in (b"content-encoding", b"content-length")]
    return kept, unpacked


def _newest_open(idle: list["_Connection"]) -> "_Connection | None":
    """Remove and return the most recently used open connection of `idle`."""
    while idle:
        connection = idle.pop()
        if connection.reusable:
            return connection
    return None


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT)
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[_Answer] | None = None
        self._response: h11.Response | None = None
        self._body: list[bytes] = []
        self._body_length = 0
        self._idle_since = 0.0
        # Whether a byte of the response has arrived, and how long the connection was idle before, in seconds.
        self.heard = False
        self.idle_seconds = 0.0

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent."""
        return (
            self._transport is not None
            and not self._transport.is_closing()
            and self._http.our_state is h11.IDLE
        )

    async def exchange(self, request: httpx.Request, content: bytes, seconds: float | None) -> _Answer:
        """Send a request and wait for its response for at most `seconds`."""
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self.heard, self.idle_seconds = False, loop.time() - self._idle_since
        self._response, self._body, self._body_length = None, [], 0
        answer = self._answer = loop.create_future()
        timer = None
        if seconds is not None:
            silence = httpx.ReadTimeout(f"no answer within {seconds:g} s")
            timer = loop.call_later(seconds, self._fail, silence)
        try:
            self._transport.write(self._bytes_of(request, content))
            return await answer
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from error
        finally:
            self._answer = None
            if timer is not None:
                timer.cancel()
            if not answer.done() or answer.cancelled() or answer.exception() is not None:
                self._transport.abort()

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # unsolicited bytes
            self.close()
            return
        self.heard = True
        self._http.receive_data(data)
        self._read()

    def eof_received(self) -> bool:
        if self._answer is not None:
            self._http.receive_data(b"")
            self._read()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(httpx.ReadError(str(exc) if exc else "the connection was closed before the answer"))

    def _bytes_of(self, request: httpx.Request, content: bytes) -> bytes:
        head = h11.Request(
            method=request.method.encode(), target=request.url.raw_path, headers=request.headers.raw
        )
        parts = [self._http.send(head)]
        if content:
            parts.append(self._http.send(h11.Data(data=content)))
        parts.append(self._http.send(h11.EndOfMessage()))
        return b"".join(part for part in parts if part)

    def _read(self) -> None:
        """Process the received data, and finish the response once it is complete."""
        try:
            while self._answer is not None and not self._answer.done():
                event = self._http.next_event()
                if isinstance(event, h11.Data):
                    self._take(bytes(event.data))
                elif isinstance(event, h11.Response):
                    self._response = event
                elif isinstance(event, h11.EndOfMessage):
                    self._finish()
                elif not isinstance(event, h11.InformationalResponse):
                    return
        except h11.RemoteProtocolError as error:
            self._fail(httpx.RemoteProtocolError(str(error)))

    def _take(self, data: bytes) -> None:
        self._body.append(data)
        self._body_length += len(data)
        if self._body_length > _MAX_RESPONSE_BYTES:
            self._fail(httpx.RemoteProtocolError(f"the answer is longer than {_MAX_RESPONSE_BYTES} bytes"))

    def _finish(self) -> None:
        assert self._answer is not None and self._response is not None and self._transport is not None
        response = self._response
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self.close()
        self._idle_since = asyncio.get_running_loop().time()
        self._answer.set_result(
            (response.status_code, list(response.headers.raw_items()), b"".join(self._body))
        )

    def _fail(self, error: httpx.TransportError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
