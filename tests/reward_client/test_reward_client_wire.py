"""What goes over the wire, byte by byte, and what the answers of every protocol come to."""

import asyncio
import gzip
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from iiverl_reward_client import (
    AsyncioTransport,
    Failed,
    Outcome,
    ProtocolName,
    Retries,
    RewardClient,
    RewardSample,
    Scored,
)
from reward_client.faulty_server import FaultyServer, Request, answer

INFO = {"type": "math_verifiable", "answer": {"value": "½"}}
SAMPLE = RewardSample("7", "<|user|>1+1?<｜Assistant｜>2", INFO, prompt="1+1?", response="2", label="two")


def exchange(
    protocol: ProtocolName, samples: list[RewardSample], reply: Any, path: str = "/score", **options: Any
) -> tuple[list[Request], list[Outcome]]:
    """Score samples against a server that gives the same reply to everything at `path`."""

    async def handler(request: Request, writer: asyncio.StreamWriter) -> bool:
        given = reply(request) if isinstance(reply, Callable) else reply
        return await answer(writer, given)

    async def run() -> tuple[list[Request], list[Outcome]]:
        async with FaultyServer(handlers={path: handler}) as server:
            url = server.url + (path if protocol in ("openrlhf", "slime") else "")
            async with RewardClient(url, protocol=protocol, retries=Retries(limit=0), **options) as client:
                return server.requests, await client.score_batch(samples)

    return asyncio.run(run())


def test_a_reward_request_byte_by_byte() -> None:
    requests, outcomes = exchange("reward", [SAMPLE], {"score": 0.25}, "/reward", token="abc")
    assert outcomes == [Scored(0.25)]
    (request,) = requests
    body = (
        b'{"llm_output":"<|user|>1+1?<\\uff5cAssistant\\uff5c>2",'
        b'"verification_info":"{\\"type\\": \\"math_verifiable\\", \\"answer\\": {\\"value\\": \\"\\u00bd\\"}}"}'
    )
    assert request.body == body
    line, *headers = request.head.split(b"\r\n")
    host = next(header for header in headers if header.startswith(b"Host: 127.0.0.1:"))
    assert line == b"POST /reward HTTP/1.1"
    assert sorted(headers) == sorted(
        [
            host,
            b"User-Agent: iiverl-reward-client",
            b"Accept: application/json",
            b"Content-Type: application/json",
            b"Authorization: Bearer abc",
            b"Content-Length: %d" % len(body),
        ]
    )


def test_a_string_of_verification_info_passes_through_unread() -> None:
    requests, _ = exchange("reward", [RewardSample("", "x\ud800", "{ no json")], {"score": 1}, "/reward")
    assert requests[0].body == b'{"llm_output":"x\\ud800","verification_info":"{ no json"}'


def test_a_url_may_have_a_path_and_a_query() -> None:
    async def run() -> list[str]:
        async def score(request: Request, writer: asyncio.StreamWriter) -> bool:
            return await answer(writer, {"score": 1.0})

        async with FaultyServer(handlers={"/a/b/reward?key=1": score}) as server:
            async with RewardClient(f"{server.url}/a/b/?key=1", protocol="reward") as client:
                assert await client.score(SAMPLE) == Scored(1.0)
            return server.paths()

    assert asyncio.run(run()) == ["/a/b/reward?key=1"]


@pytest.mark.parametrize(
    ("info", "said"),
    [
        (None, "JSON string or a mapping"),
        ({"x": float("nan")}, "JSON"),
        ({"x": {1}}, "not JSON serializable"),
    ],
)
@pytest.mark.parametrize("protocol", ["reward", "v1"])
def test_a_sample_that_cannot_be_written_fails_alone_and_is_never_sent(
    protocol: ProtocolName, info: Any, said: str
) -> None:
    def reply(request: Request) -> dict:
        if protocol == "reward":
            return {"score": 1.0}
        return {"results": [{"id": sample["id"], "score": 1.0} for sample in request.json["samples"]]}

    path = "/reward" if protocol == "reward" else "/v1/rewards"
    samples = [SAMPLE, RewardSample("8", "o", info), SAMPLE]
    _, outcomes = exchange(protocol, samples, reply, path, max_workers=1)
    assert [type(outcome) for outcome in outcomes] == [Scored, Failed, Scored]
    failed = outcomes[1]
    assert isinstance(failed, Failed) and (failed.kind, failed.attempts) == ("bad_request", 0)
    assert said in failed.detail


def test_an_openrlhf_request_and_answer() -> None:
    reply = {"rewards": [0.5, -2], "scores": [1, 0], "extra_logs": {"length": [3, float("nan")], "odd": [1]}}
    other = RewardSample("8", "q2", '{"a":1}')
    requests, outcomes = exchange("openrlhf", [SAMPLE, other], reply, max_workers=1)
    assert [request.path for request in requests] == ["/score"]
    assert requests[0].json == {
        "query": [SAMPLE.llm_output, "q2"],
        "prompts": ["1+1?", None],
        "labels": ["two", '{"a":1}'],
    }
    assert outcomes == [Scored(0.5, {"scores": 1.0, "length": 3.0}), Scored(-2.0, {"scores": 0.0})]


