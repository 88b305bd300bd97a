"""Whatever a server does, an outcome is the score that a perfect server would give, or says what went wrong."""

import asyncio
import socket

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
    Scored,
    Timeouts,
)
from reward_client.faulty_server import (
    FINAL,
    HARMLESS,
    RETRYABLE,
    FaultyServer,
    Request,
    answer,
    perfect_score,
)

LIMIT = 3
QUICK = Retries(limit=LIMIT, first_delay=0.001, longest_delay=0.004, share=LIMIT)
PATIENT = Retries(limit=8, first_delay=0.001, longest_delay=0.02, share=8)
BREAKER = Breaker(failures=4, seconds=0.002, longest=0.01)
FAULT = st.one_of(
    st.sampled_from(sorted(RETRYABLE)), st.sampled_from(sorted(FINAL)), st.sampled_from(HARMLESS)
)
# One element a sample: what happens to its requests, one after the other.
SCHEDULES = st.lists(st.lists(FAULT, max_size=LIMIT + 2), min_size=1, max_size=10)


def sample(i: int) -> RewardSample:
    return RewardSample(str(i), f"output {i}", '{"type": "t"}')


def perfect(i: int) -> Scored:
    return Scored(perfect_score(sample(i).llm_output))


def expected(i: int, faults: list[str]) -> tuple[str, int] | Scored:
    """What must come out: the score, or the kind of the last failure and the number of attempts."""
    for attempt, fault in enumerate(faults, start=1):
        if fault in HARMLESS:
            return perfect(i)
        if fault in FINAL:
            return FINAL[fault], attempt
        if attempt > LIMIT:
            return RETRYABLE[fault], attempt
    return perfect(i)


def told(outcome: Outcome) -> tuple[str, int] | Scored:
    return (outcome.kind, outcome.attempts) if isinstance(outcome, Failed) else outcome


async def scored(urls: list[str], count: int, retries: Retries, workers: int = 4) -> list[Outcome]:
    client = RewardClient(
        urls, protocol="reward", max_workers=workers, retries=retries, breaker=BREAKER, timeouts=Timeouts(sample=30)
    )  # fmt: skip
    async with client:
        return await client.score_batch([sample(i) for i in range(count)])


@given(SCHEDULES)
@settings(max_examples=200)
def test_every_sample_that_can_succeed_does_and_the_others_say_why(schedules: list[list[str]]) -> None:
    async def run() -> list[Outcome]:
        async with FaultyServer(
            {sample(i).llm_output: faults for i, faults in enumerate(schedules)}
        ) as server:
            return await scored([server.url], len(schedules), QUICK)

    outcomes = asyncio.run(run())
    assert [told(outcome) for outcome in outcomes] == [expected(*pair) for pair in enumerate(schedules)]


class HurriedLoop(asyncio.SelectorEventLoop):
    """A loop on a machine so busy that time passes between any two looks at the clock."""

    _ahead = 0.0

    def time(self) -> float:
        self._ahead += 0.0005
        return super().time() + self._ahead


@given(
    st.lists(st.lists(st.sampled_from(["500", "503 later", "reset"]), max_size=LIMIT), min_size=1, max_size=6)
)
@settings(max_examples=40)
def test_no_sample_is_forgotten_where_a_pause_ends_at_a_bad_moment(schedules: list[list[str]]) -> None:
    async def run() -> list[Outcome]:
        async with FaultyServer(
            {sample(i).llm_output: faults for i, faults in enumerate(schedules)}
        ) as server:
            return await scored([server.url], len(schedules), QUICK)

    with asyncio.Runner(loop_factory=HurriedLoop) as runner:
        outcomes = runner.run(asyncio.wait_for(run(), 20))
    assert outcomes == [perfect(i) for i in range(len(schedules))]


def dead_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@given(
    st.lists(st.lists(st.sampled_from(sorted(RETRYABLE)), max_size=1), min_size=1, max_size=30), st.booleans()
)
@settings(max_examples=30)
def test_a_dead_url_beside_one_that_works_costs_no_score(schedules: list[list[str]], first: bool) -> None:
    async def run() -> list[Outcome]:
        async with FaultyServer(
            {sample(i).llm_output: faults for i, faults in enumerate(schedules)}
        ) as server:
            urls = [dead_url(), server.url] if first else [server.url, dead_url()]
            return await scored(urls, len(schedules), PATIENT)

    assert asyncio.run(run()) == [perfect(i) for i in range(len(schedules))]


