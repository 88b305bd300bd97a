"""LoRA adapters under FSDP: PEFT's numbers, names and files, and frozen weights that stay what they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from fsdp.test_fsdp_checkpoints import CPU, PRECISION, batches, loss, step
from iiverl_core.config import FSDPConfig, ModelConfig, OptimConfig
from iiverl_core.config.model_facts import read_model_facts
from iiverl_core.errors import CheckpointError, ConfigError
from iiverl_core.memory.states import trained_parameters
from iiverl_core.training import ModelSpec, Role
from iiverl_core.training.adapter import is_adapter, write_adapter
from iiverl_core.training.model_folder import write_safetensors
from iiverl_fsdp.backend import FSDPBackend
from ranks import Ranks

RANK = 4
CLOSE = 1e-5


def backend_of(path: Path, role: Role = "actor", **model: Any) -> FSDPBackend:
    return FSDPBackend(spec_of(path, role, **model))


def spec_of(path: Path, role: Role = "actor", **model: Any) -> ModelSpec:
    settings = {"lora_rank": RANK, "lora_alpha": 8} | model
    return ModelSpec(
        role=role,
        model=ModelConfig(path=str(path), **settings),
        parallel=FSDPConfig(**PRECISION),
        device=CPU,
        optim=OptimConfig(),
        grad_clip=1.0,
    )


def log_probs(backend: FSDPBackend, **options: bool) -> Tensor:
    outputs = backend.forward(batches(), **options)
    return torch.cat([each.log_probs_T for each in outputs if each.log_probs_T is not None])


def trained_backend(path: Path, role: Role = "actor", **model: Any) -> FSDPBackend:
    backend = backend_of(path, role, **model)
    for _ in range(3):
        step(backend)
    return backend


@pytest.fixture
def adapter_path(one_rank, tiny_model_path: Path, tmp_path: Path) -> Path:
    """An adapter in PEFT's format that has an effect."""
    backend = trained_backend(tiny_model_path)
    adapter = {
        name: each.detach().full_tensor()
        for name, each in backend._model.named_parameters()
        if is_adapter(name)
    }
    write_adapter(adapter, backend._spec.model, tmp_path / "adapter", task="CAUSAL_LM")
    return tmp_path / "adapter"


def test_an_adapter_starts_without_effect_and_is_all_that_is_trained(one_rank, tiny_model_path: Path) -> None:
    backend, plain = backend_of(tiny_model_path), backend_of(tiny_model_path, lora_rank=0)
    before = log_probs(backend)
    assert torch.equal(before, log_probs(plain))

    backend.forward_backward(batches(), loss)
    gradients = dict(backend.named_gradients())
    assert gradients.keys() == {name for name, _ in backend._model.named_parameters() if is_adapter(name)}
    assert len(gradients) == 2 * 7 * 2  # A and B of 7 linear layers in each of 2 blocks; not of the head
    for _ in range(3):
        step(backend)

    assert not torch.allclose(before, log_probs(backend), atol=1e-2)
    assert torch.equal(before, log_probs(backend, adapter=False))  # the reference of a run
    assert log_probs(backend).dtype == torch.float32