@pytest.mark.parametrize(
    "reply", [{"rewards": [1.0]}, {"rewards": 1.0}, {"scores": [1.0, 1.0]}, [1.0, 1.0], b"", b"[1.0"]
)
def test_an_openrlhf_answer_of_another_shape_is_no_score(reply: Any) -> None:
    _, outcomes = exchange("openrlhf", [SAMPLE, SAMPLE], reply, max_workers=1)
    assert [o.kind for o in outcomes if isinstance(o, Failed)] == ["bad_response"] * 2


def test_one_bad_reward_of_an_openrlhf_answer_costs_no_other() -> None:
    _, outcomes = exchange("openrlhf", [SAMPLE] * 3, {"rewards": [1.0, None, 0.0]}, max_workers=1)
    assert [type(outcome) for outcome in outcomes] == [Scored, Failed, Scored]


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (0.5, Scored(0.5)),
        (1, Scored(1.0)),
        ({"score": 0.5, "why": "x"}, Scored(0.5, info={"why": "x"})),
        ({"reward": 2}, Scored(2.0)),
        ({"other": 2}, None),
        ("0.5", None),
        (True, None),
        (b"NaN", None),
        ({}, None),
        ([1.0], None),
    ],
)
def test_a_slime_request_and_answer(reply: Any, outcome: Scored | None) -> None:
    requests, (seen,) = exchange("slime", [SAMPLE], reply)
    assert requests[0].json == {"prompt": "1+1?", "response": "2", "label": "two"}
    if outcome is None:
        assert isinstance(seen, Failed) and seen.kind == "bad_response"
    else:
        assert seen == outcome


def test_a_v1_request_and_answer() -> None:
    results = [
        {"id": "7", "score": 1, "components": {"format": 0.5, "odd": None}, "info": {"why": "x"}},
        {"id": "8", "error": {"kind": "bad_request", "detail": "no type", "retry_after": None}},
        {"id": "9", "score": float("nan")},
    ]
    samples = [SAMPLE, RewardSample("8", "o8", "{}"), RewardSample("9", "o9", "{}")]
    requests, outcomes = exchange(
        "v1", samples, {"server_version": "1", "results": results}, "/v1/rewards", max_workers=1
    )
    (request,) = [request for request in requests if request.path == "/v1/rewards"]
    assert json.loads(request.body)["samples"][:2] == [
        {
            "id": "7",
            "llm_output": SAMPLE.llm_output,
            "prompt": "1+1?",
            "response": "2",
            "verification_info": INFO,
        },
        {"id": "8", "llm_output": "o8", "prompt": None, "response": None, "verification_info": "{}"},
    ]
    assert outcomes[0] == Scored(1.0, {"format": 0.5}, {"why": "x"})
    kinds = [outcome.kind for outcome in outcomes if isinstance(outcome, Failed)]
    assert kinds == ["bad_request", "bad_response"]


@pytest.mark.parametrize(
    "change",
    [
        lambda results: results[:-1],
        lambda results: [*results, results[0]],
        lambda results: results[::-1],
        lambda results: None,
    ],
    ids=["one short", "one more", "another order", "none"],
)
def test_v1_results_that_do_not_match_the_samples_are_no_scores(change: Callable[[list], Any]) -> None:
    def reply(request: Request) -> dict:
        return {"results": change([{"id": sample["id"], "score": 1.0} for sample in request.json["samples"]])}

    samples = [RewardSample(str(i), "o", "{}") for i in range(4)]
    _, outcomes = exchange("v1", samples, reply, "/v1/rewards", max_workers=1)
    assert [o.kind for o in outcomes if isinstance(o, Failed)] == ["bad_response"] * 4


# The transport by itself.


def fetched(raw: bytes, times: int = 1, rest: float = 0.0) -> tuple[list[httpx.Response], int]:
    """Give the answers of the transport to a server that writes `raw`, and how many connections it took."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.readline():
            while (await reader.readline()) not in (b"\r\n", b""):
                pass
            writer.write(raw)
            if b"chunked" not in raw and b"Content-Length" not in raw:
                break
        writer.close()

    async def run() -> list[httpx.Response]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with httpx.AsyncClient(transport=AsyncioTransport()) as client:
            responses = [await client.get(url) for _ in range(times)]
        server.close()
        return responses

    return asyncio.run(run()), connections


@pytest.mark.parametrize(
    ("raw", "connections"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", 1),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", 1),
        (b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", 1),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi", 3),
        (b"HTTP/1.0 200 OK\r\n\r\nhi", 3),
    ],
    ids=["length", "chunked", "informational", "close", "HTTP/1.0"],
)
def test_answers_of_every_framing_are_read_and_connections_kept(raw: bytes, connections: int) -> None:
    responses, used = fetched(raw, times=3)
    assert [(response.status_code, response.text) for response in responses] == [(200, "hi")] * 3
    assert used == connections


def test_a_compressed_answer_is_unpacked() -> None:
    body = gzip.compress(b"hi")
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    (response,), _ = fetched(head + body)
    assert response.text == "hi"


def test_any_httpx_transport_may_carry_the_requests() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"score": float(json.loads(request.content)["llm_output"])})

    async def run() -> list[Outcome]:
        client = RewardClient("http://anywhere", protocol="reward", transport=httpx.MockTransport(handle))
        async with client:
            return await client.score_batch([RewardSample("", str(i), "{}") for i in range(3)])

    assert asyncio.run(run()) == [Scored(0.0), Scored(1.0), Scored(2.0)]
