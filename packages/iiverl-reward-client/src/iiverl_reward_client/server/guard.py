"""Middleware that checks the token and size of each request, and counts responses."""

import asyncio
import hmac

from prometheus_client import Counter
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/ping", "/v1/health")
BODY_PATHS = ("/reward", "/v1/rewards")
_BODY_SECONDS = 60.0
_READ_AGAIN_SECONDS = "1"  # Retry-After, if other bodies take all the memory that there is for them


class Guard:
    """Rejects requests without the token (401), too large (413), or too slow in sending their body (408).

    Only `BODY_PATHS` have a body, which is read before anything else, after the token; never more than `max_body_bytes`
    of it, and never more than `max_bodies_bytes` of all requests that are being handled (503).
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        max_body_bytes: int,
        max_bodies_bytes: int,
        requests: Counter,
        paths: frozenset[str],
    ) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._max_body_bytes = max_body_bytes
        self._max_bodies_bytes = max(max_body_bytes, max_bodies_bytes)
        self._bodies_bytes = 0
        self._requests = requests
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle an ASGI request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        label = path if path in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.labels(label, str(message["status"])).inc()
            await send(message)

        headers = dict(scope["headers"])
        if path not in OPEN_PATHS and not self._allowed(headers.get(b"authorization", b"")):
            refusal = JSONResponse(
                {"detail": "this server wants its bearer token"}, 401, {"WWW-Authenticate": "Bearer"}
            )
            await refusal(scope, receive, counted)
            return
        if path not in BODY_PATHS or scope["method"] != "POST":
            await self._app(scope, _replayed(b"", receive), counted)
            return
        body = _Body(self)
        try:
            try:
                async with asyncio.timeout(_BODY_SECONDS):
                    content = await body.read(headers, receive)
            except TimeoutError:
                await _refuse(408, "the request's body did not arrive in time")(scope, receive, counted)
            except _TooLargeError:
                detail = (
                    f"the request's body exceeds {self._max_body_bytes} bytes; send fewer samples at a time"
                )
                await _refuse(413, detail)(scope, receive, counted)
            except _TooManyError:
                await _refuse(503, "the server is busy with other requests' bodies")(scope, receive, counted)
            else:
                await self._app(scope, _replayed(content, receive), counted)
        finally:
            body.release()

    def reserve(self, size: int, more: int) -> None:
        """Reserve memory for `more` bytes of a body of which there are `size`.

        Raises:
            _TooLargeError: the body is too large.
            _TooManyError: all bodies together are.
        """
        if size + more > self._max_body_bytes:
            raise _TooLargeError
        if self._bodies_bytes + more > self._max_bodies_bytes:
            raise _TooManyError
        self._bodies_bytes += more

    def release(self, size: int) -> None:
        """Free reserved memory."""
        self._bodies_bytes -= size

    def _allowed(self, given: bytes) -> bool:
        if self._token is None:
            return True
        scheme, _, token = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token, self._token)


class _TooLargeError(Exception):
    """A request's body is too large."""


class _TooManyError(Exception):
    """The bodies of all requests are too large together."""


class _Body:
    """A request's body, and the memory that is reserved for it."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._reserved = 0

    async def read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Read all of it; see `Guard.reserve` for what it raises."""
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit():
            self._reserve(int(declared))
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            part = message.get("body", b"")
            size += len(part)
            self._reserve(size)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def release(self) -> None:
        """Free the memory."""
        self._guard.release(self._reserved)
        self._reserved = 0

    def _reserve(self, size: int) -> None:
        if size > self._reserved:
            self._guard.reserve(self._reserved, size - self._reserved)
            self._reserved = size


def _refuse(status: int, detail: str) -> JSONResponse:
    headers = {"Connection": "close"}
    if status == 503:
        headers["Retry-After"] = _READ_AGAIN_SECONDS
    return JSONResponse({"detail": detail}, status, headers)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Replay the body, and then receive further messages, such as a disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
