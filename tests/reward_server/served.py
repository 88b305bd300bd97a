"""A server that runs in a thread of the test, and raw HTTP to talk to it."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from iiverl_reward_client.server import Scoring, Settings
from iiverl_reward_client.server.running import uvicorn_config


@dataclass(frozen=True)
class Answer:
    """What came back over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """The address of a running server."""

    port: int
    scoring: Scoring

    def raw(self, request: bytes, timeout: float = 120) -> Answer:
        """Send bytes and read the answer to its end."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(request)
            head, _, body = _read_head(connection)
            lines = head.decode("latin-1").split("\r\n")
            headers = {key.lower(): value for key, value in (line.split(": ", 1) for line in lines[1:])}
            while len(body) < int(headers["content-length"]):
                body += connection.recv(65536)
        return Answer(int(lines[0].split()[1]), headers, body)

    def get(self, path: str, **headers: str) -> Answer:
        return self.raw(request("GET", path, b"", headers))

    def post(self, path: str, document: Any, **headers: str) -> Answer:
        return self.raw(request("POST", path, json.dumps(document).encode(), headers))

    def reward(self, llm_output: str, type: str, answer: Any) -> Answer:
        """Score one sample on the old route."""
        info = json.dumps({"type": type, "answer": answer})
        return self.post("/reward", {"llm_output": llm_output, "verification_info": info})

    def rewards(self, *samples: tuple[str, str, Any]) -> list[dict[str, Any]]:
        """Score (response, type, answer) in a batch."""
        answer = self.post("/v1/rewards", {"samples": [batch_sample(*sample) for sample in samples]})
        assert answer.status == 200, answer
        return answer.json["results"]


def batch_sample(response: str, type: str, answer: Any) -> dict[str, Any]:
    return {"id": "", "llm_output": response, "verification_info": {"type": type, "answer": answer}}


def request(method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: localhost"]
    if body:
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _read_head(connection: socket.socket) -> tuple[bytes, bytes, bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        assert part, f"the server closed the connection after {received!r}"
        received += part
    return received.partition(b"\r\n\r\n")


@contextmanager
def running(
    settings: Settings,
    files: Sequence[str] = (),
    max_connections: int = 500,
    head_seconds: float = 20.0,
) -> Iterator[Server]:
    """Run a server on a free port until the block ends, and see that it leaves no process behind."""
    scoring = Scoring(settings, files)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn_config(scoring, max_connections, head_seconds=head_seconds))

    async def main() -> None:
        try:
            await scoring.start()
            await server.serve(sockets=[listener])
        finally:
            await scoring.close()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        yield Server(listener.getsockname()[1], scoring)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
