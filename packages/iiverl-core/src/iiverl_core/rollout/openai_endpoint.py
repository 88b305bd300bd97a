"""An HTTP server that speaks the OpenAI API for the rollouts of this process."""

import asyncio
import json
import secrets
import socket
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from iiverl_core.rollout.turns import Message
from iiverl_core.samples import FinishReason

T = TypeVar("T")

MODEL = "policy"
"""The model's name in answers; requests may use any."""

_KEEP_ALIVE_S = 75  # longer than clients keep a connection, so that they close it
_BACKLOG = 2048
_IGNORED = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_UNSUPPORTED = ("stop", "logit_bias", "functions", "function_call", "suffix", "echo", "best_of")
_MAX_N = 128


class APIError(Exception):
    """What a client is told in OpenAI's format, with an HTTP status."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Ask for `n` responses to messages in the form that chat templates read.

    `reads_calls` says whether calls of the tools are wanted as such.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    n: int = 1
    max_tokens: int | None = None
    reads_calls: bool = False


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Ask for `n` responses to each of some prompts: texts, or tokens."""

    prompts: Sequence[str | list[int]]
    n: int = 1
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A response as a message, with the text and the log-prob of each of its tokens."""

    message: Message
    finish_reason: FinishReason
    prompt_tokens: int
    tokens: Sequence[str]
    log_probs: Sequence[float]


class Session(Protocol):
    """Answers the requests of one rollout, on the event loop of the rollouts. Both methods raise `APIError`."""

    async def chat(self, request: ChatRequest) -> list[Answer]:
        """Answer messages."""
        ...

    async def complete(self, request: TextRequest) -> list[Answer]:
        """Answer texts."""
        ...

    def ignores(self, name: str, value: float) -> None:
        """Note a sampling parameter of a request, in whose place the run's is used."""
        ...


