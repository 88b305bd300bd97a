"""A reward server on loopback that goes wrong as it is told to, and writes down what it was sent."""

import asyncio
import json
import zlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RETRYABLE = {
    "reset": "transport",
    "close": "transport",
    "half": "transport",
    "garbage": "transport",
    "408": "timeout",
    "429": "overload",
    "429 later": "overload",
    "500": "server",
    "502": "server",
    "503": "overload",
    "503 later": "overload",
}
FINAL = {
    "malformed": "bad_response",
    "nan": "bad_response",
    "infinite": "bad_response",
    "no score": "bad_response",
    "empty": "bad_response",
    "list": "bad_response",
    "422": "bad_request",
    "401": "bad_request",
}
HARMLESS = ("slow", "dribble")
LATER = "0.01"


def perfect_score(llm_output: str) -> float:
    """What a server without faults answers."""
    return zlib.crc32(llm_output.encode()) % 1000 / 1000


@dataclass(frozen=True)
class Request:
    """A request as it came: the head without its end, and the body."""

    head: bytes
    body: bytes

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Handler = Callable[[Request, asyncio.StreamWriter], Awaitable[bool]]


class FaultyServer:
    """Speaks `POST /reward`. `faults` maps an `llm_output` to what happens to its requests, one after the other; then
    it is scored. `handlers` answer other paths, and say whether the connection goes on."""

    def __init__(
        self,
        faults: Mapping[str, Sequence[str]] | None = None,
        handlers: Mapping[str, Handler] | None = None,
        delay: float = 0.0,
    ) -> None:
        self.faults = {name: list(listed) for name, listed in (faults or {}).items()}
        self.handlers = dict(handlers or {})
        self.delay = delay
        self.requests: list[Request] = []
        self.times: defaultdict[str, list[float]] = defaultdict(list)
        self.connections = 0
        self.port = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Die: no more connections, and those there are break."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._open):
            writer.transport.abort()

    async def __aenter__(self) -> "FaultyServer":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                body = await reader.readexactly(int(length or 0))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    if not await self._handle(Request(head, body), writer):
                        return
                finally:
                    self.in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return  # the client went away, or the loop of the test ends
        finally:
            self._open.discard(writer)
            writer.close()

    async def _handle(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        self.requests.append(request)
        if request.path in self.handlers:
            return await self.handlers[request.path](request, writer)
        if request.path == "/ping":
            return await answer(writer, {"status": "ok", "message": "here"})
        if request.path != "/reward":
            return await answer(writer, {"detail": "Not Found"}, 404)
        llm_output = request.json["llm_output"]
        self.times[llm_output].append(asyncio.get_running_loop().time())
        if self.delay:
            await asyncio.sleep(self.delay)
        planned = self.faults.get(llm_output)
        return await misbehave(planned.pop(0) if planned else "", perfect_score(llm_output), writer)


async def answer(
    writer: asyncio.StreamWriter, content: Any, status: int = 200, headers: Sequence[str] = ()
) -> bool:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", *headers, "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    await writer.drain()
    return True


async def misbehave(fault: str, score: float, writer: asyncio.StreamWriter) -> bool:
    """Answer with a fault, or with the score where there is none."""
    good = {"score": score}
    match fault:
        case "reset":
            writer.transport.abort()
            return False
        case "close":
            return False
        case "half":
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"score"')
            await writer.drain()
            return False
        case "garbage":
            writer.write(b"ceci n'est pas HTTP\r\n\r\n")
            await writer.drain()
            return False
        case "stall":
            await asyncio.sleep(30)
            return False
        case "malformed":
            return await answer(writer, b'{"score": 0.')
        case "nan":
            return await answer(writer, b'{"score": NaN}')
        case "infinite":
            return await answer(writer, b'{"score": 1e999}')
        case "no score":
            return await answer(writer, {"reward": score})
        case "empty":
            return await answer(writer, b"")
        case "list":
            return await answer(writer, [good, good])
        case "slow":
            await asyncio.sleep(0.01)
            return await answer(writer, good)
        case "dribble":
            body = json.dumps(good).encode()
            for part in (
                b"HTTP/1.1 200 OK\r\nContent-Le",
                b"ngth: %d\r\n\r\n" % len(body),
                body[:3],
                body[3:],
            ):
                writer.write(part)
                await asyncio.sleep(0.001)
            return True
        case "":
            return await answer(writer, good)
    status, _, later = fault.partition(" ")
    headers = [f"Retry-After: {LATER}"] if later else []
    return await answer(writer, {"detail": f"told to say {status}"}, int(status), headers)
