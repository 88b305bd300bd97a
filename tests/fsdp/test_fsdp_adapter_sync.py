"""Adapters on their way to an engine: its log-probs are those of the trainer, merged and beside the weights of the base."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fsdp.test_fsdp_adapters import spec_of
from fsdp.test_fsdp_checkpoints import CPU, step
from iiverl_core.config import ModelConfig
from iiverl_core.rollout import GenerationRequest, SamplingParams, generate
from iiverl_core.rollout.hf import HFEngine
from iiverl_core.samples import SampleId, TokenSequence
from iiverl_core.training import MicroBatch
from iiverl_core.training.adapter import add_adapter, is_adapter
from iiverl_core.training.batching import make_micro_batch
from iiverl_fsdp.backend import FSDPBackend
from ranks import Ranks

Sync = Literal["merged", "adapter"]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
CLOSE = 1e-5


@pytest.fixture(scope="module")
def moe_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with the tokenizer of `tiny_model_path`."""
    path = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,  # pyright: ignore[reportCallIssue]
        max_position_embeddings=512,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(path)
    for file in tiny_model_path.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def weights_of(backend: FSDPBackend, sync: Sync, *, base: bool = True) -> Iterator[tuple[str, Tensor]]:
    if sync == "merged":
        yield from backend.named_weights()
        return
    if base:
        yield from backend.named_weights(adapters="omitted")
    yield from backend.named_weights(adapters="only")


def log_probs_of_both(path: Path, sync: Sync) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return log-probs of responses by engine, trainer and base model, after the first and after a second sync."""
    spec = spec_of(path, use_remove_padding=False)
    backend = FSDPBackend(spec)
    engine = HFEngine(
        str(path), dtype=torch.float32, device=CPU, adapters=spec.model if sync == "adapter" else None
    )
    found = []
    for version in range(2):
        for _ in range(3):
            step(backend)
        engine.update_weights(weights_of(backend, sync, base=version == 0), version)
        requests = [GenerationRequest(SampleId("train", 1, i, 0), range(9, 12 + i), i) for i in range(4)]
        batches: list[MicroBatch] = []
        sampled: list[np.ndarray] = []
        for done in generate(engine, requests, PARAMS):
            prompt = np.array(done.request.prompt_ids)
            sequence = TokenSequence.single_turn(prompt, done.token_ids, done.log_probs)
            batches.append(make_micro_batch([sequence], {}, [1.0], device=CPU))
            sampled.append(done.log_probs)

        def trained(adapter: bool, batches: list[MicroBatch] = batches) -> Tensor:
            outputs = backend.forward(batches, adapter=adapter)
            return torch.cat([each.log_probs_T for each in outputs if each.log_probs_T is not None])

        found.append((torch.from_numpy(np.concatenate(sampled)), trained(True), trained(False)))
    return found


@pytest.mark.parametrize("sync", ["merged", "adapter"])
@pytest.mark.parametrize("model", ["tiny_model_path", "moe_path"])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_engine_computes_what_the_trainer_does(
    one_rank,
    ranks: Callable[..., Ranks],
    request: pytest.FixtureRequest,
    model: str,
    processes: int,
    sync: Sync,
) -> None:
    path = request.getfixturevalue(model)
    if processes == 1:
        found = log_probs_of_both(path, sync)
    else:
        found = ranks(processes).run(log_probs_of_both, path, sync)[0]
    for engine, trainer, base in found:
        assert torch.allclose(engine, trainer, atol=CLOSE, rtol=CLOSE)
        assert (trainer - base).abs().max() > 100 * CLOSE


def test_an_engine_needs_the_base_and_all_adapters(one_rank, tiny_model_path: Path) -> None:
    spec = spec_of(tiny_model_path)
    backend = FSDPBackend(spec)
    engine = HFEngine(str(tiny_model_path), dtype=torch.bfloat16, device=CPU, adapters=spec.model)
    with pytest.raises(ValueError, match=r"missing: model\.embed_tokens"):
        engine.update_weights(weights_of(backend, "adapter", base=False), 0)
    engine.update_weights(weights_of(backend, "adapter"), 0)
    engine.update_weights(weights_of(backend, "adapter", base=False), 1)
    some = list(weights_of(backend, "adapter", base=False))[1:]
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight"):
        engine.update_weights(some, 2)
    engine.update_weights(weights_of(backend, "adapter"), 3)
    engine.sleep(discard_weights=True)
    with pytest.raises(ValueError, match=r"missing: model\.embed_tokens"):
        engine.update_weights(weights_of(backend, "adapter", base=False), 4)


def test_adapters_of_a_billion_parameters_are_a_hundredth_of_its_weights() -> None:
    """Llama-3.2-1B at rank 16, counted."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        full = sum(each.numel() for each in model.parameters())
        add_adapter(model, ModelConfig(lora_rank=16), model.get_output_embeddings())
    synced = sum(each.numel() for name, each in model.named_parameters() if is_adapter(name))
    assert full == 1_235_814_400
    assert 0.005 * full < synced < 0.01 * full
