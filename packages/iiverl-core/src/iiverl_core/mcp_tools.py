"""Tools of MCP servers, which run as child processes; needs `iiverl[mcp]`."""

import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from mcp import Client, MCPError, StdioServerParameters
from mcp_types import CONNECTION_CLOSED, ImageContent, TextContent

from iiverl_core.errors import ConfigError
from iiverl_core.message_parts import plain_content

_START = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execvp(sys.argv[1], sys.argv[1:])
"""
# A server has a session of its own, so the end of its starter's process group does not end it: the kernel does (1 is
# PR_SET_PDEATHSIG), on other systems the end of its standard input.


class McpServer:
    """A running server, and the tools that it offers. Used on the event loop that opened it."""

    def __init__(self, key: str, client: Client) -> None:
        self._key, self._client = key, client
        self.schemas: list[dict[str, Any]] = []

    @classmethod
    async def open(cls, key: str, server: Mapping[str, Any]) -> "McpServer":
        """Start a server with its `command`, `args`, `env` and `cwd`; what it prints to standard error goes to ours.

        `key` is the key of the configuration; messages begin with it.

        Raises:
            ConfigError: it cannot be started, or does not speak MCP.
        """
        environment = server.get("env") or {}
        path = environment.get("PATH", os.environ.get("PATH"))
        if (command := shutil.which(server["command"], path=path)) is None:
            raise ConfigError(f"{key}: there is no program {server['command']}")
        arguments = ["-I", "-S", "-c", _START, command, *server.get("args", ())]
        parameters = StdioServerParameters(
            command=sys.executable, args=arguments, env=environment, cwd=server.get("cwd")
        )
        opened = cls(key, Client(parameters))
        try:
            await opened._client.__aenter__()
            await opened._list()
        except Exception as error:
            raise ConfigError(f"{key}: the server did not list its tools: {error}") from error
        return opened

    async def _list(self) -> None:
        cursor = None
        while True:
            listed = await self._client.list_tools(cursor=cursor)
            self.schemas += [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description or "",
                        "parameters": tool.input_schema,
                    },
                }
                for tool in listed.tools
            ]
            cursor = listed.next_cursor
            if not cursor:
                return

    async def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[str | list[dict[str, Any]], bool]:
        """Call a tool; return its result as text, or as parts if it has images, and whether it is an error.

        Raises:
            EOFError: the server ended.
        """
        try:
            result = await self._client.call_tool(name, dict(arguments))
        except MCPError as error:
            if error.error.code == CONNECTION_CLOSED:
                raise EOFError(f"{self._key}: the server ended") from error
            return f"Error: {error}", True
        parts: list[Any] = ["Error: "] if result.is_error else []
        for number, part in enumerate(result.content):
            parts += ["\n"] if number else []
            if isinstance(part, ImageContent):
                parts.append({"type": "image", "image": f"data:{part.mime_type};base64,{part.data}"})
            else:
                parts.append(part.text if isinstance(part, TextContent) else f"[{part.type}]")
        return plain_content(parts), result.is_error
