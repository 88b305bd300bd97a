"""Whatever the architecture, the engine samples from the distribution that the model gives in one full pass."""

import inspect

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from iiverl_core.errors import ConfigError
from iiverl_core.rollout import SamplingParams
from iiverl_core.rollout.hf import HFEngine
from iiverl_core.rollout.hf.cache import CACHE_ARGUMENTS, cache_argument
from iiverl_core.rollout.hf.prompts import PAYS
from rollout.responses import group, place, respond

FAMILIES = [
    "qwen2",
    "qwen2-tied",
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "qwen3_moe",
    "gpt2",
    "bloom",
]


@pytest.mark.parametrize("pays", [PAYS, 0], ids=["prompts of rows", "shared prompts"])
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_those_of_a_full_pass(
    name, pays, make_model, make_engine_of, prompts, teacher_forced, monkeypatch
) -> None:
    monkeypatch.setattr("iiverl_core.rollout.hf.forward.PAYS", pays)
    path, model = make_model(name)
    # Many ends of sentence: rows leave at different tokens, and with them columns of padding.
    engine = make_engine_of(path, model, override_config={"eos_token_id": [258, *range(0, 320, 12)]})
    params = SamplingParams(temperature=0.8, max_tokens=24)
    completions = list(respond(engine, prompts, params, n=3))
    assert len({place(done) for done in completions}) == 15
    assert len({len(done.token_ids) for done in completions}) > 3
    by_key = {request.id.group: request.prompt_ids for request in prompts}
    for done in completions:
        expected = teacher_forced(model, by_key[group(done)], done, params)
        np.testing.assert_allclose(done.log_probs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_is_what_transformers_generates(name, make_model, make_engine_of, prompts) -> None:
    path, model = make_model(name)
    engine = make_engine_of(path, model)
    params = SamplingParams(temperature=0, max_tokens=20)
    for done in respond(engine, prompts, params):
        prompt = next(request.prompt_ids for request in prompts if request.id.group == group(done))
        with torch.no_grad():
            theirs = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert done.token_ids.tolist() == theirs[0, len(prompt) :].tolist()
        assert (done.log_probs == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_buffers_are_those_of_a_loaded_model(name, make_model, make_engine_of) -> None:
    path, model = make_model(name)
    loaded = dict(AutoModelForCausalLM.from_pretrained(path).named_buffers())
    engine = make_engine_of(path, model, dtype=torch.bfloat16)
    buffers = dict(engine._model.named_buffers())
    assert buffers.keys() == loaded.keys()
    for key, buffer in buffers.items():
        torch.testing.assert_close(buffer, loaded[key].to(buffer.dtype), msg=key)
        if "inv_freq" in key:
            assert buffer.dtype == torch.float32


def test_another_attention_that_the_configuration_names_is_used(make_model, make_engine_of, prompts) -> None:
    path, model = make_model("qwen2")
    params = SamplingParams(max_tokens=20)
    tokens = []
    for attention in ("sdpa", "eager"):
        engine = make_engine_of(path, model, override_config={"attn_implementation": attention})
        assert (engine._model.config._attn_implementation == "eager") == (attention == "eager")
        tokens.append([done.token_ids.tolist() for done in respond(engine, prompts, params, n=2)])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        # Since transformers 5.24 its forward has a `cache`, which holds states.
        ("mamba", "(takes no key-value cache|its layers keep a state that is not keys and values)"),
        ("openai-gpt", "takes no key-value cache"),
        ("qwen3_next", "its layers keep a state that is not keys and values"),
    ],
)
def test_a_model_without_a_key_value_cache_is_refused(kind, reason, tiny_tokenizer, tmp_path) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "vocab_size": 320}
    AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"`hf` cannot run \w+[^:]*: .*{reason}"):
        HFEngine(str(tmp_path), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", CACHE_ARGUMENTS)
def test_the_cache_may_have_any_of_its_names(name, make_model, make_engine_of, prompts, monkeypatch) -> None:
    path, model = make_model("qwen2")
    params = SamplingParams(max_tokens=8)
    expected = [
        done.token_ids.tolist() for done in respond(make_engine_of(path, model), prompts, params, n=2)
    ]
    engine = make_engine_of(path, model)
    theirs, its_own = engine._model.forward, cache_argument(engine._model)
    given = []

    def forward(input_ids, attention_mask, position_ids, use_cache, logits_to_keep, **cache):
        given.append(list(cache))
        return theirs(
            input_ids,
            attention_mask,
            position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{its_own: cache[name]},
        )

    parameters = [*inspect.signature(forward).parameters.values()][:-1]
    cache = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = inspect.Signature([*parameters, cache])
    monkeypatch.setattr(engine._model, "forward", forward)
    assert [done.token_ids.tolist() for done in respond(engine, prompts, params, n=2)] == expected
    assert len(given) > 1 and all(names == [name] for names in given)


def test_a_folder_without_a_model_is_refused(tmp_path, tiny_model_path) -> None:
    with pytest.raises(ConfigError, match="no model can be read from"):
        HFEngine(str(tmp_path), dtype=torch.float32, device="cpu")
    with pytest.raises(ConfigError, match="no_such_key"):
        HFEngine(str(tiny_model_path), dtype=torch.float32, device="cpu", override_config={"no_such_key": 1})
    with pytest.raises(ConfigError, match="no tokenizer can be read from"):
        HFEngine(
            str(tiny_model_path), dtype=torch.float32, device="cpu", tokenizer_path=str(tmp_path / "none")
        )
