"""Requests and responses, as the tests of engines name them: by the group of the prompt and the member of the response."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np

from iiverl_core.rollout import Completion, GenerationRequest, RolloutEngine, SamplingParams, generate
from iiverl_core.samples import SampleId


def ask(group: int, prompt_ids: Sequence[int], seed: int = 0) -> GenerationRequest:
    """Ask for the first response to a prompt."""
    return GenerationRequest(SampleId("train", 1, group, 0), prompt_ids, seed)


def members(requests: Sequence[GenerationRequest], n: int) -> list[GenerationRequest]:
    """Ask for the first `n` responses to each prompt."""
    return [replace(each, id=each.id._replace(member=m)) for each in requests for m in range(n)]


def respond(
    engine: RolloutEngine, requests: Sequence[GenerationRequest], params: SamplingParams, n: int = 1
) -> Iterator[Completion]:
    """Generate the first `n` responses to each prompt."""
    return generate(engine, members(requests, n), params)


def group(done: Completion) -> int:
    return done.request.id.group


def place(done: Completion) -> tuple[int, int]:
    return done.request.id.group, done.request.id.member


def interrupted(
    engine: RolloutEngine,
    asked: list[GenerationRequest],
    params: SamplingParams,
    meanwhile: Callable[[int], None] = lambda times: None,
) -> list[Completion]:
    """Interrupt the engine before some steps, with one, two, … steps in between; some before the first token."""
    done: list[Completion] = []
    waiting, pauses, times = list(asked), cycle((0, 3, 1, 6)), 0
    while waiting:
        for each in waiting:
            engine.submit(each, params)
        for _ in range(next(pauses)):
            done += engine.step()
        continued = engine.interrupt()
        assert engine.pending == 0
        assert len(done) + len(continued) == len(asked)
        waiting, times = list(continued.values()), times + 1
        meanwhile(times)
    return done


def by_id(done: list[Completion]) -> dict[object, Completion]:
    return {each.request.id: each for each in done}


def check_spans(engine, models, params, prompts, teacher_forced, ends: Collection[int]) -> None:
    """Give other weights at every interruption: each span's log-probs are those of the model that is named."""

    def meanwhile(times: int) -> None:
        version = times % len(models)
        engine.update_weights(models[version].named_parameters(), version)

    meanwhile(0)
    asked = members(prompts, 2)
    done = by_id(interrupted(engine, asked, params, meanwhile))
    assert done.keys() == {each.id for each in asked}
    assert max(len(each.spans) for each in done.values()) > 3
    for each in done.values():
        expected = [teacher_forced(model, each.request.prompt_ids, each, params).numpy() for model in models]
        start = 0
        for version, count in each.spans:
            span = slice(start, start + count)
            wanted = 0.0 if params.temperature == 0 else expected[version][span]
            np.testing.assert_allclose(each.log_probs[span], wanted, atol=1e-4)
            start += count
        assert start == len(each.token_ids)
        assert each.finish_reason == ("stop" if each.token_ids[-1] in ends else "length")
