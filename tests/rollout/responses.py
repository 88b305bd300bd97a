"""Requests and responses, as the tests of engines name them: by the group of the prompt and the member of the response."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

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
