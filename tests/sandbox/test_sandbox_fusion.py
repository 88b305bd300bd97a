"""Sandbox Fusion, against a server that speaks its protocol."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from iiverl_reward_client.verifiers.sandbox import (
    Execution,
    Limits,
    SandboxError,
    SandboxUnavailable,
    UnsupportedLanguage,
    find_sandbox,
)
from iiverl_reward_client.verifiers.sandbox.fusion import FusionSandbox

Answer = tuple[int, Any]


def finished(stdout: str, code: int = 0, status: str = "Finished", stderr: str = "") -> dict[str, Any]:
    return {"status": status, "execution_time": 0.01, "return_code": code, "stdout": stdout, "stderr": stderr}


def answer(
    run: dict[str, Any] | None, compiled: dict[str, Any] | None = None, status: str = "Success"
) -> Answer:
    return 200, {"status": status, "message": "", "compile_result": compiled, "run_result": run, "files": {}}


class Server(ThreadingHTTPServer):
    """Answers every request with `answer`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.answer: Answer = answer(finished("anybody there\n"))
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((self.path, json.loads(body)))
        status, said = self.server.answer
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("ending", ["", "/", "/run_code"])
def test_the_request_is_that_of_run_code(server: Server, ending: str) -> None:
    sandbox = FusionSandbox(server.url + ending)
    sandbox.run("puts 1", "in\ud800", language="ruby", limits=Limits(wall_seconds=3, memory_bytes=256 << 20))
    assert server.asked == [
        (
            "/run_code",
            {
                "code": "puts 1",
                "stdin": "in?",
                "language": "ruby",
                "compile_timeout": 3,
                "run_timeout": 3,
                "memory_limit_MB": 256,
            },
        )
    ]


@pytest.mark.parametrize(
    ("said", "execution"),
    [
        (answer(finished("1\n")), Execution("1\n", "", 0, "exit")),
        (answer(finished("", 1, stderr="oh"), status="Failed"), Execution("", "oh", 1, "exit")),
        (answer(finished("", -9), status="Failed"), Execution("", "", None, "signal")),
        (
            answer({"status": "TimeLimitExceeded", "stdout": "so far"}, status="Failed"),
            Execution("so far", "", None, "timeout"),
        ),
        (answer(None, finished("", 1, stderr="no ;"), "Failed"), Execution("", "no ;", 1, "exit")),
        (answer(finished("y" * 101)), Execution("y" * 100, "", None, "output")),
    ],
)
def test_what_an_answer_means(server: Server, said: Answer, execution: Execution) -> None:
    server.answer = said
    assert FusionSandbox(server.url).run("", limits=Limits(output_bytes=100)) == execution


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((500, {"detail": "oh"}), "answers 500"),
        ((200, b"<html>"), "no result of a run: <html>"),
        ((200, []), "no result"),
        ((200, {"status": "Success"}), "no result"),
        ((200, {"status": "SandboxError", "message": "no disk"}), "failed: no disk"),
        (answer(finished("", status="Error")), "no result"),
    ],
)
def test_its_own_failures_are_no_executions(server: Server, said: Answer, message: str) -> None:
    server.answer = said
    with pytest.raises(SandboxError, match=message):
        FusionSandbox(server.url).run("")


def test_a_language_it_does_not_know(server: Server) -> None:
    server.answer = (422, {"detail": [{"msg": "Input should be 'python', …"}]})
    with pytest.raises(UnsupportedLanguage, match="'cobol'"):
        FusionSandbox(server.url).run("", language="cobol")


def test_its_url_is_preferred_and_proven(server: Server) -> None:
    assert isinstance(find_sandbox(server.url), FusionSandbox)
    server.answer = answer(finished("something else"))
    with pytest.raises(SandboxUnavailable, match="does not run Python"):
        find_sandbox(server.url)


@pytest.mark.parametrize(
    "url", [lambda port: f"http://127.0.0.1:{port}", lambda _: "no url", lambda _: "http://[::"]
)
def test_a_url_with_nobody_behind_it(url: Callable[[int], str]) -> None:
    with Server() as server:
        port = server.server_address[1]
    with pytest.raises(SandboxUnavailable, match="Check its URL"):
        find_sandbox(url(port))
