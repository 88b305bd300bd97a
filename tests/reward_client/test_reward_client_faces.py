"""The faces of the client: asynchronous, streaming, synchronous, and the one of older code."""

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from iiverl_reward_client import (
    Failed,
    RewardClient,
    RewardSample,
    RLVerifierClient,
    Scored,
    SyncRewardClient,
    VerificationFailed,
)
from reward_client.faulty_server import FaultyServer, perfect_score


def sample(name: str) -> RewardSample:
    return RewardSample(name, name, "{}")


def perfect(name: str) -> Scored:
    return Scored(perfect_score(name))


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    """A server on a loop in a thread of its own; `slow` takes its time, `refused` is refused."""
    loop = asyncio.new_event_loop()
    running = threading.Thread(target=loop.run_forever)
    running.start()
    server = FaultyServer({"slow": ["slow"] * 9, "refused": ["422"] * 9, "shaky": ["500"] * 2}, delay=0.001)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    yield server
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    running.join()
    loop.close()


def test_a_batch_comes_back_in_order_and_a_stream_as_it_finishes(server: FaultyServer) -> None:
    names = ["slow", "a", "b", "refused"]

    async def run() -> None:
        async with RewardClient(server.url, protocol="reward") as client:
            outcomes = await client.score_batch(map(sample, names))
            assert outcomes[:3] == [perfect(name) for name in names[:3]]
            assert isinstance(outcomes[3], Failed)
            streamed = [done async for done in client.score_stream(map(sample, names))]
            assert {s.id: outcome for s, outcome in streamed} == dict(zip(names, outcomes, strict=True))
            assert streamed[-1][0].id == "slow"
            assert await client.score_batch([]) == []
            assert [done async for done in client.score_stream([])] == []

    asyncio.run(run())


def test_a_stream_is_fed_while_others_are_scored(server: FaultyServer) -> None:
    """The second sample exists only after the first has its outcome."""

    async def run() -> list[str]:
        scored = asyncio.Event()

        async def generate() -> AsyncIterator[RewardSample]:
            yield sample("first")
            await scored.wait()
            yield sample("second")

        order = []
        async with RewardClient(server.url, protocol="reward") as client:
            async for done, _ in client.score_stream(generate()):
                order.append(done.id)
                scored.set()
        return order

    assert asyncio.run(asyncio.wait_for(run(), 10)) == ["first", "second"]


def test_a_stream_reads_ahead_by_no_more_than_its_window(server: FaultyServer) -> None:
    made = 0

    def generate() -> Iterator[RewardSample]:
        nonlocal made
        for i in range(1000):
            made += 1
            yield sample(str(i))

    async def run() -> None:
        async with RewardClient(server.url, protocol="reward", max_workers=2, batch_size=5) as client:
            async for _ in client.score_stream(generate()):
                return

    asyncio.run(run())
    assert made <= 4 * 2 * 5 + 2


def test_what_feeds_a_stream_may_fail(server: FaultyServer) -> None:
    def generate() -> Iterator[RewardSample]:
        yield sample("a")
        raise KeyError("the generation broke")

    async def run() -> None:
        async with RewardClient(server.url, protocol="reward") as client:
            async for _ in client.score_stream(generate()):
                pass

    with pytest.raises(KeyError, match="the generation broke"):
        asyncio.run(run())


def test_a_client_belongs_to_one_loop_and_ends_when_closed(server: FaultyServer) -> None:
    client = RewardClient(server.url, protocol="reward")
    assert asyncio.run(client.score(sample("a"))) == perfect("a")
    with pytest.raises(RuntimeError, match="one event loop"):
        asyncio.run(client.score(sample("a")))

    async def closed() -> None:
        other = RewardClient(server.url, protocol="reward")
        waiting = other.submit(sample("slow"))
        await other.aclose()
        await other.aclose()
        assert waiting.cancelled()
        with pytest.raises(RuntimeError, match="closed"):
            await other.score(sample("a"))

    asyncio.run(closed())


