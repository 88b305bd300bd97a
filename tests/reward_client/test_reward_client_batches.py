"""`/v1/rewards`: finding out that it is offered, filling requests, and samples that go wrong by themselves."""

import asyncio
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iiverl_reward_client import (
    Breaker,
    Capabilities,
    Failed,
    Outcome,
    Retries,
    RewardClient,
    RewardSample,
    Scored,
)
from reward_client.faulty_server import FaultyServer, Request, answer, perfect_score

LIMIT = 3
QUICK = Retries(limit=LIMIT, first_delay=0.001, longest_delay=0.004, share=10)
BREAKER = Breaker(failures=4, seconds=0.002, longest=0.01)
PASSING = ["transport", "overload", "server"]
LASTING = ["timeout", "bad_request", "bad_response", "function"]


class BatchServer(FaultyServer):
    """Offers `/v1/rewards`. `items` maps an `llm_output` to kinds of errors, one a request; `statuses` answers whole
    requests first; `poison` makes the server refuse any request that holds it."""

    def __init__(
        self,
        items: dict[str, list[str]] | None = None,
        statuses: list[int] | None = None,
        poison: str | None = None,
        **limits: int,
    ) -> None:
        super().__init__(handlers={"/v1/capabilities": self.tell, "/v1/rewards": self.score})
        self.items = {name: list(kinds) for name, kinds in (items or {}).items()}
        self.statuses = list(statuses or [])
        self.poison = poison
        self.limits = limits
        self.sizes: list[int] = []
        self.bytes: list[int] = []
        self.sent: defaultdict[str, int] = defaultdict(int)

    async def tell(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        offer = {
            "protocol": "iiverl-rewards/1",
            "server_version": "2",
            "types": ["t"],
            "unavailable": {"c": "x"},
        }
        return await answer(writer, offer | self.limits)

    async def score(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        samples = request.json["samples"]
        self.sizes.append(len(samples))
        self.bytes.append(len(request.body))
        if self.statuses:
            return await answer(writer, {"detail": "told to"}, self.statuses.pop(0))
        if any(sample["llm_output"] == self.poison for sample in samples):
            return await answer(writer, {"detail": "malformed"}, 422)
        return await answer(writer, {"server_version": "2", "results": [self.result(s) for s in samples]})

    def result(self, sample: dict[str, Any]) -> dict[str, Any]:
        self.sent[sample["llm_output"]] += 1
        if kinds := self.items.get(sample["llm_output"]):
            return {
                "id": sample["id"],
                "error": {"kind": kinds.pop(0), "detail": "told to", "retry_after": None},
            }
        return {"id": sample["id"], "score": perfect_score(sample["llm_output"])}


def samples(count: int) -> list[RewardSample]:
    return [RewardSample(str(i), f"output {i}", "{}") for i in range(count)]


def perfect(count: int) -> list[Scored]:
    return [Scored(perfect_score(sample.llm_output)) for sample in samples(count)]


def score(server: FaultyServer, count: int, **options: Any) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with server, RewardClient(server.url, retries=QUICK, breaker=BREAKER, **options) as client:
            return await client.score_batch(samples(count))

    return asyncio.run(run())


def test_batches_are_used_where_they_are_offered() -> None:
    server = BatchServer()
    assert score(server, 100, max_workers=4, batch_size=10) == perfect(100)
    assert set(server.paths()) == {"/v1/capabilities", "/v1/rewards"}
    assert server.sizes == [10] * 10


def test_one_sample_a_request_where_they_are_not() -> None:
    server = FaultyServer()
    assert score(server, 5) == perfect(5)
    assert sorted(server.paths()) == ["/reward"] * 5 + ["/v1/capabilities"]


def test_a_small_batch_is_spread_over_the_workers() -> None:
    server = BatchServer()
    assert score(server, 8, max_workers=4) == perfect(8)
    assert server.sizes == [2] * 4


def test_requests_stay_within_what_the_server_takes() -> None:
    server = BatchServer(max_batch=3, max_body_bytes=250)
    assert score(server, 20, max_workers=1) == perfect(20)
    assert max(server.sizes) <= 3 and max(server.bytes) <= 250


@pytest.mark.parametrize("status", [413, 422])
def test_a_refused_batch_is_sent_again_one_by_one(status: int) -> None:
    server = BatchServer(statuses=[status])
    assert score(server, 6, max_workers=1) == perfect(6)
    assert server.sizes == [6, 1, 1, 1, 1, 1, 1]


def test_a_sample_that_spoils_its_request_costs_no_other() -> None:
    outcomes = score(BatchServer(poison="output 3"), 6, max_workers=1)
    assert [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Failed)] == [3]
    assert isinstance(outcomes[3], Failed) and (outcomes[3].kind, outcomes[3].attempts) == ("bad_request", 1)


def test_a_refused_token_is_not_blamed_on_single_samples() -> None:
    server = BatchServer(statuses=[401])
    outcomes = score(server, 6, max_workers=1)
    assert [o.kind for o in outcomes if isinstance(o, Failed)] == ["bad_request"] * 6
    assert server.sizes == [6]


@given(
    st.lists(st.lists(st.sampled_from(PASSING + LASTING), max_size=LIMIT + 2), min_size=1, max_size=12),
    st.lists(st.sampled_from([429, 500, 503]), max_size=1),
)
@settings(max_examples=60)
def test_only_the_samples_that_failed_are_sent_again(schedules: list[list[str]], statuses: list[int]) -> None:
    names = [sample.llm_output for sample in samples(len(schedules))]
    server = BatchServer(dict(zip(names, schedules, strict=True)), statuses)
    outcomes = score(server, len(schedules), max_workers=1)
    for name, kinds, outcome, right in zip(names, schedules, outcomes, perfect(len(schedules)), strict=True):
        # All samples go together at first, so each of them has met the whole request that failed.
        met = 0
        while met < len(kinds) and kinds[met] in PASSING and len(statuses) + met < LIMIT:
            met += 1
        if met == len(kinds):
            assert outcome == right
        else:
            assert isinstance(outcome, Failed)
            assert (outcome.kind, outcome.attempts) == (kinds[met], len(statuses) + met + 1)
        assert server.sent[name] == met + 1


def test_capabilities_and_ping() -> None:
    async def run() -> None:
        async with BatchServer(max_batch=8) as new, FaultyServer() as old:
            urls = [new.url, old.url, "http://127.0.0.1:9"]
            async with RewardClient(urls) as client:
                told = await client.capabilities()
                pings = await client.ping()
            assert told[new.url] == Capabilities("iiverl-rewards/1", "2", ("t",), {"c": "x"}, 8, None, None)
            assert told[old.url] is None
            refused = told[urls[2]]
            assert isinstance(refused, Failed) and refused.kind == "transport"
            assert isinstance(pings[new.url], float) and isinstance(pings[old.url], float)
            assert isinstance(pings[urls[2]], Failed)

    asyncio.run(run())
