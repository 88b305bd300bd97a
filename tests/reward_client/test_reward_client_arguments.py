"""Wrong arguments: a `TypeError` at the call, and no sample keeps another from its outcome."""

import asyncio
import concurrent.futures
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iiverl_reward_client import (
    Breaker,
    Failed,
    Outcome,
    Retries,
    RewardClient,
    RewardSample,
    RLVerifierClient,
    Scored,
    SyncRewardClient,
)
from iiverl_reward_client.dialects import ProtocolName

GOOD = RewardSample("good", "text", "{}")
SECONDS = 20.0


class Hostile(Mapping[str, Any]):
    """A mapping whose content cannot be read."""

    def __getitem__(self, key: str) -> Any:
        raise ZeroDivisionError("no content")

    def __iter__(self) -> Iterator[str]:
        raise ZeroDivisionError("no content")

    def __len__(self) -> int:
        return 1


class Answering(httpx.AsyncBaseTransport):
    """Scores whatever it is sent with 1.0, without a network."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer in the protocol that the path names."""
        if request.method == "GET":
            return httpx.Response(404)
        body = json.loads(await request.aread())
        if request.url.path == "/v1/rewards":
            return httpx.Response(
                200, json={"results": [{"id": each["id"], "score": 1.0} for each in body["samples"]]}
            )
        if "query" in body:
            return httpx.Response(200, json={"rewards": [1.0] * len(body["query"])})
        return httpx.Response(200, json={"score": 1.0})


