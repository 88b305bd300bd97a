"""Hostile responses: a readable reference is never a failure, never late, and never costs a neighbour its score."""

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iiverl_reward_client import Outcome, RewardClient, RewardSample

HONEST = ("\\boxed{42}", "math_verifiable", {"value": "42"})
EDIT = {"input": "a\nb\n", "ground_truth": "a\nc\n"}


@pytest.fixture(scope="module")
def server() -> Any:
    from iiverl_reward_client.server import Settings
    from reward_server.served import running

    # Wall time is generous, since the machine that runs the tests may be busy; CPU time is not.
    limits = {"time_limit": 60, "response_time_limit": 0.5, "accept_unevaluated": True}
    with running(Settings(workers=2, **limits)) as running_server:
        yield running_server


EXHAUSTING = {
    "powers": "9^{9^{9^9}}",
    "power": "10^{10^{10}}",
    "factorial": "(10^9)!",
    "factorials": "100!!!",
    "parentheses": "(" * 5000 + "42" + ")" * 5000,
    "fractions": "\\frac{1}{" * 3000 + "2" + "}" * 3000,
    "expansion": "(a+b+c+d+e+f+g+h)^{60}",
    "matrix": r"\begin{pmatrix}"
    + r"\\".join("&".join(f"x_{{{i}{j}}}" for j in range(40)) for i in range(40))
    + r"\end{pmatrix}",
    "digits": "7" * 1_000_000,
}


@pytest.mark.slow  # each exhausts half a second, and a process has to start again
def test_answers_that_exhaust_the_verifier_score_zero(server: Any) -> None:
    hostile = [(f"\\boxed{{{each}}}", "math_verifiable", {"value": "42"}) for each in EXHAUSTING.values()]
    hostile += [("```\n" + "x\ny\n" * 100_000 + "```", "swe_verifiable", EDIT)]
    batch = [sample for each in hostile for sample in (each, HONEST)]
    results = server.rewards(*batch)
    assert [result.get("score") for result in results] == [0.0, 1.0] * (len(hostile) - 1) + [
        pytest.approx(0.0, abs=0.01),
        1.0,
    ]


PIECES = st.sampled_from(
    [*"0123456789abcxyz+-*/^_!(){}[]<>=,.:;|&$%#~ \n\r\x0c\u2028\0", "\ud800", "\\boxed{", "\\boxed", "\\fbox{", "\\frac",
     "\\frac{", "\\sqrt{", "\\int", "\\sum_{", "\\text{", "\\left(", "\\right)", "\\begin{pmatrix}", "\\end{pmatrix}", "\\infty",
     "\\cdot", "\\pi", "^{9", "9^{9", "million", " cm", "a.m.", "_2", "```", "```python\n", "~~~", "<think>", "</think>", "VERDICT: MATCH"]
)  # fmt: skip
RESPONSES = st.lists(PIECES, max_size=30).map("".join) | st.lists(PIECES, max_size=12).map(
    lambda pieces: f"\\boxed{{{''.join(pieces)}}}"
)
REFERENCES = st.sampled_from(
    ["42", r"\frac{1}{2}", "x^2+1", r"\{1,2\}", "(0,1)", "listen", "5 km", "1010_2", "8:00 am"]
)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.tuples(RESPONSES, REFERENCES), min_size=20, max_size=20))
def test_any_response_to_a_readable_reference_has_a_score(server: Any, tries: list[tuple[str, str]]) -> None:
    batch = [sample for response, value in tries for sample in _of(response, value)]
    results = server.rewards(*batch)
    assert all(0.0 <= result["score"] <= 1.0 for result in results), results
    assert all(result["score"] == 1.0 for result in results[2::3])


def test_many_clients_among_hostile_answers_lose_no_honest_sample(server: Any) -> None:
    """40 clients, every tenth answer hostile."""
    hostile = ("\\boxed{9^{9^{9^9}}}", "\\boxed{\\int}", "\\boxed{" + "(" * 5000 + "}", "\\boxed{4")
    samples = [
        RewardSample(
            str(i),
            hostile[i // 10 % len(hostile)] if i % 10 == 0 else HONEST[0],
            {"type": HONEST[1], "answer": HONEST[2]},
        )
        for i in range(100)
    ]

    async def run() -> list[Outcome]:
        url = f"http://127.0.0.1:{server.port}"
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(RewardClient(url)) for _ in range(40)]
            batches = [client.score_batch(samples[i::40]) for i, client in enumerate(clients)]
            by_client = await asyncio.gather(*batches)
        return [by_client[i % 40][i // 40] for i in range(100)]

    before = len(list(Path("/proc/self/fd").iterdir()))
    outcomes = asyncio.run(run())
    assert [getattr(each, "score", each) for each in outcomes] == [float(i % 10 != 0) for i in range(100)]
    deadline = time.monotonic() + 60
    while len(list(Path("/proc/self/fd").iterdir())) > before + 8:  # connections end when clients close them
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _of(response: str, value: str) -> list[tuple[str, str, Any]]:
    return [(response, "math_verifiable", {"value": value}), (response, "swe_verifiable", EDIT), HONEST]
