"""A process that calls tools of the user's: Python functions that a model may call.

It imports neither torch nor the rest of iiverl, unless the user's file does. `rollout/tool_pool.py` starts it as a
`UserProcess` and sends one `Setup` and then `Call`s; each is answered by a `Reply`, whose value is the functions' schemas
for the setup, and a `Result` for a call.
"""

import asyncio
import enum
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

from iiverl_core.errors import ConfigError
from iiverl_core.message_parts import has_image, plain_content
from iiverl_core.python_files import find_callable, load_file
from iiverl_core.user_process import (
    USER_ERRORS,
    Reply,
    awaited,
    begin,
    bound_output,
    read_message,
    seed_random,
    write_answer,
)

SECTION = "multi_turn.tools"

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Setup:
    """The functions `names` of the file at `path`, if there is one, and the tools of MCP servers."""

    search_path: list[str]
    path: str | None
    names: Sequence[str]
    servers: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function; random numbers that it draws depend on `seed` alone."""

    id: int
    seed: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """What the model sees of its call: the returned value as text or parts (`message_parts`), or an error."""

    content: str | list[dict[str, Any]]
    is_error: bool = False


def main(lifeline_fd: int, shared_fd: int) -> None:
    """Answer calls until the process that started this one is gone."""
    calls, replies, _ = begin(lifeline_fd, shared_fd)
    setup: Setup = read_message(calls)
    sys.path[:] = setup.search_path
    with asyncio.Runner() as runner:
        try:
            tools, schemas = _load(setup, runner)
        except ConfigError as error:
            write_answer(replies, Reply(0, str(error)))
            return
        write_answer(replies, Reply(0, value=schemas))
        while (call := read_message(calls)) is not None:
            seed_random(call.seed)
            tool = tools[call.name]
            result = _result(tool, call, runner) if callable(tool) else _answer(tool, call, runner)
            bound_output()
            write_answer(replies, Reply(call.id, value=result))


def _load(setup: Setup, runner: asyncio.Runner) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Load functions and start servers; return by name which of them has a tool, and the schemas of all.

    Raises:
        ConfigError: a function or a server cannot be used, or two tools have the same name.
    """
    tools: dict[str, Any] = {}
    schemas = []
    if setup.path is not None:
        path, module = load_file(setup.path, f"{SECTION}.path")
        tools = {name: find_callable(path, module, name, f"{SECTION}.names") for name in setup.names}
        schemas = [schema_of(name, function) for name, function in tools.items()]
    for name, parameters in setup.servers.items():
        from iiverl_core.mcp_tools import McpServer

        key = f"{SECTION}.mcp_servers.{name}"
        server = runner.run(McpServer.open(key, parameters))
        for schema in server.schemas:
            if (tool := schema["function"]["name"]) in tools:
                raise ConfigError(f"{key}: there are two tools {tool!r}")
            tools[tool] = server
        schemas += server.schemas
    return tools, schemas


def _answer(server: Any, call: Call, runner: asyncio.Runner) -> Result:
    """Have an MCP server answer a call; if the server has ended, this process ends."""
    try:
        content, is_error = runner.run(server.call(call.name, call.arguments))
    except EOFError as error:
        print(error, flush=True)
        os._exit(1)
    return Result(_encodable(content), is_error)


def _result(function: Callable[..., Any], call: Call, runner: asyncio.Runner) -> Result:
    try:
        inspect.signature(function).bind(**call.arguments)
    except TypeError as error:
        return Result(f"Error: the arguments of {call.name} are wrong: {error}", is_error=True)
    try:
        return Result(_content(awaited(function(**call.arguments), runner)))
    except USER_ERRORS as error:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return Result(_encodable(f"Error: {message}"), is_error=True)


def _content(returned: Any) -> str | list[dict[str, Any]]:
    """Return a value as text: a string as it is, other values as JSON; or as parts if it has an image."""
    if has_image(returned):
        return _encodable(plain_content(returned))
    return _encodable(
        returned if isinstance(returned, str) else json.dumps(returned, ensure_ascii=False, default=str)
    )


def _encodable(content: Any) -> Any:
    if isinstance(content, str):
        return _SURROGATE.sub("\ufffd", content)
    return [
        {**part, "text": _encodable(part["text"])} if part["type"] == "text" else part for part in content
    ]


def schema_of(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Describe a function to a model, as chat templates expect: from its type hints and its docstring.

    The docstring is in Google's style: what the function does, then `Args:` with a line or more per parameter, which may be
    left out. A parameter without a default is required.

    Raises:
        ConfigError: the function has no docstring, or a parameter that cannot be given by name or has no type hint that
            JSON can express.
    """
    where = f"{SECTION}.names: {name}"
    description, of_parameters = _parts_of_docstring(inspect.getdoc(function) or "")
    if not description:
        raise ConfigError(f"{where} has no docstring, from which the model learns what it does")
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # of the user's annotations
        raise ConfigError(f"{where} has type hints that cannot be read: {error}") from error
    properties: dict[str, Any] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"{where} has the parameter {parameter}, which cannot be given by name")
        if parameter.name not in hints:
            raise ConfigError(f"{where} has no type hint for {parameter.name}")
        schema = _schema(hints[parameter.name], f"{where}: {parameter.name}")
        if text := of_parameters.get(parameter.name):
            schema["description"] = text
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    described = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": described}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    """Return the JSON schema of a type hint."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    if origin is typing.Annotated:
        return _schema(arguments[0], where)
    if origin is Literal:
        kinds = {_TYPES.get(type(each)) for each in arguments}
        kind = {"type": str(kinds.pop())} if len(kinds) == 1 else {}
        return {**kind, "enum": list(arguments)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        raise ConfigError(f"{where} is an Enum; the function gets what the model writes, so use Literal")
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(each, where) for each in arguments]}
    if (origin or hint) in (list, Sequence, tuple, set) and len(arguments) <= 1:
        return {"type": "array", **({"items": _schema(arguments[0], where)} if arguments else {})}
    if (origin or hint) in (dict, Mapping) and arguments[:1] in ((), (str,)):
        values = {"additionalProperties": _schema(arguments[1], where)} if arguments else {}
        return {"type": "object", **values}
    raise ConfigError(f"{where} has the type hint {hint}, which JSON cannot express")


def _parts_of_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a docstring in Google's style into what it says first, and the descriptions of parameters."""
    first, _, rest = text.partition("\nArgs:\n")
    first = re.split(r"\n(?:Returns|Raises|Yields|Examples?):\n", first)[0]
    parameters: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        if line.strip() and not line.startswith(" "):
            break
        if found := re.match(r" {1,4}(\w+)(?: *\([^)]*\))?: *(.*)", line):
            name, parameters[found[1]] = found[1], found[2].strip()
        elif name and line.strip():
            parameters[name] += " " + line.strip()
    return first.strip(), parameters