def test_merged_weights_compute_what_the_adapter_does(
    one_rank, tiny_model_path: Path, tmp_path: Path
) -> None:
    backend = trained_backend(tiny_model_path)
    weights = dict(backend.named_weights())
    plain = backend_of(tiny_model_path, lora_rank=0)
    assert weights.keys() == dict(plain.named_weights()).keys()

    merged = tmp_path / "merged"
    merged.mkdir()
    for file in tiny_model_path.iterdir():
        (merged / file.name).write_bytes(file.read_bytes())
    write_safetensors(iter(weights.items()), merged, write=True)()
    assert torch.allclose(
        log_probs(backend), log_probs(backend_of(merged, lora_rank=0)), atol=CLOSE, rtol=CLOSE
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_and_log_probs_are_those_of_peft(
    one_rank, tiny_model_path: Path, adapter_path: Path, rslora: bool
) -> None:
    settings = adapter_path / "adapter_config.json"
    settings.write_text(
        settings.read_text().replace('"use_rslora": false', f'"use_rslora": {str(rslora).lower()}')
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    peft = PeftModel.from_pretrained(base, adapter_path, is_trainable=True)
    expected_log_probs = []
    for batch in batches():
        (tokens,) = batch.sequences
        ids = torch.from_numpy(tokens.token_ids)
        logits = peft(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        chosen = logits.gather(1, ids[1:, None])[:, 0][torch.from_numpy(tokens.loss_mask)[1:]]
        (-(batch.weights_T * batch.arrays_T["targets"] * chosen).sum()).backward()
        expected_log_probs.append(chosen.detach())

    backend = backend_of(tiny_model_path, lora_adapter_path=str(adapter_path), use_rslora=rslora)
    assert torch.allclose(log_probs(backend), torch.cat(expected_log_probs), atol=CLOSE, rtol=CLOSE)
    backend.forward_backward(batches(), loss)
    gradients = dict(backend.named_gradients())
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            ours = gradients.pop(name.removeprefix("base_model.model.").replace(".default", ""))
            assert torch.allclose(ours, parameter.grad, atol=1e-6, rtol=1e-4), name
    assert not gradients


def after_steps(path: Path, role: Role) -> dict[str, Tensor]:
    return dict(trained_backend(path, role).named_weights())


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_two_processes_train_the_same_adapter(
    one_rank, ranks: Callable[..., Ranks], tiny_model_path: Path, role: Role
) -> None:
    alone = after_steps(tiny_model_path, role)
    for shared in ranks(2).run(after_steps, tiny_model_path, role):
        assert shared.keys() == alone.keys()
        for name in alone:
            assert torch.allclose(shared[name], alone[name], atol=CLOSE), name


def test_a_critic_trains_its_head_too_and_peft_reads_both(
    one_rank, tiny_model_path: Path, tmp_path: Path
) -> None:
    backend = trained_backend(tiny_model_path, "critic")
    backend.save(tmp_path / "saved")()
    values = torch.cat([each.values_T for each in backend.forward(batches()) if each.values_T is not None])
    saved = dict(FSDPBackend.saved_weights(backend._spec, tmp_path / "saved", adapter=True))
    assert {name for name in saved if not is_adapter(name)} == {"score.weight", "score.bias"}
    assert saved["score.weight"].abs().max() > 0
    write_adapter(saved, backend._spec.model, tmp_path / "adapter", task="TOKEN_CLS")

    base = AutoModelForTokenClassification.from_pretrained(tiny_model_path, num_labels=1)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = []
    for batch in batches():
        (tokens,) = batch.sequences
        states = peft(input_ids=torch.from_numpy(tokens.token_ids)[None]).logits[0, :-1, 0]
        expected.append(states[torch.from_numpy(tokens.loss_mask)[1:]])
    assert torch.allclose(values, torch.cat(expected), atol=CLOSE)


def test_a_checkpoint_is_the_adapter_alone_and_training_goes_on_with_the_same_bits(
    one_rank, tiny_model_path: Path, tmp_path: Path
) -> None:
    backend = trained_backend(tiny_model_path)
    backend.save(tmp_path / "saved")()
    merged = dict(backend.named_weights())
    expected = [step(backend) for _ in range(3)]
    size = sum(each.stat().st_size for each in (tmp_path / "saved").iterdir())
    plain = trained_backend(tiny_model_path, lora_rank=0)
    plain.save(tmp_path / "plain")()
    assert size < 0.25 * sum(each.stat().st_size for each in (tmp_path / "plain").iterdir())

    resumed = backend_of(tiny_model_path)
    resumed.load(tmp_path / "saved")
    assert [step(resumed) for _ in range(3)] == expected
    read = dict(FSDPBackend.saved_weights(backend._spec, tmp_path / "saved"))
    assert read.keys() == merged.keys()
    assert all(torch.equal(read[name], merged[name]) for name in merged)
    with pytest.raises(CheckpointError, match="another model"):
        backend_of(tiny_model_path, lora_rank=2).load(tmp_path / "saved")


def test_layers_are_chosen_by_name_and_a_name_that_fits_none_is_told(one_rank, tiny_model_path: Path) -> None:
    def layers(**model: Any) -> set[str]:
        names = (name for name, _ in backend_of(tiny_model_path, **model)._model.named_parameters())
        return {name.split(".lora_A")[0] for name in names if ".lora_A" in name}

    assert layers(target_modules=("q_proj",)) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert layers(target_modules=(r"model\.layers\.1\.mlp\..*",), exclude_modules=("down_proj",)) == {
        f"model.layers.1.mlp.{each}_proj" for each in ("gate", "up")
    }
    with pytest.raises(ConfigError, match=r"no linear layer is named qkv .*its layers are .*q_proj"):
        backend_of(tiny_model_path, target_modules=("qkv",))


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_plan_counts_what_is_trained(one_rank, tiny_model_path: Path, role: Role) -> None:
    facts = read_model_facts(str(tiny_model_path))
    assert facts is not None
    for targets in (("all-linear",), ("q_proj", "down_proj"), (r"model\.layers\.1\..*",)):
        backend = backend_of(tiny_model_path, role, target_modules=targets)
        count = backend.parameter_count(trained=True)
        head = 0 if role == "actor" else 1  # a critic's head has a bias
        assert count == trained_parameters(facts, backend._spec.model, language=role == "actor") + head


def test_an_adapter_that_does_not_fit_is_told(one_rank, tiny_model_path: Path, adapter_path: Path) -> None:
    for settings, message in (
        ({"lora_rank": 8}, "has lora_rank: 4"),
        ({"lora_alpha": 16}, "lora_alpha: 8"),
        ({"target_modules": ("q_proj",)}, "does not fit the model"),
    ):
        with pytest.raises(ConfigError, match=message):
            backend_of(tiny_model_path, lora_adapter_path=str(adapter_path), **settings)
    with pytest.raises(ConfigError, match="cannot be read"):
        backend_of(tiny_model_path, lora_adapter_path=str(tiny_model_path))
