"""Large weights are packed for decoding, again after each update, and responses are those of the model."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from iiverl_core.rollout import SamplingParams
from iiverl_core.rollout.hf import packed_weights
from rollout.responses import group, respond

CAN_PACK = packed_weights._can_pack(torch.empty(0))


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "LEAST", 1)


@pytest.mark.skipif(not CAN_PACK, reason="torch has no oneDNN here")
@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "llama"])
def test_each_update_packs_anew(name, packing, make_model, make_engine_of, prompts, teacher_forced) -> None:
    path, model = make_model(name)
    engine, model = make_engine_of(path, model), deepcopy(model)
    by_key = {request.id.group: request.prompt_ids for request in prompts}
    params = SamplingParams(max_tokens=12)
    linear = [each for each in engine._model.modules() if type(each) is torch.nn.Linear]
    for version in (1, 2):
        for done in respond(engine, prompts, params, n=2):
            expected = teacher_forced(model, by_key[group(done)], done, params)
            np.testing.assert_allclose(done.log_probs, expected, atol=1e-5, rtol=1e-5)
        assert len(engine._packed._packed) == len(linear) > 10
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.7)
        engine.update_weights(model.state_dict().items(), version)
        assert not engine._packed._packed
    engine.close()


def test_packed_products_in_bf16_have_the_same_bits(packing) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 96, bias=True), torch.nn.Linear(96, 32, bias=False)
    ).bfloat16()
    rows = torch.randn(5, 1, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = model(rows)
        packed_weights.PackedWeights(model)
        assert torch.equal(model(rows), expected)


def test_small_weights_stay_as_they_are(make_model, make_engine_of, prompts) -> None:
    engine = make_engine_of(*make_model("qwen2"))
    list(respond(engine, prompts, SamplingParams(max_tokens=3)))
    assert not engine._packed._packed
