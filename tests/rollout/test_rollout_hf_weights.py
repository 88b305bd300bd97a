"""Weights reach the engine whole, or the engine has none."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from iiverl_core.rollout import SamplingParams
from iiverl_core.rollout.hf import HFEngine
from rollout.responses import respond

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def model(tiny_model_path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


@pytest.fixture
def engine(tiny_model_path) -> HFEngine:
    return HFEngine(str(tiny_model_path), dtype=torch.float32, device="cpu")


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def outputs(engine: HFEngine, prompts) -> list[list[int]]:
    return [done.token_ids.tolist() for done in respond(engine, prompts, GREEDY)]


def test_an_engine_without_weights_does_not_generate(engine, prompts) -> None:
    assert engine.weights_version == -1
    with pytest.raises(RuntimeError, match="has no weights"):
        next(respond(engine, prompts, GREEDY))


def test_an_update_changes_what_is_generated_and_its_version(engine, model, prompts) -> None:
    engine.update_weights(weights_of(model).items(), 4)
    first = outputs(engine, prompts)
    assert {done.weights_version for done in respond(engine, prompts, GREEDY)} == {4}
    changed = {name: -weight for name, weight in weights_of(model).items()}
    engine.update_weights(changed.items(), 5)
    assert outputs(engine, prompts) != first
    assert {done.weights_version for done in respond(engine, prompts, GREEDY)} == {5}
    engine.update_weights(weights_of(model).items(), 6)
    assert outputs(engine, prompts) == first


def test_each_tensor_may_be_reused_once_the_next_is_asked_for(engine, model, prompts) -> None:
    engine.update_weights(weights_of(model).items(), 0)
    expected = outputs(engine, prompts)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights_of(model).items():
            yield name, weight
            weight.fill_(float("nan"))

    engine.update_weights(stream(), 1)
    assert outputs(engine, prompts) == expected
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(engine._model.parameters(), model.parameters(), strict=True)
    )


def test_weights_are_converted_to_the_dtype_of_the_engine(engine, model) -> None:
    engine.update_weights(((name, weight.bfloat16()) for name, weight in weights_of(model).items()), 0)
    for ours, theirs in zip(engine._model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16().float())


Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.layer.weight": torch.ones(1)}, r"unknown: model\.layer\.weight"),
        (lambda w: {k: v for k, v in w.items() if k not in (Q, NORM)}, rf"missing: {Q}, {NORM}"),
        (lambda w: w | {Q: torch.ones(3, 4)}, rf"{Q} is \(3, 4\) and should be \(64, 64\)"),
        (lambda w: {}, r"missing: .* and \d+ more"),
        (
            lambda w: {f"module.{k}": v for k, v in w.items()},
            r"unknown: module\..* and \d+ more; missing: model\.",
        ),
    ],
)
def test_weights_that_do_not_fit_leave_the_engine_without_any(
    engine, model, prompts, change, message
) -> None:
    weights = weights_of(model)
    engine.update_weights(weights.items(), 1)
    with pytest.raises(ValueError, match=message):
        engine.update_weights(change(weights).items(), 2)
    assert engine.weights_version == -1
    with pytest.raises(RuntimeError, match="has no weights"):
        next(respond(engine, prompts, GREEDY))
    engine.update_weights(weights.items(), 3)
    assert outputs(engine, prompts)


def test_a_weight_given_twice_is_told(engine, model) -> None:
    weights = list(weights_of(model).items())
    with pytest.raises(ValueError, match=f"{weights[0][0]} was given twice"):
        engine.update_weights([*weights, weights[0]], 0)


def test_a_misfit_does_not_end_the_stream(engine, model) -> None:
    """Processes that gather weights together would wait for one that stopped to ask."""
    weights = iter([("unknown", torch.ones(1)), *weights_of(model).items()])
    with pytest.raises(ValueError, match="unknown"):
        engine.update_weights(weights, 0)
    assert next(weights, None) is None


def test_a_stream_that_breaks_leaves_the_engine_without_weights(engine, model) -> None:
    engine.update_weights(weights_of(model).items(), 0)

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights_of(model).items())[:3]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        engine.update_weights(stream(), 1)
    assert engine.weights_version == -1


def test_tied_weights_are_given_once_or_twice_alike(make_model, prompts) -> None:
    path, model = make_model("qwen2-tied")
    once = weights_of(model)
    embedding = once["model.embed_tokens.weight"]
    assert "lm_head.weight" not in once
    head_only = {name: weight for name, weight in once.items() if name != "model.embed_tokens.weight"}
    engine = HFEngine(str(path), dtype=torch.float32, device="cpu")
    results = []
    for version, weights in enumerate(
        [once, once | {"lm_head.weight": embedding.clone()}, head_only | {"lm_head.weight": embedding}]
    ):
        engine.update_weights(weights.items(), version)
        results.append(outputs(engine, prompts))
    assert results[0] == results[1] == results[2]
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        engine.update_weights((once | {"lm_head.weight": embedding + 1}).items(), 9)
    with pytest.raises(ValueError, match=r"missing: model\.embed_tokens\.weight\b"):
        engine.update_weights(head_only.items(), 9)


def test_an_untied_head_is_missed(engine, model) -> None:
    weights = weights_of(model)
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        engine.update_weights(weights.items(), 0)


def test_weights_may_not_change_under_a_response(engine, model, prompts) -> None:
    engine.update_weights(weights_of(model).items(), 0)
    responses = respond(engine, prompts, GREEDY)
    next(responses)
    engine.update_weights(weights_of(model).items(), 1)
    with pytest.raises(RuntimeError, match="while responses were being generated"):
        next(responses)
