"""The engine's loop: what is computed, who stops when, and that a response is a function of its own seed."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from iiverl_core.errors import NonFiniteError
from iiverl_core.rollout import SamplingParams
from iiverl_core.rollout.hf import HFEngine
from iiverl_core.rollout.hf.cache import RowCache
from rollout.responses import ask, group, place, respond

MANY_ENDS = {"eos_token_id": [258, *range(0, 320, 8)]}


@pytest.fixture(scope="module")
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()


@pytest.fixture
def make(tiny_model_path, model, make_engine_of):
    return lambda **options: make_engine_of(tiny_model_path, model, **options)


def as_dict(completions):
    return {place(done): done for done in completions}


def count_passes(engine: HFEngine) -> list[tuple[int, int]]:
    """Record (rows, columns) of each forward pass."""
    passes = []
    engine._model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: passes.append(inputs[0].shape)
    )
    return passes


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=16),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9, max_tokens=16),
        SamplingParams(temperature=1.7, top_p=0.5, max_tokens=40),
    ],
)
def test_log_probs_are_under_the_distribution_sampled_from(
    make, model, prompts, teacher_forced, params
) -> None:
    completions = as_dict(respond(make(), prompts, params, n=4))
    assert completions.keys() == {(request.id.group, m) for request in prompts for m in range(4)}
    for request in prompts:
        for member in range(4):
            done = completions[request.id.group, member]
            assert (done.token_ids.dtype, done.log_probs.dtype) == (np.int64, np.float32)
            expected = teacher_forced(model, request.prompt_ids, done, params)
            np.testing.assert_allclose(done.log_probs, expected, atol=1e-5, rtol=1e-5)
            assert (done.kept is None) == (not params.truncates)
            if done.kept is not None:
                kept = np.split(done.kept.ids, done.kept.counts.cumsum()[:-1])
                assert all(token in ids for token, ids in zip(done.token_ids, kept, strict=True))
                assert params.top_k < 0 or max(map(len, kept)) <= params.top_k
                assert sum(done.kept.counts) == len(done.kept.ids)


def test_a_prompt_is_computed_once_for_its_responses(make, prompts) -> None:
    engine = make()
    passes = count_passes(engine)
    list(respond(engine, prompts, SamplingParams(max_tokens=5, ignore_eos=True), n=4))
    assert passes == [(5, 12), *[(20, 1)] * 4]


def test_finished_rows_leave_at_once(make, prompts) -> None:
    engine = make(override_config=MANY_ENDS)
    passes = count_passes(engine)
    completions = list(respond(engine, prompts, SamplingParams(max_tokens=30), n=8))
    lengths = [len(done.token_ids) for done in completions]
    assert len(set(lengths)) > 5
    # A sequence's first token comes from its prompt's pass, and its last token is never computed.
    assert [rows for rows, _ in passes[1:]] == [
        sum(length > step for length in lengths) for step in range(1, max(lengths))
    ]


def test_each_row_is_yielded_before_the_next_pass(make, prompts) -> None:
    engine = make(override_config=MANY_ENDS)
    passes = count_passes(engine)
    for done in respond(engine, prompts, SamplingParams(max_tokens=30), n=8):
        assert len(passes) == len(done.token_ids)


def test_rows_stop_at_every_end_of_sentence(make, prompts) -> None:
    ends = set(MANY_ENDS["eos_token_id"])
    params = SamplingParams(max_tokens=10)
    completions = as_dict(respond(make(override_config=MANY_ENDS), prompts, params, n=16))
    endless = as_dict(
        respond(
            make(override_config=MANY_ENDS), prompts, SamplingParams(max_tokens=10, ignore_eos=True), n=16
        )
    )
    reasons = Counter(done.finish_reason for done in completions.values())
    assert reasons["stop"] > 10 and reasons["length"] > 10
    for key, done in completions.items():
        tokens = done.token_ids.tolist()
        assert not ends & set(tokens[:-1])
        assert (tokens[-1] in ends) == (done.finish_reason == "stop")
        assert done.finish_reason == "stop" or len(tokens) == 10
        assert endless[key].finish_reason == "length"
        assert endless[key].token_ids[: len(tokens)].tolist() == tokens
        assert len(endless[key].token_ids) == 10


def test_the_tokenizer_names_an_end_of_sentence(
    make, tiny_model_path, tiny_tokenizer, tmp_path, prompts
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    first = next(iter(respond(make(), prompts[:1], SamplingParams(temperature=0, max_tokens=1)))).token_ids[0]
    other = type(tiny_tokenizer).from_pretrained(tmp_path)
    other.eos_token = other.convert_ids_to_tokens(int(first))
    other.save_pretrained(tmp_path)
    done = next(iter(respond(make(tokenizer_path=str(tmp_path)), prompts[:1], SamplingParams(temperature=0))))
    assert (done.token_ids.tolist(), done.finish_reason) == ([first], "stop")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_response_is_a_function_of_its_own_seed(make, prompts, dtype) -> None:
    params = SamplingParams(max_tokens=20)
    together = as_dict(respond(make(dtype=dtype, override_config=MANY_ENDS), prompts, params, n=4))
    engine = make(dtype=dtype, override_config=MANY_ENDS, prompts_per_batch=2, max_sequences=5)
    for request in prompts:
        for n in (1, 4, 7):
            alone = as_dict(respond(engine, [request], SamplingParams(max_tokens=20), n=n))
            assert len(alone) == n
            for member in range(min(n, 4)):
                expected, done = together[request.id.group, member], alone[request.id.group, member]
                assert done.token_ids.tolist() == expected.token_ids.tolist()
                np.testing.assert_allclose(done.log_probs, expected.log_probs, atol=1e-5)
    reseeded = as_dict(respond(engine, [ask(10, prompts[0].prompt_ids, seed=7)], params, n=4))
    assert any(reseeded[10, m].token_ids.tolist() != together[10, m].token_ids.tolist() for m in range(4))


def test_batches_keep_to_their_limits_and_take_similar_lengths(make) -> None:
    requests = [ask(i, [1] * length) for i, length in enumerate([3, 20, 4, 19, 5, 18])]
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    for options, shapes in [
        ({"prompts_per_batch": 2}, [(2, 20), (2, 18), (2, 4)]),
        ({"max_sequences": 11}, [(3, 20), (3, 5)]),
        ({"max_sequences": 2}, [(1, n) for n in (20, 20, 19, 19, 18, 18, 5, 5, 4, 4, 3, 3)]),
    ]:
        engine = make(**options)
        passes = count_passes(engine)
        assert len(as_dict(respond(engine, requests, params, n=3))) == 18
        assert passes[::2] == shapes
        assert max(rows for rows, _ in passes) <= options.get("max_sequences", 6)


def test_bf16_log_probs_are_near_those_of_fp32(make, model, prompts, teacher_forced) -> None:
    engine = make(dtype=torch.bfloat16)
    assert {weight.dtype for weight in engine._model.parameters()} == {torch.bfloat16}
    params = SamplingParams(max_tokens=12)
    by_key = {request.id.group: request.prompt_ids for request in prompts}
    for done in respond(engine, prompts, params, n=2):
        expected = teacher_forced(model, by_key[group(done)], done, params)
        np.testing.assert_allclose(done.log_probs, expected, atol=0.05)


def test_long_responses_outgrow_the_room_of_the_cache(make, model, prompts, teacher_forced) -> None:
    params = SamplingParams(max_tokens=120)
    by_key = {request.id.group: request.prompt_ids for request in prompts}
    completions = list(respond(make(), prompts, params, n=2))
    assert max(len(done.token_ids) for done in completions) == 120
    for done in completions:
        expected = teacher_forced(model, by_key[group(done)], done, params)
        np.testing.assert_allclose(done.log_probs, expected, atol=1e-5, rtol=1e-5)


def test_columns_that_pad_every_row_leave(make, model, teacher_forced, monkeypatch) -> None:
    trimmed = []
    keep = RowCache.keep
    monkeypatch.setattr(
        RowCache, "keep", lambda cache, chosen: (trimmed.append(chosen.first_column), keep(cache, chosen))
    )
    generator = torch.Generator().manual_seed(0)
    requests = [
        ask(i, torch.randint(0, 256, (60 - 5 * i,), generator=generator).tolist(), i) for i in range(12)
    ]
    params = SamplingParams(max_tokens=20)
    for done in respond(make(override_config={"eos_token_id": list(range(0, 320, 3))}), requests, params):
        expected = teacher_forced(model, requests[group(done)].prompt_ids, done, params)
        np.testing.assert_allclose(done.log_probs, expected, atol=1e-5, rtol=1e-5)
    assert sum(columns > 0 for columns in trimmed) >= 2


def test_the_caller_keeps_its_gradients_and_its_random_numbers(make, prompts) -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    for _ in respond(make(), prompts, SamplingParams(max_tokens=2)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_logits_that_are_not_finite_are_told(make, model, prompts) -> None:
    engine = make()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights["model.norm.weight"][:] = float("nan")
    engine.update_weights(weights.items(), 1)
    for temperature in (0, 1):
        with pytest.raises(NonFiniteError, match="not finite, at token 1 of the response to request train"):
            list(respond(engine, prompts, SamplingParams(temperature=temperature)))


@pytest.mark.parametrize(
    ("request_", "params", "message"),
    [
        (ask(3, []), SamplingParams(), "prompt of request train step 1, group 3, member 0 is empty"),
        (
            ask(3, [1, 320]),
            SamplingParams(),
            "request train step 1, group 3, member 0 holds a token id outside of the model's 320",
        ),
        (ask(3, [-1]), SamplingParams(), "request train step 1, group 3, member 0 holds a token id outside"),
        (ask(3, [1]), SamplingParams(temperature=-1), "temperature is out of range"),
        (ask(3, [1]), SamplingParams(top_p=0), "top_p is out of range"),
        (ask(3, [1]), SamplingParams(max_tokens=0), "max_tokens is out of range"),
    ],
)
def test_what_cannot_be_answered_is_refused_at_once(make, request_, params, message) -> None:
    engine = make()
    with pytest.raises(ValueError, match=message):
        engine.submit(request_, params)
    assert engine.pending == 0


def test_no_requests_have_no_responses(make) -> None:
    assert list(respond(make(), [], SamplingParams())) == []