@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 30), st.sampled_from(["reward", "auto", "v1"]))
@settings(max_examples=30)
def test_a_restart_in_the_middle_of_a_batch_costs_no_score(
    count: int, answered: int, away_ms: int, protocol: str
) -> None:
    async def run() -> list[Outcome]:
        server = FaultyServer(delay=0.001)
        if protocol == "v1":
            server.handlers.update({"/v1/capabilities": capabilities, "/v1/rewards": rewards})
        await server.start()

        async def restart() -> None:
            while len(server.requests) < min(answered, count):
                await asyncio.sleep(0.0005)
            await server.stop()
            await asyncio.sleep(away_ms / 1000)
            await server.start()

        restarting = asyncio.create_task(restart())
        client = RewardClient(
            server.url,
            protocol="reward" if protocol == "reward" else "auto",
            batch_size=3,
            max_workers=5,
            retries=PATIENT,
            breaker=BREAKER,
        )
        async with client:
            outcomes = await client.score_batch([sample(i) for i in range(count)])
        restarting.cancel()
        await server.stop()
        return outcomes

    assert asyncio.run(run()) == [perfect(i) for i in range(count)]


async def capabilities(request: Request, writer: asyncio.StreamWriter) -> bool:
    return await answer(writer, {"protocol": "iiverl-rewards/1", "server_version": "1"})


async def rewards(request: Request, writer: asyncio.StreamWriter) -> bool:
    await asyncio.sleep(0.001)
    results = [{"id": s["id"], "score": perfect_score(s["llm_output"])} for s in request.json["samples"]]
    return await answer(writer, {"server_version": "1", "results": results})


@pytest.mark.parametrize(("stalls", "kind"), [(1, None), (2, "timeout")])
def test_silence_is_a_timeout_and_is_tried_again(stalls: int, kind: str | None) -> None:
    async def run() -> Outcome:
        async with FaultyServer({"output 0": ["stall"] * stalls}) as server:
            retries = Retries(limit=1, first_delay=0.001)
            client = RewardClient(
                server.url, protocol="reward", retries=retries, timeouts=Timeouts(read=0.15), breaker=BREAKER
            )
            async with client:
                return await client.score(sample(0))

    outcome = asyncio.run(run())
    if kind is None:
        assert outcome == perfect(0)
    else:
        assert told(outcome) == ("timeout", 2)
        assert isinstance(outcome, Failed) and "no answer within 0.15 s" in outcome.detail


def test_a_server_that_stays_dead_is_told_by_url_and_kind() -> None:
    url = dead_url()

    async def run() -> list[Outcome]:
        client = RewardClient(
            url,
            protocol="reward",
            retries=QUICK,
            breaker=BREAKER,
            timeouts=Timeouts(sample=0.2),
            max_workers=8,
        )
        async with client:
            return await client.score_batch([sample(i) for i in range(50)])

    outcomes = asyncio.run(run())
    assert {outcome.kind for outcome in outcomes if isinstance(outcome, Failed)} == {"transport"}
    assert all(isinstance(o, Failed) and url in o.detail for o in outcomes)
    # Those that never had a server to be sent to say so, and have no attempt to their name.
    waited = [o for o in outcomes if isinstance(o, Failed) and o.attempts == 0]
    assert waited and all("no reward server could be used for 0.2 s" in o.detail for o in waited)


def test_retries_are_bounded_over_the_whole_batch() -> None:
    count, retries = 60, Retries(limit=5, first_delay=0.001, longest_delay=0.002, share=0.5, floor=3)

    async def sent() -> tuple[list[Outcome], int]:
        async with FaultyServer({sample(i).llm_output: ["500"] * 6 for i in range(count)}) as server:
            outcomes = await scored([server.url], count, retries)
            return outcomes, sum(map(len, server.times.values()))

    outcomes, requests = asyncio.run(sent())
    assert all(isinstance(o, Failed) and o.kind == "server" for o in outcomes)
    assert requests == count + 33
    assert any("used up its retries" in o.detail for o in outcomes if isinstance(o, Failed))
