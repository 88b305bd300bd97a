"""What the Megatron backend tells of models that it cannot build, and what it leaves alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import batches, in_layout, layout, make_model, model_spec
from safetensors.torch import load_file, save_file

from iiverl_core.errors import ConfigError
from rollouts import trained_positions

pytestmark = pytest.mark.megatron


def without(path: Path, name: str) -> None:
    file = path / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})


def test_a_weight_that_is_missing(one_rank, tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen2")
    without(path, "model.layers.3.mlp.up_proj.weight")
    with pytest.raises(ConfigError, match=r"lacks model\.layers\.3\.mlp\.up_proj\.weight; is it whole"):
        in_layout(model_spec(path, layout()))


def test_a_reward_model_without_a_head_and_a_critic_that_begins_at_zero(one_rank, tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen2")
    with pytest.raises(ConfigError, match=r"is no reward model: its checkpoint has no score\.weight"):
        in_layout(model_spec(path, layout(), "reward"))
    weights = dict(in_layout(model_spec(path, layout(), "critic")).named_weights())
    assert weights["score.weight"].shape == (1, 64)
    assert not weights["score.weight"].any() and not weights["score.bias"].any()
    assert "lm_head.weight" not in weights


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "another shape": ({"num_key_value_heads": 4}, r"q_proj\.weight of .* has shape"),
    "scaled positions": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "scales its rotary positions by dynamic",
    ),
    "another activation": ({"hidden_act": "gelu"}, r"has the activation gelu \(hidden_act\), which"),
    "a sliding window": ({"use_sliding_window": True}, r"has a sliding window \(use_sliding_window\), which"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_it_does_not_know(one_rank, tmp_path: Path, case: str) -> None:
    changes, message = CHANGED[case]
    path = make_model(tmp_path, "qwen2")
    with pytest.raises(ConfigError, match=message):
        in_layout(model_spec(path, layout(), override_config=changes))


def test_positions_as_llama_scales_them_and_half_precision(one_rank, tmp_path: Path) -> None:
    """Scaled rotary positions give transformers' logits; in bf16 they are near, and the weights given are bf16."""
    from transformers import AutoModelForCausalLM

    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    path = make_model(tmp_path, "llama", rope_parameters=scaled)
    micro = batches(0, 1, sequences=1)[-1:]
    ids, predicting, targets = trained_positions(micro[0].sequences[0])
    logits = AutoModelForCausalLM.from_pretrained(path)(ids).logits[0, predicting] / micro[0].temperature
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    found = in_layout(model_spec(path, layout())).forward(micro)[0].log_probs_T
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)

    half = in_layout(model_spec(path, layout().model_copy(update={"dtype": "bf16"})))
    near = half.forward(micro)[0].log_probs_T
    assert near.dtype == torch.float32 and not torch.equal(near, found)
    torch.testing.assert_close(near, found, atol=0.2, rtol=0)
    assert {tensor.dtype for _, tensor in half.named_weights()} == {torch.bfloat16}
    assert {tensor.dtype for _, tensor in half.named_weights(torch.float32)} == {torch.float32}


def test_settings_are_made_before_megatron_core_is_imported() -> None:
    """Asking what the package offers makes none of them, and imports neither torch nor megatron-core."""
    code = (
        "import os, sys, iiverl_megatron\n"
        "name = 'CUDA_DEVICE_MAX_CONNECTIONS'\n"
        "assert name not in os.environ and not {'torch', 'megatron'} & sys.modules.keys()\n"
        "import iiverl_megatron.backend\n"
        "assert os.environ[name] == '1'\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Transformer Engine" not in done.stderr  # what megatron-core says of itself is kept quiet


def test_the_stand_in_for_cuda_is_imported_only_without_it() -> None:
    """Importing the backend brings nothing of it, and what it replaces is as before when a call returns."""
    code = "import sys, iiverl_megatron.backend; assert 'iiverl_megatron.cpu' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    from iiverl_megatron.cpu import on_cpu

    before = torch.cuda.current_device, torch.cuda.Stream
    with on_cpu():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).cuda().type() == "torch.cuda.FloatTensor"
    assert before == (torch.cuda.current_device, torch.cuda.Stream)
    assert torch.zeros(1).type() == "torch.FloatTensor"
