"""Requests and answers of the OpenAI API, as JSON and as the data that rollouts need."""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from iiverl_core.message_parts import plain_content
from iiverl_core.rollout.turns import Message
from iiverl_core.samples import FinishReason

MODEL = "policy"
"""The model's name; requests may use any."""

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
"""Parameters that are not followed, since the run decides how responses are sampled."""

_UNSUPPORTED = ("stop", "logit_bias", "functions", "function_call", "suffix", "echo")
_MAX_RESPONSES = 128

B = TypeVar("B", bound=BaseModel)


class APIError(Exception):
    """An error that the client gets, in OpenAI's format and with an HTTP status."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Ask for `n` responses to messages in the form that chat templates read.

    `reads_calls` says whether calls of the tools are wanted as such, `log_probs` whether tokens are, and `sampling` what
    the client asks for but does not get.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    n: int = 1
    max_tokens: int | None = None
    reads_calls: bool = False
    log_probs: bool = False
    sampling: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Ask for `n` responses to each of some prompts: texts, or tokens."""

    prompts: Sequence[str | list[int]]
    n: int = 1
    max_tokens: int | None = None
    log_probs: bool = False
    sampling: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A response as a message; if they were asked for, with the text and the log-prob of each of its tokens."""

    message: Message
    finish_reason: FinishReason
    prompt_tokens: int
    response_tokens: int
    tokens: Sequence[str] = ()
    log_probs: Sequence[float] = ()


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Sampled(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str = MODEL
    n: int | None = Field(default=None, ge=1, le=_MAX_RESPONSES)
    max_tokens: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    def sampling(self) -> dict[str, float]:
        """Return the parameters that are not followed.

        Raises:
            APIError: a parameter is set without which the client would misread the response.
        """
        extra = self.model_extra or {}
        for name in _UNSUPPORTED:
            if extra.get(name) not in (None, [], {}, False, ""):
                raise APIError(f"{name} is not supported.", code="unsupported_parameter")
        return {name: extra[name] for name in SAMPLING if isinstance(extra.get(name), int | float)}

    def _envelope(self, kind: str, prefix: str, answers: Sequence[Answer]) -> dict[str, Any]:
        written = sum(answer.response_tokens for answer in answers)
        read = answers[0].prompt_tokens
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "usage": usage,
        }

    def _usage_chunk(self, head: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        if self.stream_options and self.stream_options.include_usage:
            yield {**head, "choices": []}


class ChatBody(_Sampled):
    """The body of `POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def request(self) -> ChatRequest:
        """Return what it asks for.

        Raises:
            APIError: something that is not supported, or messages that are invalid.
        """
        if self.tool_choice not in (None, "auto", "none"):
            raise APIError("tool_choice has to be auto or none.", code="unsupported_parameter")
        if isinstance(self.response_format, Mapping) and self.response_format.get("type") != "text":
            raise APIError("response_format has to be text.", code="unsupported_parameter")
        if self.top_logprobs:
            raise APIError("top_logprobs is not supported.", code="unsupported_parameter")
        sampling = self.sampling()
        messages = [_message(each, number) for number, each in enumerate(self.messages)]
        if messages[-1]["role"] == "assistant":
            raise APIError("The last message is the assistant's; the model answers those of others.")
        return ChatRequest(
            messages,
            self.tools or (),
            self.n or 1,
            self.max_completion_tokens or self.max_tokens,
            bool(self.tools) and self.tool_choice != "none",
            bool(self.logprobs),
            sampling,
        )

    def answer(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the answer to a request without `stream`."""
        choices = []
        for index, answer in enumerate(answers):
            content, calls = answer.message["content"], answer.message.get("tool_calls")
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            reason: str = answer.finish_reason
            if calls:
                message |= {"content": content or None, "tool_calls": [_written_call(call) for call in calls]}
                reason = "tool_calls" if reason == "stop" else reason
            log_probs = {"content": _token_log_probs(answer), "refusal": None} if self.logprobs else None
            choices.append(
                {"index": index, "message": message, "logprobs": log_probs, "finish_reason": reason}
            )
        return {**self._envelope("chat.completion", "chatcmpl", answers), "choices": choices}

    def chunks(self, answer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
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
        yield from self._usage_chunk(head)


class TextBody(_Sampled):
    """The body of `POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None

    def request(self) -> TextRequest:
        """Return what it asks for.

        Raises:
            APIError: something that is not supported, or no prompt.
        """
        sampling = self.sampling()
        prompts: Any = self.prompt
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        if not prompts or not all(prompts):
            raise APIError("The prompt is empty.")
        n = self.n or 1
        if n * len(prompts) > _MAX_RESPONSES:
            raise APIError(f"{n * len(prompts)} responses are asked for; at most {_MAX_RESPONSES} may be.")
        return TextRequest(prompts, n, self.max_tokens, self.logprobs is not None, sampling)

    def answer(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the answer to a request without `stream`."""
        choices = []
        for index, answer in enumerate(answers):
            log_probs = None
            if self.logprobs is not None:
                log_probs = {
                    "tokens": list(answer.tokens),
                    "token_logprobs": list(answer.log_probs),
                    "top_logprobs": None,
                    "text_offset": None,
                }
            text, reason = answer.message["content"], answer.finish_reason
            choices.append({"index": index, "text": text, "logprobs": log_probs, "finish_reason": reason})
        return {**self._envelope("text_completion", "cmpl", answers), "choices": choices}

    def chunks(self, answer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield an answer in parts, one for each choice."""
        for choice in answer["choices"]:
            yield {**answer, "choices": [choice], "usage": None}
        yield from self._usage_chunk(answer)


def parse(kind: type[B], body: bytes) -> B:
    """Parse a body. What it holds is not nested deeply, and its texts can be encoded.

    Raises:
        APIError: it is not JSON, or has a value that is invalid.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise APIError(f"{place}: {first['msg']}" if place else first["msg"]) from error


def models() -> dict[str, Any]:
    """Return the answer to `GET /v1/models`."""
    return {"object": "list", "data": [model()]}


def model() -> dict[str, Any]:
    """Return the answer to `GET /v1/models/NAME`."""
    return {"id": MODEL, "object": "model", "created": 0, "owned_by": "iiverl"}


def _message(written: Mapping[str, Any], number: int) -> Message:
    """Convert a message of the API to the form that chat templates read."""
    role, content = written.get("role"), written.get("content")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant", "tool"):
        raise APIError(f"messages[{number}] has the role {role!r}.")
    if isinstance(content, list):
        content = _content(content, number)
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str | list):
        raise APIError(f"messages[{number}] has no text as its content.")
    message: dict[str, Any] = {"role": role, "content": content}
    for name in ("name", "tool_call_id"):
        if isinstance(written.get(name), str):
            message[name] = written[name]
    if calls := written.get("tool_calls"):
        try:
            message["tool_calls"] = [_call(each) for each in calls]
        except (TypeError, KeyError, ValueError) as error:
            raise APIError(f"messages[{number}] has tool_calls that cannot be read: {error}") from error
    return message


def _content(parts: list[Any], number: int) -> str | list[dict[str, Any]]:
    """Return the parts of a message's content as `message_parts.plain_content` does."""
    try:
        content = plain_content(parts)
    except ValueError as error:
        raise APIError(f"messages[{number}] {error}.") from error
    for part in content if isinstance(content, list) else ():
        if part["type"] == "image" and not part["image"].startswith("data:"):
            raise APIError(f"messages[{number}] has an image that is not a data URL.")
    return content


def _call(written: Mapping[str, Any]) -> dict[str, Any]:
    function = written["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = from_json(arguments or "{}", allow_inf_nan=False)
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not an object")
    return {
        "type": "function",
        "id": str(written["id"]),
        "function": {"name": str(function["name"]), "arguments": arguments},
    }


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
