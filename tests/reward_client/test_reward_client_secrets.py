"""Tokens and credentials go to the server they belong to, and nowhere else."""

import asyncio
import base64
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import pytest

from iiverl_reward_client import (
    Breaker,
    Failed,
    Outcome,
    Retries,
    RewardClient,
    RewardSample,
    Scored,
    Timeouts,
)
from reward_client.faulty_server import FaultyServer, Request, answer

TOKEN = "tok-3cr3t-value"
PASSWORD = "pa55-w0rd"
QUERY = "k3y-of-the-query"
SECRETS = (TOKEN, PASSWORD, QUERY, base64.b64encode(f"user:{PASSWORD}".encode()).decode())
SAMPLE = RewardSample("", "output", "{}")


def clean(text: str) -> bool:
    return not any(secret in text for secret in SECRETS)


def reachable(value: Any, depth: int = 4) -> Iterator[str]:
    """Give the representation of an object, and of the objects that it holds; bare strings are for nobody to see."""
    if not isinstance(value, str):
        yield repr(value)
    if depth and hasattr(value, "__dict__"):
        for part in vars(value).values():
            for single in part if isinstance(part, list) else [part]:
                yield from reachable(single, depth - 1)


def client_of(url: str, **options: Any) -> RewardClient:
    quick = Retries(limit=1, first_delay=0.001)
    return RewardClient(url, protocol="reward", retries=quick, timeouts=Timeouts(sample=0.1), **options)


def test_nothing_shows_a_secret() -> None:
    for client in (
        client_of(f"http://host:1/?key={QUERY}", token=TOKEN),
        client_of(f"http://user:{PASSWORD}@host:1"),
    ):
        texts = list(reachable(client))
        assert len(texts) > 10 and all(map(clean, texts))
        assert repr(client) == "RewardClient(http://host:1)"


async def echo(request: Request, writer: asyncio.StreamWriter) -> bool:
    said = request.head.decode()
    if request.json["llm_output"] == "refused":
        return await answer(writer, {"detail": f"do not send {said}"}, 401)
    return await answer(writer, {"score": 1.0, "headers": said.split("\r\n"), "nested": {"x": [said]}})


@pytest.mark.parametrize("way", ["token", "url"])
def test_a_server_that_repeats_what_it_was_sent_does_not_bring_it_into_an_outcome(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> tuple[list[Outcome], list[Request], str]:
        async with FaultyServer(handlers={f"/reward?key={QUERY}": echo}) as server:
            host = server.url.removeprefix("http://")
            url = f"http://{host}" if way == "token" else f"http://user:{PASSWORD}@{host}"
            async with client_of(f"{url}?key={QUERY}", token=TOKEN if way == "token" else None) as client:
                outcomes = await client.score_batch([SAMPLE, RewardSample("", "refused", "{}")])
            return outcomes, server.requests, server.url

    with caplog.at_level(logging.DEBUG):
        (scored, failed), requests, url = asyncio.run(run())
    header = f"Bearer {TOKEN}" if way == "token" else f"Basic {SECRETS[3]}"
    assert all(f"\r\nAuthorization: {header}" in request.head.decode() for request in requests)
    assert isinstance(scored, Scored) and "[secret]" in repr(scored) and clean(repr(scored))
    assert isinstance(failed, Failed) and failed.kind == "bad_request" and clean(repr(failed))
    assert "[secret]" in failed.detail and failed.detail.startswith(f"{url}: HTTP 401: do not send")
    assert clean(caplog.text)


def test_no_exception_and_no_failure_without_an_answer_holds_a_secret() -> None:
    for url, token in (
        (f"http://user:{PASSWORD}@127.0.0.1:9", None),
        (f"http://127.0.0.1:9/?key={QUERY}", TOKEN),
    ):

        async def run(url: str = url, token: str | None = token) -> tuple[Outcome, dict]:
            async with client_of(url, token=token, breaker=Breaker(failures=1, seconds=0.01)) as client:
                return await client.score(SAMPLE), await client.ping()

        outcome, pings = asyncio.run(run())
        assert isinstance(outcome, Failed) and clean(repr(outcome)) and clean(repr(pings))


@pytest.mark.parametrize(
    ("url", "token"),
    [
        (f"http://user:{PASSWORD}@host", TOKEN),
        (f"ftp://user:{PASSWORD}@host", None),
        (f"user:{PASSWORD}@host", None),
        (f"http://user:{PASSWORD}@ho st:port", None),
        ("http://host", f"{TOKEN}\n"),
    ],
)
def test_refused_arguments_are_told_without_their_secrets(url: str, token: str | None) -> None:
    with pytest.raises(ValueError) as raised:
        RewardClient(url, token=token)
    assert clean("".join(traceback.format_exception(raised.value)))


def test_a_redirect_is_not_followed() -> None:
    async def run() -> tuple[Outcome, int]:
        async def away(request: Request, writer: asyncio.StreamWriter) -> bool:
            return await answer(writer, {}, 307, [f"Location: {other.url}/reward"])

        async with FaultyServer() as other, FaultyServer(handlers={"/reward": away}) as server:
            client = client_of(server.url, token=TOKEN)
            async with client:
                return await client.score(SAMPLE), len(other.requests)

    outcome, seen = asyncio.run(run())
    assert isinstance(outcome, Failed) and outcome.kind == "bad_response" and seen == 0
