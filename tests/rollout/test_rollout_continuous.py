"""Requests that are submitted while others are being decoded: each gets the response that it gets alone."""

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iiverl_core.rollout import Completion, GenerationRequest, SamplingParams, generate
from iiverl_core.rollout.hf import HFEngine
from iiverl_core.rollout.hf.prompts import PAYS
from iiverl_core.samples import SampleId
from rollout.responses import ask, members, respond

ENDS = {"eos_token_id": [258, *range(0, 320, 10)]}
PARAMS = (
    SamplingParams(max_tokens=14),
    SamplingParams(temperature=0.7, top_p=0.9, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=9),
)
LIMITS = ({}, {"max_sequences": 3}, {"prompts_per_batch": 2, "max_sequences": 5})

Submission = tuple[int, GenerationRequest, SamplingParams]  # before which step, and what


@st.composite
def submissions(draw: st.DrawFn) -> list[Submission]:
    """Prompts of several lengths and members, each submitted before some step."""
    drawn: list[Submission] = []
    for group in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(st.integers(0, 255), min_size=1, max_size=24))
        n, step = draw(st.integers(1, 2)), draw(st.integers(0, 12))
        params = draw(st.sampled_from(PARAMS))
        drawn += [(step, each, params) for each in members([ask(group, prompt, seed=group)], n)]
    return drawn


def run(engine: HFEngine, drawn: list[Submission]) -> dict[SampleId, Completion]:
    done: list[Completion] = []
    waiting, step = list(drawn), 0
    while waiting or engine.pending:
        for _, request, params in [each for each in waiting if each[0] <= step]:
            engine.submit(request, params)
        waiting = [each for each in waiting if each[0] > step]
        done += engine.step()
        assert engine.pending + len(done) + len(waiting) == len(drawn)
        step += 1
    return {each.request.id: each for each in done}


@pytest.fixture(scope="module")
def engines(make_model, make_engine_of) -> Callable[[str], tuple[HFEngine, ...]]:
    """Engines of an architecture with the limits above, and one more that answers each request alone."""
    made: dict[str, tuple[HFEngine, ...]] = {}

    def make(name: str) -> tuple[HFEngine, ...]:
        if name not in made:
            path, model = make_model(name)
            made[name] = tuple(
                make_engine_of(path, model, override_config=ENDS, **limits) for limits in (*LIMITS, {})
            )
        return made[name]

    return make


# Full attention with a ready-made mask, prompts of which some are shared, layers with a window, and positions that are read
# off the mask.
@pytest.mark.parametrize(
    ("name", "pays"), [("qwen2", PAYS), ("qwen2", 12), ("gemma3_text", PAYS), ("bloom", PAYS)]
)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=submissions(), limits=st.integers(0, len(LIMITS) - 1))
def test_a_request_that_joins_others_gets_the_response_that_it_gets_alone(
    name, pays, engines, drawn, limits
) -> None:
    made = engines(name)
    with mock.patch("iiverl_core.rollout.hf.forward.PAYS", pays):
        together, alone = run(made[limits], drawn), made[-1]
    for _, request, params in drawn:
        (expected,) = generate(alone, [request], params)
        done = together[request.id]
        assert done.token_ids.tolist() == expected.token_ids.tolist()
        assert done.finish_reason == expected.finish_reason
        np.testing.assert_allclose(done.log_probs, expected.log_probs, atol=1e-5)


@pytest.fixture
def engine(engines) -> HFEngine:
    return engines("qwen2")[0]


def passes_of(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record (rows, columns) of each forward pass."""
    passes: list[tuple[int, int]] = []
    hook = engine._model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: passes.append(tuple(inputs[0].shape))
    )
    monkeypatch.setattr(engine, "hook", hook, raising=False)
    return passes


def test_who_joins_does_so_at_the_next_step_and_shares_its_prompt(engine, monkeypatch) -> None:
    passes = passes_of(engine, monkeypatch)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    for request in members([ask(0, [1, 2, 3])], 2):
        engine.submit(request, params)
    engine.step()
    for request in members([ask(1, [4] * 9)], 3):
        engine.submit(request, params)
    finished = [len(engine.step()) for _ in range(6)]
    engine.hook.remove()
    assert passes == [(1, 3), (2, 1), (1, 9), *[(5, 1)] * 4, (3, 1)]
    assert finished == [0, 0, 0, 0, 2, 3]


def test_what_waited_when_a_batch_began_comes_after_it(engines, monkeypatch) -> None:
    engine = engines("qwen2")[1]  # three sequences at a time
    passes = passes_of(engine, monkeypatch)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    for group in range(4):
        engine.submit(ask(group, [1] * (10 - group)), params)
    order = [done.request.id.group for _ in range(6) for done in engine.step()]
    engine.hook.remove()
    assert passes == [(3, 10), (3, 1), (3, 1), (1, 7), (1, 1), (1, 1)]
    assert order == [0, 1, 2, 3]


def test_dropped_requests_leave_the_others_as_they_are(engine) -> None:
    requests = members([ask(0, [1, 2, 3]), ask(1, [7] * 8)], 3)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = {done.request.id: done.token_ids.tolist() for done in generate(engine, requests, params)}
    for request in requests[:4]:
        engine.submit(request, params)
    engine.step()
    for request in requests[4:]:
        engine.submit(request, params)
    engine.abort({requests[1], requests[4]})
    assert engine.pending == 4
    engine.step()
    engine.abort({requests[3], requests[5], ask(9, [1])})
    assert engine.pending == 2
    done = [each for _ in range(10) for each in engine.step()]
    assert {each.request.id: each.token_ids.tolist() for each in done} == {
        request.id: expected[request.id] for request in (requests[0], requests[2])
    }
    assert engine.pending == 0 and engine.step() == []


def test_a_stream_that_is_closed_leaves_nothing_in_the_engine(engine) -> None:
    stream = respond(engine, [ask(0, [1, 2])], SamplingParams(max_tokens=30), n=8)
    next(stream)
    assert engine.pending > 0
    with pytest.raises(RuntimeError, match="other requests are unfinished"):
        next(respond(engine, [ask(1, [1])], SamplingParams()))
    stream.close()
    assert engine.pending == 0
    stream = respond(engine, [ask(0, [1, 2])], SamplingParams(max_tokens=30), n=8)
    next(stream)
    engine.sleep()
    with pytest.raises(RuntimeError, match="take all responses before"):
        next(stream)
