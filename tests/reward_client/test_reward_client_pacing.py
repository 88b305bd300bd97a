"""When requests are sent: retries, `Retry-After`, the breaker, and as many at a time as the server bears."""

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from iiverl_reward_client.addresses import Address
from iiverl_reward_client.dialects import REWARD
from iiverl_reward_client.endpoint import Endpoint
from iiverl_reward_client.retrying import RetryBudget, retry_after
from reward_client.faulty_server import FaultyServer, Request, answer, perfect_score

QUICK = Retries(limit=8, first_delay=0.001, longest_delay=0.01, share=8)
FAILURE = Failed("server")


def samples(count: int) -> list[RewardSample]:
    return [RewardSample(str(i), f"output {i}", "{}") for i in range(count)]


@given(st.integers(1, 2000), st.floats(0, 10), st.floats(0, 10), st.floats(1, 4))
def test_a_delay_is_drawn_between_nothing_and_its_bound(
    retry: int, first: float, longest: float, factor: float
) -> None:
    delay = Retries(first_delay=first, longest_delay=longest, factor=factor).delay(retry)
    assert 0 <= delay <= longest
    if retry == 1:
        assert delay <= first


def test_delays_are_spread_over_the_whole_range() -> None:
    delays = [Retries(first_delay=1.0).delay(3) for _ in range(300)]
    assert min(delays) < 0.4 and max(delays) > 3.6


def test_retry_after_in_seconds_or_as_a_date() -> None:
    assert retry_after("3") == 3.0
    assert retry_after(" 0.5 ") == 0.5
    assert retry_after("-1") == 0.0
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    seconds = retry_after(moment)
    assert seconds is not None and 58 <= seconds <= 60
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [retry_after(header) for header in (None, "", "soon", "nan", "inf")] == [None] * 5


def test_the_budget_grows_with_the_batch_and_ends_with_it() -> None:
    budget = RetryBudget(Retries(share=0.5, floor=1))
    for _ in range(4):
        budget.add_sample()
    assert [budget.spend() for _ in range(4)] == [True, True, True, False]
    budget.reset()
    assert [budget.spend() for _ in range(2)] == [True, False]


def endpoint(breaker: Breaker | None = None) -> Endpoint:
    return Endpoint(Address(httpx.URL("http://a"), "http://a", None), breaker or Breaker(), REWARD)


def test_the_breaker_opens_probes_and_closes() -> None:
    server = endpoint(Breaker(failures=2, seconds=1.0, longest=4.0))
    late = server.begin(0.0)
    server.failed(server.begin(0.0), 0.0, FAILURE)
    server.succeeded(server.begin(0.0), 10)
    for _ in range(2):  # only failures in a row count
        assert server.state == "closed"
        server.failed(server.begin(0.0), 0.0, FAILURE)
    assert server.state == "open" and server.room(0.0, 10) == 0
    server.failed(late, 0.1, FAILURE)  # what was under way says nothing new
    server.in_flight = 0
    assert not server.wants_probe(0.4) and server.wants_probe(1.0)
    server.found(REWARD, None)
    assert server.state == "trial" and server.room(1.0, 10) == 1
    trial = server.begin(1.0)
    assert server.room(1.0, 10) == 0
    server.failed(trial, 1.0, FAILURE)
    assert server.state == "open" and not server.wants_probe(1.9) and server.wants_probe(3.0)
    server.in_flight = 0
    server.found(REWARD, None)
    server.succeeded(server.begin(3.0), 10)
    assert server.state == "closed" and server.room(3.0, 10) == 9


def test_the_time_aside_doubles_up_to_a_bound() -> None:
    server = endpoint(Breaker(failures=1, seconds=1.0, longest=4.0))
    waits = []
    for _ in range(6):
        server.missed(0.0, FAILURE)
        waits.append(server.wakes_at())
    bounds = [1, 2, 4, 4, 4, 4]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))


def test_concurrency_halves_once_a_round_and_grows_by_one() -> None:
    server = endpoint()
    tickets = [server.begin(0.0) for _ in range(16)]
    for permit in tickets:
        server.slow_down(permit, 1.0, 16)
    server.in_flight = 0
    assert server.room(2.0, 16) == 8
    for _ in range(9):
        server.succeeded(server.begin(2.0), 16)
    server.in_flight = 0
    assert server.room(2.0, 16) == 9
    for _ in range(500):
        server.succeeded(server.begin(2.0), 16)
    server.in_flight = 0
    assert server.room(2.0, 16) == 16
    for moment in range(10):
        server.slow_down(server.begin(10.0 + moment), 10.0 + moment, 16)
    server.in_flight = 0
    assert server.room(30.0, 16) == 1


def test_retry_after_is_waited_for() -> None:
    async def run() -> list[float]:
        async def busy(request: Request, writer: asyncio.StreamWriter) -> bool:
            times.append(asyncio.get_running_loop().time())
            if len(times) == 1:
                return await answer(writer, {"detail": "busy"}, 503, ["Retry-After: 0.2"])
            return await answer(writer, {"score": 1.0})

        times: list[float] = []
        async with FaultyServer(handlers={"/reward": busy}) as server:
            client = RewardClient(server.url, protocol="reward", retries=QUICK, max_workers=1)
            async with client:
                assert await client.score_batch(samples(2)) == [Scored(1.0)] * 2
        return times

    times = asyncio.run(run())
    assert len(times) == 3 and times[1] - times[0] >= 0.19


