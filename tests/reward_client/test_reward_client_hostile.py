"""A server that misbehaves, or samples that take too long, cost their own results and nothing else."""

import asyncio
import gzip
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from iiverl_reward_client import Failed, Outcome, Retries, RewardClient, RewardSample, Scored, Timeouts

CAPABILITIES = {"protocol": "iiverl-rewards/1", "server_version": "1", "types": ["t"]}
QUICK = Retries(limit=3, first_delay=0.001, longest_delay=0.002, share=10)
TOKEN = "a-secret-token"

Respond = Callable[[list[dict[str, Any]]], Any]


class Transport(httpx.AsyncBaseTransport):
    """Answers batches as the test says: with a response, or a list of results; None is silence."""

    def __init__(self, respond: Respond) -> None:
        self.respond = respond
        self.batches: list[list[str]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=CAPABILITIES)
        samples = json.loads(await request.aread())["samples"]
        self.batches.append([sample["llm_output"] for sample in samples])
        answer = self.respond(samples)
        if answer is None:
            await asyncio.sleep(0.05)
            raise httpx.ReadTimeout("no answer in time", request=request)
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json={"results": answer})


def score(transport: Transport, count: int, **options: Any) -> list[Outcome]:
    async def run() -> list[Outcome]:
        client = RewardClient("http://x", transport=transport, retries=QUICK, token=TOKEN, **options)
        async with client:
            return await client.score_batch([RewardSample(str(i), str(i), "{}") for i in range(count)])

    return asyncio.run(run())


def scored(samples: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    return [{"id": each["id"], "score": float(each["llm_output"]), **more} for each in samples]


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("levels", [65, 900, 100_000])
def test_deep_json_is_a_bad_response(levels: int) -> None:
    def respond(samples: list[dict[str, Any]]) -> httpx.Response:
        info = f'{{"a": {nested(levels)}}}'
        return httpx.Response(200, text=f'{{"results": [{{"id": "0", "score": 1, "info": {info}}}]}}')

    (outcome,) = score(Transport(respond), 1)
    assert isinstance(outcome, Failed) and outcome.kind == "bad_response"


@pytest.mark.parametrize("status", [200, 500])
def test_a_body_that_unpacks_to_too_much_is_a_bad_response(status: int) -> None:
    bomb = gzip.compress(b"\0" * (65 * 2**20))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {status} X\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
        writer.write(head.encode() + bomb)
        await writer.drain()

    async def run() -> Outcome:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with RewardClient(f"http://127.0.0.1:{port}", protocol="reward", retries=QUICK) as client:
                return await client.score(RewardSample("", "x", "{}"))

    outcome = asyncio.run(run())
    assert isinstance(outcome, Failed) and outcome.kind == "bad_response"


def test_details_are_bounded_and_hold_no_secret() -> None:
    def respond(samples: list[dict[str, Any]]) -> Any:
        error = {"kind": "function", "detail": TOKEN + "x" * 10**6}
        return [{"id": samples[0]["id"], "error": error}, *scored(samples[1:], components={TOKEN: 1.0})]

    first, second = score(Transport(respond), 2, max_workers=1)
    assert isinstance(first, Failed) and len(first.detail) < 3000
    assert TOKEN not in f"{first}{second}"
    assert isinstance(second, Scored) and list(second.components.values()) == [1.0]


def test_a_sample_that_took_too_long_in_the_server_is_final_and_no_outage() -> None:
    def respond(samples: list[dict[str, Any]]) -> Any:
        error = {"kind": "timeout", "detail": "too long"}
        return [{"id": samples[0]["id"], "error": error}, *scored(samples[1:])]

    transport = Transport(respond)
    first, second = score(transport, 2, max_workers=1)
    assert isinstance(first, Failed) and (first.kind, first.attempts, first.outage) == ("timeout", 1, False)
    assert second == Scored(1.0)
    assert transport.batches == [["0", "1"]]


def test_samples_of_a_late_batch_go_alone() -> None:
    """One slow sample of eight: the seven others are scored, and the server is not taken for unavailable."""

    def respond(samples: list[dict[str, Any]]) -> Any:
        return None if any(each["llm_output"] == "3" for each in samples) else scored(samples)

    transport = Transport(respond)
    outcomes = score(transport, 8, max_workers=2, batch_size=8, timeouts=Timeouts(read=1))
    assert [each.score for each in outcomes if isinstance(each, Scored)] == [0, 1, 2, 4, 5, 6, 7]
    slow = outcomes[3]
    assert isinstance(slow, Failed) and (slow.kind, slow.outage) == ("timeout", False)


def test_a_server_that_is_away_is_an_outage() -> None:
    outcomes = score(Transport(lambda _: None), 3, timeouts=Timeouts(sample=0.5))
    assert all(isinstance(each, Failed) and each.outage for each in outcomes)
