"""Who may ask, and how much."""

import json
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from iiverl_reward_client.server import Settings
from reward_server.served import batch_sample, request, running


def test_without_the_token_nothing_but_ping_and_health(start: Any) -> None:
    server = start(token="secret")
    for path in ("/v1/capabilities", "/metrics", "/openapi.json", "/nowhere"):
        answer = server.get(path)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert server.get(path, authorization="Bearer secret").status == (404 if path == "/nowhere" else 200)
    for given in ("Bearer secre", "Bearer secret2", "secret", "Bearersecret", "Basic secret", "Bearer é"):
        assert server.get("/metrics", authorization=given).status == 401
    assert server.post("/reward", {}).status == 401
    assert server.post("/v1/rewards", {}).status == 401
    assert server.post("/v1/rewards", {"samples": []}, authorization="Bearer secret").status == 200
    assert server.get("/metrics", authorization="bearer secret").status == 200
    assert server.get("/ping").status == 200
    assert server.get("/v1/health").status == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read(start: Any) -> None:
    server = start(max_body_bytes=1000)
    head = b"POST /reward HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    assert server.raw(head + b"content-length: 1001\r\n\r\n").status == 413
    chunks = b"".join(b"190\r\n" + b" " * 400 + b"\r\n" for _ in range(3))
    assert server.raw(head + b"transfer-encoding: chunked\r\n\r\n" + chunks).status == 413
    body = json.dumps({"llm_output": "x" * 900, "verification_info": "{}"}).encode()
    assert server.raw(request("POST", "/reward", body, {})).status == 422


def test_a_chunked_body_is_read(start: Any) -> None:
    body = json.dumps({"samples": []}).encode()
    head = b"POST /v1/rewards HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:5], body[5:]))
    assert start().raw(head + chunks + b"0\r\n\r\n").status == 200


def test_a_batch_that_is_too_large_is_refused(start: Any) -> None:
    server = start(max_batch=2)
    sample = batch_sample("x", "nothing", {})
    assert server.post("/v1/rewards", {"samples": [sample] * 2}).status == 200
    answer = server.post("/v1/rewards", {"samples": [sample] * 3})
    assert answer.status == 413
    assert "this server takes 2" in answer.json["detail"]


@pytest.fixture
def naps(tmp_path: Path) -> str:
    path = tmp_path / "naps.py"
    path.write_text("import time\ndef nap(s):\n    time.sleep(s.answer)\n    return 1\n")
    return f"{path}:nap"


def test_what_finds_no_place_is_told_to_come_again(start: Any, naps: str) -> None:
    server = start(naps, queue=2)
    results = server.rewards(*[("", "nap", 0.2)] * 5)
    kinds = [result.get("error", {}).get("kind", "scored") for result in results]
    assert kinds == ["scored"] * 3 + ["overload"] * 2
    assert results[-1]["error"]["retry_after"] >= 1


def test_a_server_without_any_place_answers_503_with_retry_after(start: Any, naps: str) -> None:
    server = start(naps, queue=0)
    occupier = threading.Thread(target=server.rewards, args=[("", "nap", 1.5)])
    occupier.start()
    wait_until(lambda: server.get("/v1/health").json["in_flight"] == 1)
    document = {"samples": [batch_sample("", "nap", 0.0)]}
    for answer in (server.post("/v1/rewards", document), server.reward("", "nap", 0.0)):
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert "detail" in answer.json
    (result,) = server.rewards(("```\nb\n```", "swe_verifiable", {"input": "a", "ground_truth": "b"}))
    assert result["score"] == 1.0
    occupier.join()


def test_a_client_that_leaves_gives_up_its_place_in_the_queue(start: Any, naps: str) -> None:
    import socket

    server = start(naps)
    body = json.dumps({"samples": [batch_sample("", "nap", 0.5)] * 20}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request("POST", "/v1/rewards", body, {}))
        wait_until(lambda: server.get("/v1/health").json["waiting"] >= 10)
    wait_until(lambda: server.get("/v1/health").json["waiting"] == 0, seconds=4)
    wait_until(lambda: server.get("/v1/health").json["in_flight"] == 0, seconds=2)
    (result,) = server.rewards(("", "nap", 0.0))
    assert result["score"] == 1.0


def wait_until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.01)


def test_only_routes_with_a_body_read_one(start: Any) -> None:
    """A promised body that never comes does not delay the answer."""
    server = start(token="secret")
    for path in ("/ping", "/v1/health", "/nowhere"):
        head = f"GET {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 30000000\r\n\r\n".encode()
        assert server.raw(head, timeout=30).status == (401 if path == "/nowhere" else 200)
    assert server.raw(b"POST /reward HTTP/1.1\r\nhost: x\r\ncontent-length: 30000\r\n\r\n").status == 401


def test_bodies_are_bounded_together(start: Any) -> None:
    server = start(max_body_bytes=1000, max_bodies_bytes=1500)
    head = b"POST /v1/rewards HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as waiting:
        waiting.sendall(head % 1000)
        deadline = time.monotonic() + 30
        while (answer := server.raw(head % 600 + b" " * 600)).status != 503:
            assert time.monotonic() < deadline
        assert answer.headers["retry-after"] == "1"
        assert server.post("/v1/rewards", {"samples": []}).status == 200  # this one fits
    while server.raw(head % 600 + b" " * 600).status != 422:  # once the other is gone
        assert time.monotonic() < deadline


def test_idle_connections_end_and_are_bounded() -> None:
    with running(Settings(workers=1), max_connections=4, head_seconds=2.0) as server, ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        idle = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(4)]
        idle[0].sendall(b"GET /ping HTTP/1.1\r\nhos")
        one_too_many = stack.enter_context(socket.create_connection(address, timeout=60))
        assert _ended(one_too_many)
        assert all(_ended(each) for each in idle)
        assert server.get("/ping").status == 200
        asking = stack.enter_context(socket.create_connection(address, timeout=60))
        for _ in range(2):  # a connection that is used stays, and half a second request does not
            asking.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
            received = b""
            while not received.endswith(b"}"):  # head and body may come one after the other
                received += asking.recv(65536)
            assert received.startswith(b"HTTP/1.1 200")
        asking.sendall(b"GET /pi")
        while not _ended(asking):
            pass


def _ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(65536) == b""
    except ConnectionError:
        return True
