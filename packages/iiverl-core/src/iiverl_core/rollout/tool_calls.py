"""Read the calls of tools that models write, each family in its own format.

A format is a function of a response's text, with special tokens but without the end token, and of the number of calls
before it in the conversation. It never raises: a call that cannot be read is a `BadCall`, which becomes a message
to the model.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")  # what Mistral's templates accept
_SURROGATE = re.compile("[\ud800-\udfff]")
_HARMONY_TOKEN = re.compile(r"<\|(?:start|end|message|channel|constrain|return|call)\|>")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of the function `name` with keyword arguments; `id` is unique in a conversation."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadCall:
    """A call that cannot be read; `reason` completes a sentence that begins with "The call"."""

    reason: str


@dataclass(frozen=True, slots=True)
class ReadResponse:
    """A response as a message for chat templates, and the calls in it, in order."""

    message: Mapping[str, Any]
    calls: tuple[ToolCall | BadCall, ...] = ()


class ToolFormat(Protocol):
    """Reads the calls in a response; `calls_before` counts those in earlier responses."""

    def __call__(self, text: str, calls_before: int) -> ReadResponse:
        """Return the response as a message, and its calls."""
        ...


def hermes(text: str, calls_before: int) -> ReadResponse:
    """Read `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Hermes and Qwen write it, after any reasoning."""
    reasoning, end, answer = text.rpartition("</think>")
    if not end and "<think>" in text:
        return _without_calls(text)
    content, tag, rest = answer.partition("<tool_call>")
    if not tag:
        return _without_calls(text)
    parts = [part.partition("</tool_call>")[0] for part in rest.split("<tool_call>")]
    calls = [_call(_parsed(part), calls_before + number) for number, part in enumerate(parts)]
    return _response(text, reasoning + end + content.rstrip("\n"), calls)


def llama3_json(text: str, calls_before: int) -> ReadResponse:
    """Read a response that consists of `{"name": …, "parameters": {…}}`, or several separated by semicolons."""
    rest = text.strip()
    tagged = rest.startswith("<|python_tag|>")
    rest = rest.removeprefix("<|python_tag|>").strip()
    if not tagged and not re.match(r'\{\s*"(name|type)"', rest):
        return _without_calls(text)
    calls: list[ToolCall | BadCall] = []
    while rest:
        value, rest = _first_value(rest)
        calls.append(_call(value, calls_before + len(calls)))
        rest = rest.strip().removeprefix(";").strip()
    return _response(text, "", calls or [BadCall("is empty")])


def mistral(text: str, calls_before: int) -> ReadResponse:
    """Read `[TOOL_CALLS]` and a list of `{"name": …, "arguments": {…}}`, or `name[ARGS]{…}` as of version 11."""
    content, tag, rest = text.partition("[TOOL_CALLS]")
    if not tag:
        return _without_calls(text)
    rest = rest.strip()
    if rest.startswith("["):
        value = _parsed(rest)
        items: Sequence[Any] = value if isinstance(value, list) else [value]
        calls = [_call(item, calls_before + number) for number, item in enumerate(items)]
        return _response(text, content.strip(), calls or [BadCall("is an empty list")])
    calls = []
    for part in rest.split("[TOOL_CALLS]"):
        name, brace, arguments = part.partition("{")
        name = name.partition("[ARGS]")[0].partition("[CALL_ID]")[0].strip()
        value = _parsed(brace + arguments)
        item = value if isinstance(value, BadCall) else {"name": name, "arguments": value}
        calls.append(_call(item, calls_before + len(calls)))
    return _response(text, content.strip(), calls)


def gpt_oss(text: str, calls_before: int) -> ReadResponse:
    """Read messages in the channels of harmony, of which those to `functions.NAME` are calls.

    The message has the last channel for the user as `content` and the analysis as `thinking`.
    """
    content: list[str] = []
    thinking: list[str] = []
    calls: list[ToolCall | BadCall] = []
    for header, body in _harmony_messages(text):
        recipient = re.search(r"\bto=functions\.([^\s<]+)", header)
        if recipient is not None:
            value = _parsed(body)
            item = value if isinstance(value, BadCall) else {"name": recipient[1], "arguments": value}
            calls.append(_call(item, calls_before + len(calls)))
            if isinstance(calls[-1], BadCall):
                content.append(body)
        elif "<|channel|>analysis" in header:
            thinking.append(body)
        else:
            content.append(body)
    fields = {"thinking": "\n".join(thinking)} if thinking else {}
    written = "\n".join(content)
    return _response(written, written, calls, **fields)


def _harmony_messages(text: str) -> Iterator[tuple[str, str]]:
    """Yield header and body of each message; the first one's `<|start|>assistant` is the prompt's."""
    for part in re.split(r"<\|(?:end|return|call)\|>", text):
        header, message, body = part.partition("<|message|>")
        if not message:
            header, body = "", header
        body = _HARMONY_TOKEN.sub("", body)
        if message or body.strip():
            yield header, body


def _response(text: str, content: str, calls: Sequence[ToolCall | BadCall], **fields: str) -> ReadResponse:
    """Make the response to which `calls` belong; if any is bad, the message is the whole text."""
    message: dict[str, Any] = {"role": "assistant", "content": text, **fields}
    good = [call for call in calls if isinstance(call, ToolCall)]
    if calls and len(good) == len(calls):
        message["content"] = content
        message["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in good
        ]
    return ReadResponse(message, tuple(calls))


def _without_calls(text: str) -> ReadResponse:
    return ReadResponse({"role": "assistant", "content": text})


def _call(value: Any, number: int) -> ToolCall | BadCall:
    """Make a call of parsed JSON."""
    if isinstance(value, BadCall):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping):
        return BadCall("is not a JSON object")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return BadCall('has no "name" of a function')
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _parsed(arguments)
    if isinstance(arguments, BadCall):
        return arguments
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        return BadCall('has "arguments" that are not a JSON object')
    id = value.get("id")
    return ToolCall(
        id if isinstance(id, str) and _CALL_ID.fullmatch(id) else f"call{number:05}", name, arguments
    )


def _parsed(text: str) -> Any:
    """Parse JSON; a `BadCall` if the text is none."""
    value, rest = _first_value(text.strip())
    return BadCall(f"has more than JSON: {rest.strip()[:40]!r}") if rest.strip() else value


def _first_value(text: str) -> tuple[Any, str]:
    """Parse the JSON value at the beginning; returns it, or a `BadCall`, and the rest of the text."""
    try:
        value, end = _DECODER.raw_decode(text)
        if _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            return BadCall("has half a character in a string"), ""
    except (ValueError, RecursionError) as error:
        return BadCall(f"is not valid JSON: {error}"), ""
    return value, text[end:]


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_DECODER = json.JSONDecoder(parse_constant=_no_number)
