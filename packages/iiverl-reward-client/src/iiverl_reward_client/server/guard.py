"""Middleware that checks the token and size of each request, and counts responses."""

import asyncio
import hmac

from prometheus_client import Counter
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/ping", "/v1/health")
_BODY_SECONDS = 60.0


class Guard:
    """Rejects requests without the token (401), too large (413), or too slow in sending their body (408).

    The body is read before anything else, and never more than `max_body_bytes` of it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        max_body_bytes: int,
        requests: Counter,
        paths: frozenset[str],
    ) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._max_body_bytes = max_body_bytes
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
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await self._body(headers, receive)
        except TimeoutError:
            await JSONResponse({"detail": "the request's body did not arrive in time"}, 408)(
                scope, receive, counted
            )
            return
        if body is None:
            detail = f"the request's body exceeds {self._max_body_bytes} bytes; send fewer samples at a time"
            await JSONResponse({"detail": detail}, 413, {"Connection": "close"})(scope, receive, counted)
            return
        await self._app(scope, _replayed(body, receive), counted)

    def _allowed(self, given: bytes) -> bool:
        return self._expected is None or hmac.compare_digest(given, self._expected)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Read the body; None if it is too large."""
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            return None
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_body_bytes:
                return None
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


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