def test_a_server_that_is_too_busy_gets_fewer_requests_at_a_time() -> None:
    """It takes 3 at a time and refuses the rest; with 24 workers, few are refused in the end."""

    async def run() -> tuple[int, int]:
        refused = 0

        async def choosy(request: Request, writer: asyncio.StreamWriter) -> bool:
            nonlocal refused
            if server.in_flight > 3:
                refused += 1
                return await answer(writer, {"detail": "busy"}, 429)
            await asyncio.sleep(0.002)
            return await answer(writer, {"score": perfect_score(request.json["llm_output"])})

        async with FaultyServer(handlers={"/reward": choosy}) as server:
            client = RewardClient(
                server.url, protocol="reward", retries=QUICK, breaker=Breaker(seconds=0.005), max_workers=24
            )
            async with client:
                outcomes = await client.score_batch(samples(400))
            assert outcomes == [Scored(perfect_score(sample.llm_output)) for sample in samples(400)]
        return refused, server.most_in_flight

    refused, most = asyncio.run(run())
    assert most <= 24
    assert 0 < refused < 200


def test_the_servers_share_the_work_and_no_more_than_max_workers_is_under_way() -> None:
    async def run() -> tuple[list[int], list[int]]:
        async with FaultyServer(delay=0.002) as a, FaultyServer(delay=0.002) as b:
            async with RewardClient([a.url, b.url], protocol="reward", max_workers=6) as client:
                await client.score_batch(samples(120))
            return [len(a.requests), len(b.requests)], [a.most_in_flight, b.most_in_flight]

    counts, most = asyncio.run(run())
    assert sum(counts) == 120 and min(counts) > 40
    assert max(most) <= 4


def test_a_server_that_comes_back_is_used_again() -> None:
    async def run() -> int:
        a, b = FaultyServer(delay=0.001), FaultyServer(delay=0.001)
        await a.start()
        await b.start()
        breaker = Breaker(failures=2, seconds=0.01, longest=0.02)
        async with RewardClient(
            [a.url, b.url], protocol="reward", retries=QUICK, breaker=breaker, max_workers=4
        ) as client:
            await b.stop()
            await client.score_batch(samples(50))
            await b.start()
            before = len(b.requests)
            await client.score_batch(samples(200))
            used = len([r for r in b.requests[before:] if r.path == "/reward"])
        await a.stop()
        await b.stop()
        return used

    assert asyncio.run(run()) > 20


def test_a_dead_server_is_not_stormed() -> None:
    """While it is aside it is asked a few times whether it is there, whatever waits."""

    async def run() -> int:
        async with FaultyServer(handlers={"/reward": broken, "/ping": broken}) as server:
            client = RewardClient(
                server.url,
                protocol="reward",
                retries=QUICK,
                breaker=Breaker(failures=3, seconds=0.05, longest=0.1),
                timeouts=Timeouts(sample=0.5),
                max_workers=8,
            )
            async with client:
                outcomes = await client.score_batch(samples(500))
            assert all(isinstance(o, Failed) and o.kind == "server" for o in outcomes)
            return len(server.requests)

    assert asyncio.run(run()) < 40


@pytest.mark.parametrize("field", ["connect", "read", "sample"])
def test_a_timeout_is_positive(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Timeouts(**{field: 0})


async def broken(request: Request, writer: asyncio.StreamWriter) -> bool:
    return await answer(writer, {"detail": "down"}, 500)


def test_a_failed_sample_goes_to_another_server() -> None:
    async def run() -> list[Outcome]:
        async with FaultyServer(handlers={"/reward": broken}) as bad, FaultyServer(delay=0.002) as good:
            once = Retries(limit=1, first_delay=0.001, share=1.0)
            client = RewardClient(
                [bad.url, good.url], protocol="reward", retries=once, breaker=Breaker(failures=10**6)
            )
            async with client:
                return await client.score_batch(samples(60))

    assert asyncio.run(run()) == [Scored(perfect_score(sample.llm_output)) for sample in samples(60)]


def test_a_sample_is_given_up_when_its_time_is_over() -> None:
    async def run() -> Outcome:
        async with FaultyServer(handlers={"/reward": broken}) as server:
            client = RewardClient(
                server.url,
                protocol="reward",
                retries=Retries(limit=10**6, first_delay=0.01, longest_delay=0.01, floor=10**6),
                breaker=Breaker(failures=10**6),
                timeouts=Timeouts(sample=0.2),
            )
            async with client:
                return await asyncio.wait_for(client.score(samples(1)[0]), 10)

    outcome = asyncio.run(run())
    assert isinstance(outcome, Failed) and outcome.kind == "server" and outcome.attempts > 2
    assert "HTTP 500: down; given up 0.2 s after the first attempt" in outcome.detail