def test_a_cancelled_sample_is_not_sent(server: FaultyServer) -> None:
    async def run() -> None:
        async with RewardClient(server.url, protocol="reward", max_workers=1) as client:
            first, dropped, last = (client.submit(sample(name)) for name in ("a", "dropped", "b"))
            dropped.cancel()
            assert [await first, await last] == [perfect("a"), perfect("b")]

    asyncio.run(run())
    assert "dropped" not in server.times


def test_the_synchronous_face(server: FaultyServer) -> None:
    names = ["slow", *map(str, range(50))]
    with SyncRewardClient(RewardClient(server.url, protocol="reward")) as client:
        futures = [client.submit(sample(name)) for name in names]
        assert [future.result() for future in futures] == [perfect(name) for name in names]
        assert client.score_batch(map(sample, names)) == [perfect(name) for name in names]
        assert client.score(sample("a")) == perfect("a")
        assert {s.id: o for s, o in client.score_stream(map(sample, names))} == {n: perfect(n) for n in names}
        assert isinstance(client.ping()[server.url], float)
        assert client.capabilities() == {server.url: None}
        waiting = client.submit(sample("slow"))
    assert waiting.cancelled() or waiting.result() == perfect("slow")
    client.close()
    for late in (lambda: client.submit(sample("a")), client.ping):
        with pytest.raises(RuntimeError, match="closed"):
            late()


def test_the_synchronous_face_from_many_threads(server: FaultyServer) -> None:
    seen: dict[str, Scored | Failed] = {}
    with SyncRewardClient(RewardClient(server.url, protocol="reward")) as client:

        def work(thread: int) -> None:
            for i in range(20):
                seen[f"{thread}.{i}"] = client.score(sample(f"{thread}.{i}"))

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == {name: perfect(name) for name in seen} and len(seen) == 120


def test_a_program_may_end_without_closing() -> None:
    program = (
        "from iiverl_reward_client import *\n"
        "c = SyncRewardClient(RewardClient('http://127.0.0.1:9'))\n"
        "c.submit(RewardSample('', '', ''))\n"
        "import sys; print(sorted({'torch', 'ray', 'pydantic', 'iiverl_core'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_the_drop_in_for_older_code(server: FaultyServer, caplog: pytest.LogCaptureFixture) -> None:
    with RLVerifierClient(
        [server.url], timeout=10, max_retries=3, initial_retry_delay=0.001, max_retry_delay=0.01
    ) as client:
        assert client.verify("shaky", {"type": "t"}) == perfect_score("shaky")
        assert client.verify_safe("a", "{}") == perfect_score("a")
        with pytest.raises(VerificationFailed, match=r"bad_request.*told to say 422") as raised:
            client.verify("refused", "{}")
        assert raised.value.failure.attempts == 1
        assert not caplog.records
        with caplog.at_level(logging.WARNING):
            assert client.verify_safe("refused", "{}", default_value=-1.0) == -1.0
            pairs = [("a", "{}"), ("refused", "{}"), ("b", "{}")]
            scores = client.verify_batch(pairs, max_workers=2, progress_bar=False)
        assert scores == [perfect_score("a"), 0.0, perfect_score("b")]
        assert "1 of 3 outputs have no score and count as 0.0; the first: bad_request" in caplog.text
        most = server.most_in_flight
        client.verify_batch([(str(i), "{}") for i in range(50)], max_workers=12)
        assert most <= 3 < server.most_in_flight <= 12
    with RLVerifierClient(server.url) as single:
        assert single.verify("a", "{}") == perfect_score("a")


def test_retries_in_the_drop_in_end_at_its_bound() -> None:
    said = r"transport, 2 attempts.*http://127\.0\.0\.1:9"
    client = RLVerifierClient("http://127.0.0.1:9", max_retries=1, initial_retry_delay=0.001)
    with client, pytest.raises(VerificationFailed, match=said):
        client.verify("a", "{}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"urls": []}, "at least one"),
        ({"urls": "localhost:8000"}, "looks like http://host:8000"),
        ({"urls": "ftp://host"}, "looks like http://host:8000"),
        ({"urls": "http://"}, "looks like http://host:8000"),
        ({"protocol": "grpc"}, "protocol is one of auto, reward"),
        ({"max_workers": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"token": "a\nb"}, "the token"),
        ({"token": ""}, "the token"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardClient(**{"urls": "http://h", **options})