NOT_SAMPLES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.dictionaries(st.text(), st.text()) | st.lists(st.text()) | st.tuples(st.text(), st.text())
    | st.builds(object) | st.just(RewardSample) | st.builds(Scored, st.just(1.0))
)  # fmt: skip
CONTENT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.builds(object) | st.builds(Hostile) | st.just("\ud800") | st.sets(st.integers()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers() | st.none(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
SAMPLES = st.builds(
    RewardSample,
    st.text(), st.text() | st.just("\udfff"), CONTENT, st.none() | st.text(), st.none() | st.text(), CONTENT,
)  # fmt: skip
PROTOCOLS = st.sampled_from(["reward", "v1", "openrlhf", "slime"])


def client(protocol: ProtocolName = "reward", **options: Any) -> RewardClient:
    return RewardClient("http://server", protocol=protocol, transport=Answering(), **options)


@pytest.fixture(scope="module")
def sync() -> Iterator[SyncRewardClient]:
    with SyncRewardClient(client()) as synchronous:
        yield synchronous


@given(wrong=NOT_SAMPLES)
@settings(deadline=None)
def test_what_is_no_sample_raises_at_the_call_of_the_synchronous_face(
    sync: SyncRewardClient, wrong: Any
) -> None:
    before = sync.submit(GOOD)
    for call in (
        lambda: sync.submit(wrong),
        lambda: sync.score(wrong),
        lambda: sync.score_batch([GOOD, wrong]),
        lambda: sync.score_stream([GOOD, wrong]),
    ):
        with pytest.raises(TypeError, match=f"expected a RewardSample, not {type(wrong).__name__}"):
            call()
    assert [before.result(SECONDS), sync.submit(GOOD).result(SECONDS)] == [Scored(1.0)] * 2


@given(wrong=NOT_SAMPLES)
@settings(deadline=None, max_examples=30)
def test_what_is_no_sample_raises_at_the_call_of_the_asynchronous_face(wrong: Any) -> None:
    async def run() -> list[Outcome]:
        async with client() as asynchronous:
            before = asynchronous.submit(GOOD)
            with pytest.raises(TypeError, match="expected a RewardSample"):
                asynchronous.submit(wrong)
            with pytest.raises(TypeError, match="expected a RewardSample"):
                await asynchronous.score(wrong)
            with pytest.raises(TypeError, match="expected a RewardSample"):
                await asynchronous.score_batch([GOOD, wrong])
            with pytest.raises(TypeError, match="expected a RewardSample"):
                _ = [done async for done in asynchronous.score_stream([GOOD, wrong])]
            async with asyncio.timeout(SECONDS):
                return [await before, await asynchronous.score(GOOD)]

    assert asyncio.run(run()) == [Scored(1.0)] * 2


@pytest.mark.parametrize("wrong", [None, 5, 1.5, GOOD])
def test_what_is_no_collection_of_samples_raises_at_the_call(sync: SyncRewardClient, wrong: Any) -> None:
    for call in (sync.score_batch, sync.score_stream, client().score_stream):
        with pytest.raises(TypeError):
            call(wrong)


@given(protocol=PROTOCOLS, samples=st.lists(SAMPLES, min_size=1, max_size=6), cached=st.booleans())
@settings(deadline=None)
def test_every_sample_has_an_outcome_whatever_the_others_hold(
    tmp_path_factory: pytest.TempPathFactory,
    protocol: ProtocolName,
    samples: list[RewardSample],
    cached: bool,
) -> None:
    """Good samples between them score, those after them too, and one that cannot be sent fails by itself."""
    cache: Path | None = tmp_path_factory.mktemp("scores") if cached else None

    async def run() -> tuple[list[Outcome], list[Outcome]]:
        mixed = [each for sample in samples for each in (sample, GOOD)]
        async with client(protocol, max_workers=2, batch_size=3, cache_dir=cache, server_version="1") as one:
            async with asyncio.timeout(SECONDS):
                return await one.score_batch(mixed), await one.score_batch([GOOD] * 3)

    mixed, after = asyncio.run(run())
    assert mixed[1::2] == [Scored(1.0)] * len(samples) and after == [Scored(1.0)] * 3
    for outcome in mixed[::2]:
        assert outcome == Scored(1.0) or (
            isinstance(outcome, Failed)
            and (outcome.kind, outcome.attempts) == ("bad_request", 0)
            and outcome.detail.startswith("the sample cannot be sent: ")
        )


@pytest.mark.parametrize("name", ["id", "llm_output", "prompt", "response"])
@pytest.mark.parametrize("value", [5, b"bytes", ["text"], {"a": 1}])
def test_a_text_of_another_type_is_refused_where_the_sample_is_made(name: str, value: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"RewardSample\.{name} must be a string.*not {type(value).__name__}"
    ):
        RewardSample(**{"id": "1", "llm_output": "text", name: value})


def test_the_drop_in_for_older_code_raises_at_the_call() -> None:
    with RLVerifierClient("http://127.0.0.1:9") as older:
        for call in (
            lambda: older.verify(5, "{}"),  # pyright: ignore[reportArgumentType]
            lambda: older.verify_safe(None, "{}"),  # pyright: ignore[reportArgumentType]
            lambda: older.verify_batch([(b"bytes", "{}")]),  # pyright: ignore[reportArgumentType]
        ):
            with pytest.raises(TypeError, match=r"llm_output must be a string"):
                call()


def test_a_fault_of_the_program_is_raised_in_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever, and the samples that follow are scored."""

    async def run() -> Outcome:
        async with client() as one:
            with monkeypatch.context() as patch:
                patch.setattr("iiverl_reward_client.endpoint.Endpoint.room", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    await asyncio.wait_for(one.score(GOOD), SECONDS)
            return await asyncio.wait_for(one.score(GOOD), SECONDS)

    assert asyncio.run(run()) == Scored(1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"token": 5},
        {"timeouts": 30},
        {"retries": 3},
        {"breaker": 3},
        {"cache_dir": 5},
        {"server_version": 2},
        {"transport": httpx.HTTPTransport()},
        {"max_workers": "10"},
        {"max_workers": None},
        {"batch_size": 1.5},
        {"urls": 5},
    ],
)
def test_options_of_another_type_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(options))} cannot be of type"):
        RewardClient(**{"urls": "http://server", **options})


@pytest.mark.parametrize("make", [lambda: Retries(limit=-1), lambda: Retries(share=float("nan"))])
def test_retries_are_not_negative(make: Any) -> None:
    with pytest.raises(ValueError, match=r"Retries\.\w+ must not be negative"):
        make()


@pytest.mark.parametrize("make", [lambda: Breaker(failures=0), lambda: Breaker(seconds=float("nan"))])
def test_a_breakers_bounds_are_positive(make: Any) -> None:
    with pytest.raises(ValueError, match=r"Breaker\.\w+ must be positive"):
        make()


def test_a_cancelled_sample_of_the_synchronous_face_harms_no_other(sync: SyncRewardClient) -> None:
    dropped = [sync.submit(GOOD) for _ in range(20)]
    kept = [sync.submit(GOOD) for _ in range(20)]
    for future in dropped:
        future.cancel()
    done, _ = concurrent.futures.wait(kept, SECONDS)
    assert [future.result() for future in done] == [Scored(1.0)] * 20
