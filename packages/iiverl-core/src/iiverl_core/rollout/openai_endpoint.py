"""An HTTP server that speaks the OpenAI API for the rollouts of this process."""

import asyncio
import json
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from iiverl_core.rollout.openai_messages import (
    Answer,
    APIError,
    ChatBody,
    ChatRequest,
    TextBody,
    TextRequest,
    model,
    models,
    parse,
)

T = TypeVar("T")

_KEEP_ALIVE_S = 75  # longer than clients keep a connection, so that they close it
_BACKLOG = 2048
_MAX_BODY_BYTES = 32 * 2**20


class Session(Protocol):
    """Answers the requests of one rollout, on the event loop of the rollouts. Both methods raise `APIError`.

    They are cancelled if the client goes away before the answer.
    """

    async def chat(self, request: ChatRequest) -> list[Answer]:
        """Answer messages."""
        ...

    async def complete(self, request: TextRequest) -> list[Answer]:
        """Answer texts."""
        ...


@dataclass(eq=False)
class Address:
    """Where one session is reached."""

    base_url: str
    api_key: str
    session: Session
    loop: asyncio.AbstractEventLoop
    ended: bool = False
    waiting: set[Future[Any]] = field(default_factory=set)


class Endpoint:
    """The server, on a free port of this machine alone, in a thread that the first session starts."""

    def __init__(self) -> None:
        self._addresses: dict[str, Address] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: uvicorn.Server | None = None
        self._port = 0

    def open(self, name: str, session: Session) -> Address:
        """Give the session of this event loop a URL and a key of its own; `name` becomes a part of the URL."""
        if self._thread is None:
            self._start()
        base_url = f"http://127.0.0.1:{self._port}/{name}/v1"
        address = Address(base_url, secrets.token_hex(16), session, asyncio.get_running_loop())
        self._addresses[name] = address
        return address

    def end(self, address: Address) -> None:
        """Refuse further requests at an address, and those that wait there."""
        address.ended = True
        self._addresses = {name: each for name, each in self._addresses.items() if each is not address}
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: [each.cancel() for each in address.waiting])

    def close(self) -> None:
        """End the server. May be called twice."""
        if self._thread is None or self._server is None:
            return
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._thread = self._server = self._loop = None

    def _start(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        # Connections inherit it, and answers are not delayed until the client acknowledges a packet.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._app(),
            ws="none",
            log_config=None,
            log_level="error",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        self._server = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._serve, args=(self._loop, self._server, listener), name="iiverl-openai", daemon=True
        )
        self._thread.start()

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop, server: uvicorn.Server, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner, listener:
            runner.run(server.serve(sockets=[listener]))

    def _app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)
        for error in (APIError, HTTPException, ClientDisconnect):
            app.add_exception_handler(error, _refuse)

        @app.get("/{name}/v1/models")
        async def list_models(name: str, request: Request) -> Response:
            self._address(name, request)
            return JSONResponse(models())

        @app.get("/{name}/v1/models/{id:path}")
        async def show_model(name: str, id: str, request: Request) -> Response:
            self._address(name, request)
            return JSONResponse(model())

        @app.post("/{name}/v1/chat/completions")
        async def chat(name: str, request: Request) -> Response:
            address = self._address(name, request)
            asked = parse(ChatBody, await _body(request))
            return await self._answer(asked, address, address.session.chat(asked.request()), request)

        @app.post("/{name}/v1/completions")
        async def completions(name: str, request: Request) -> Response:
            address = self._address(name, request)
            asked = parse(TextBody, await _body(request))
            return await self._answer(asked, address, address.session.complete(asked.request()), request)

        return app

    async def _answer(
        self,
        asked: ChatBody | TextBody,
        address: Address,
        answering: Coroutine[Any, Any, list[Answer]],
        request: Request,
    ) -> Response:
        answer = asked.answer(await self._await(address, answering, request))
        return _streamed(asked.chunks(answer)) if asked.stream else JSONResponse(answer)

    def _address(self, name: str, request: Request) -> Address:
        address = self._addresses.get(name)
        if address is None:
            raise _ended()
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), address.api_key.encode()):
            raise APIError("The API key is not this rollout's.", status=401, code="invalid_api_key")
        return address

    async def _await(self, address: Address, coroutine: Coroutine[Any, Any, T], request: Request) -> T:
        """Run a coroutine on the session's event loop, and await its result on the server's.

        Raises:
            APIError: the rollout has ended.
            ClientDisconnect: the client has gone, and the coroutine is cancelled.
        """
        try:
            running: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, address.loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
            raise _ended() from None
        gone = asyncio.ensure_future(_cancel_when_gone(running, request))
        address.waiting.add(running)
        if address.ended:
            running.cancel()
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            if not running.cancelled():
                raise  # the server ends
            raise (ClientDisconnect() if gone.done() else _ended()) from None
        finally:
            address.waiting.discard(running)
            running.cancel()
            gone.cancel()


def _ended() -> APIError:
    return APIError("There is no such rollout, or it has ended.", status=404, code="rollout_ended")


async def _body(request: Request) -> bytes:
    """Read the body of a request.

    Raises:
        APIError: it is too large.
        ClientDisconnect: it is incomplete.
    """
    size, parts = 0, []
    with suppress(ValueError):
        size = int(request.headers.get("content-length", ""))
    _check_size(size)
    size = 0
    async for part in request.stream():
        size += len(part)
        _check_size(size)
        parts.append(part)
    return b"".join(parts)


def _check_size(size: int) -> None:
    if size > _MAX_BODY_BYTES:
        raise APIError(f"The body of a request may have {_MAX_BODY_BYTES} bytes.", status=413)


async def _cancel_when_gone(running: Future[Any], request: Request) -> None:
    """Cancel the answer to a request once its client has closed the connection.

    That happens before a request that the client makes next is read, so that the session knows of it by then.
    """
    while (await request.receive())["type"] != "http.disconnect":
        pass
    running.cancel()


def _streamed(chunks: Iterator[dict[str, Any]]) -> Response:
    """Send chunks as server-sent events, when all of them are known: a response is generated as a whole."""

    async def events() -> AsyncIterator[str]:
        for chunk in chunks:
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer an error in OpenAI's format."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, HTTPException):
        error = APIError(str(error.detail), status=error.status_code)
    assert isinstance(error, APIError)
    # What is left of a body that is too large is not read, so nothing else can follow it.
    headers = {"Connection": "close"} if error.status == 413 else None
    return JSONResponse(error.body, error.status, headers)