@dataclass(eq=False)
class Address:
    """Where one session is reached."""

    base_url: str
    api_key: str
    session: Session
    loop: asyncio.AbstractEventLoop
    ended: bool = False
    waiting: set[asyncio.Future[Any]] = field(default_factory=set)


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
        assert self._loop is not None
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
        app.add_exception_handler(APIError, _told)
        app.add_exception_handler(RequestValidationError, _told)
        app.add_exception_handler(HTTPException, _told)

        @app.get("/{name}/v1/models")
        async def models(name: str, request: Request) -> Response:
            self._address(name, request)
            return JSONResponse({"object": "list", "data": [_model()]})

        @app.get("/{name}/v1/models/{model:path}")
        async def model(name: str, model: str, request: Request) -> Response:
            self._address(name, request)
            return JSONResponse(_model())

        @app.post("/{name}/v1/chat/completions")
        async def chat(name: str, asked: _Chat, request: Request) -> Response:
            address = self._address(name, request)
            _check(asked, address.session)
            answers = await self._await(address, address.session.chat(_chat_request(asked)))
            answer = _chat_answer(asked, answers)
            return _streamed(_chat_chunks(asked, answer)) if asked.stream else JSONResponse(answer)

        @app.post("/{name}/v1/completions")
        async def completions(name: str, asked: _Text, request: Request) -> Response:
            address = self._address(name, request)
            _check(asked, address.session)
            answers = await self._await(address, address.session.complete(_text_request(asked)))
            answer = _text_answer(asked, answers)
            return _streamed(_text_chunks(asked, answer)) if asked.stream else JSONResponse(answer)

        return app

    def _address(self, name: str, request: Request) -> Address:
        address = self._addresses.get(name)
        if address is None:
            raise APIError("There is no such rollout, or it has ended.", status=404, code="rollout_ended")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), address.api_key.encode()):
            raise APIError("The API key is not this rollout's.", status=401, code="invalid_api_key")
        return address

    async def _await(self, address: Address, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the session's event loop, and await its result on the server's."""
        try:
            running: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, address.loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
            raise APIError("The rollout has ended.", status=404, code="rollout_ended") from None
        future = asyncio.wrap_future(running)
        address.waiting.add(future)
        if address.ended:
            future.cancel()
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled():
                raise
            raise APIError("The rollout has ended.", status=404, code="rollout_ended") from None
        finally:
            address.waiting.discard(future)


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Sampled(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = MODEL
    n: int | None = Field(default=None, ge=1, le=_MAX_N)
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class _Chat(_Sampled):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class _Text(_Sampled):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None


def _check(asked: _Sampled, session: Session) -> None:
    """Tell the session about ignored parameters.

    Raises:
        APIError: a parameter is set that would change what is sampled, or text that cannot be encoded is sent.
    """
    extra = asked.model_extra or {}
    for name in _UNSUPPORTED:
        if extra.get(name) not in (None, [], {}, False, ""):
            raise APIError(f"{name} is not supported.", code="unsupported_parameter")
    for name in _IGNORED:
        if isinstance(extra.get(name), int | float):
            session.ignores(name, extra[name])
    try:
        json.dumps(asked.model_dump(), ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise APIError(f"The request has text that cannot be encoded: {error}") from error


def _chat_request(asked: _Chat) -> ChatRequest:
    choice = asked.tool_choice
    if choice not in (None, "auto", "none"):
        raise APIError("tool_choice has to be auto or none.", code="unsupported_parameter")
    if isinstance(asked.response_format, Mapping) and asked.response_format.get("type") != "text":
        raise APIError("response_format has to be text.", code="unsupported_parameter")
    if asked.top_logprobs:
        raise APIError("top_logprobs is not supported.", code="unsupported_parameter")
    messages = [_message(each, number) for number, each in enumerate(asked.messages)]
    if messages[-1]["role"] == "assistant":
        raise APIError("The last message is the assistant's; the model answers those of others.")
    return ChatRequest(
        messages,
        asked.tools or (),
        asked.n or 1,
        asked.max_completion_tokens or asked.max_tokens,
        bool(asked.tools) and choice != "none",
    )


def _text_request(asked: _Text) -> TextRequest:
    prompts: Any = asked.prompt
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    if not prompts or not all(prompts):
        raise APIError("The prompt is empty.")
    return TextRequest(prompts, asked.n or 1, asked.max_tokens)


def _message(written: Mapping[str, Any], number: int) -> Message:
    """Convert a message of the API to the form that chat templates read."""
    role, content = written.get("role"), written.get("content")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant", "tool"):
        raise APIError(f"messages[{number}] has the role {role!r}.")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise APIError(f"messages[{number}] has content other than text.")
        content = "".join(texts)
    calls = written.get("tool_calls") or []
    if not isinstance(content, str) and (content is not None or not calls):
        raise APIError(f"messages[{number}] has no text as its content.")
    message: dict[str, Any] = {"role": role, "content": content or ""}
    for name in ("name", "tool_call_id"):
        if isinstance(written.get(name), str):
            message[name] = written[name]
    if calls:
        try:
            message["tool_calls"] = [_call(each) for each in calls]
        except (TypeError, KeyError, ValueError) as error:
            raise APIError(f"messages[{number}] has tool_calls that cannot be read: {error}") from error
    return message


def _call(written: Mapping[str, Any]) -> dict[str, Any]:
    function = written["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {
        "type": "function",
        "id": str(written["id"]),
        "function": {"name": str(function["name"]), "arguments": arguments},
    }


def _model() -> dict[str, Any]:
    return {"id": MODEL, "object": "model", "created": 0, "owned_by": "iiverl"}


def _envelope(asked: _Sampled, kind: str, prefix: str, answers: Sequence[Answer]) -> dict[str, Any]:
    written = sum(len(answer.tokens) for answer in answers)
    read = answers[0].prompt_tokens
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": asked.model,
        "usage": usage,
    }


def _chat_answer(asked: _Chat, answers: Sequence[Answer]) -> dict[str, Any]:
    choices = []
    for index, answer in enumerate(answers):
        content, calls = answer.message["content"], answer.message.get("tool_calls")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        reason: str = answer.finish_reason
        if calls:
            message |= {"content": content or None, "tool_calls": [_written_call(call) for call in calls]}
            reason = "tool_calls" if reason == "stop" else reason
        log_probs = {"content": _token_log_probs(answer), "refusal": None} if asked.logprobs else None
        choices.append({"index": index, "message": message, "logprobs": log_probs, "finish_reason": reason})
    return {**_envelope(asked, "chat.completion", "chatcmpl", answers), "choices": choices}


def _written_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _token_log_probs(answer: Answer) -> list[dict[str, Any]]:
    return [
        {"token": token, "bytes": list(token.encode()), "logprob": log_prob, "top_logprobs": []}
        for token, log_prob in zip(answer.tokens, answer.log_probs, strict=True)
    ]


def _text_answer(asked: _Text, answers: Sequence[Answer]) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": answer.message["content"],
            "logprobs": None
            if asked.logprobs is None
            else {
                "tokens": list(answer.tokens),
                "token_logprobs": list(answer.log_probs),
                "top_logprobs": None,
                "text_offset": None,
            },
            "finish_reason": answer.finish_reason,
        }
        for index, answer in enumerate(answers)
    ]
    return {**_envelope(asked, "text_completion", "cmpl", answers), "choices": choices}


def _chat_chunks(asked: _Chat, answer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield an answer in parts: for each choice its message, then its end."""
    head = {**answer, "object": "chat.completion.chunk"}
    for choice in answer["choices"]:
        message = {name: value for name, value in choice["message"].items() if name != "refusal"}
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        begun = {"index": choice["index"], "delta": message, "logprobs": choice["logprobs"]}
        ended = {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
        yield {**head, "choices": [{**begun, "finish_reason": None}], "usage": None}
        yield {**head, "choices": [ended], "usage": None}
    yield from _usage_chunk(asked, head)


def _text_chunks(asked: _Text, answer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for choice in answer["choices"]:
        yield {**answer, "choices": [choice], "usage": None}
    yield from _usage_chunk(asked, answer)


def _usage_chunk(asked: _Sampled, head: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if asked.stream_options and asked.stream_options.include_usage:
        yield {**head, "choices": []}


def _streamed(chunks: Iterator[dict[str, Any]]) -> Response:
    """Send chunks as server-sent events, when all of them are known: a response is generated as a whole."""
    events = (f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return StreamingResponse(_then_done(events), media_type="text/event-stream")


async def _then_done(events: Iterator[str]) -> Any:
    for event in events:
        yield event
    yield "data: [DONE]\n\n"


async def _told(request: Request, error: Exception) -> Response:
    """Answer an error in OpenAI's format."""
    status, code, message = 400, None, str(error)
    if isinstance(error, APIError):
        status, code = error.status, error.code
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        message = f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg']}"
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": code}}, status_code=status
    )
