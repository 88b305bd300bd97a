"""LoRA adapters under Megatron compute and learn what they do under FSDP, in every layout, and are saved by PEFT's names."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from layouts import batches, by_sample, gradients, in_layout, layout, loss_of, make_model, model_spec
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from iiverl_core.config import FSDPConfig, ModelConfig, Offload
from iiverl_core.config.model_facts import read_model_facts
from iiverl_core.errors import CheckpointError, ConfigError, WeightMismatchError
from iiverl_core.memory.layout import Layout, Stage
from iiverl_core.memory.states import held_trained
from iiverl_core.training import Role
from iiverl_core.training.adapter import write_adapter
from iiverl_fsdp.backend import FSDPBackend
from ranks import Ranks

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

FP32 = FSDPConfig(model_dtype="fp32", mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"})
ADAPTERS: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8}
STEPS = 3
LAYOUTS = {
    "one process's": (layout(), {}),
    "tensor": (layout(tensor=2), {}),
    "tensor and sequence, packed": (layout(tensor=2, sequence=True), {"use_remove_padding": True}),
    "tensor, pipeline, recomputed": (
        layout(tensor=2, pipeline=2, sequence=True),
        {"enable_gradient_checkpointing": True},
    ),
    "virtual pipeline": (layout(pipeline=2, chunks=2), {}),
    "context": (layout(context=2), {"use_remove_padding": True}),
    "more processes than heads of keys": (layout(tensor=4), {}),
}
EXPERTS = {
    "experts": (layout(experts=2), {}),
    "experts and tensor": (layout(tensor=2, experts=2, sequence=True), {}),
}
# Layers without an adapter, and a head of values, meet these divisions; the rest is the actor's.
SOME = (
    "tensor and sequence, packed",
    "tensor, pipeline, recomputed",
    "virtual pipeline",
    "more processes than heads of keys",
)
VALUES = ("tensor", "tensor, pipeline, recomputed", "virtual pipeline")
CASES: dict[str, tuple[str, str, Role, dict[str, tuple[Any, dict[str, Any]]], dict[str, Any]]] = {
    "actor": ("qwen2", "CausalLM", "actor", LAYOUTS, {}),
    "some layers": (
        "qwen3",
        "CausalLM",
        "actor",
        {name: LAYOUTS[name] for name in SOME},
        {"target_modules": (r"model\.layers\.[23]\.self_attn\.[qv]_proj", "up_proj"), "use_rslora": True},
    ),
    "last stage alone": (
        "llama",
        "CausalLM",
        "actor",
        {"pipeline": (layout(pipeline=2), {"enable_gradient_checkpointing": True})},
        {"target_modules": (r"model\.layers\.3\..*",)},
    ),
    "critic": (
        *("qwen2", "TokenClassification", "critic"),
        {name: LAYOUTS[name] for name in VALUES},
        {},
    ),
    "mixture of experts": ("qwen3_moe", "CausalLM", "actor", EXPERTS, {}),
}


def learn(backend: Any, role: Role, micro: list[Any]) -> dict[str, Any]:
    """Outputs of a model with adapters and without, the gradient of what is trained, and the weights after some steps."""
    found: dict[str, Any] = {
        "size": (backend.parameter_count(), backend.parameter_count(trained=True)),
        "optimized": sum(each.numel() for each in trained_here(backend)),
        "outputs": by_sample(backend.forward(micro, entropy=True), micro),
        "without": by_sample(backend.forward(micro, entropy=True, adapter=False), micro),
    }
    backend.forward_backward(micro, loss_of(role), entropy=True)
    found["gradient"] = gradients(backend)  # and clears it
    found["norms"] = []
    for _ in range(STEPS):
        backend.forward_backward(micro, loss_of(role), entropy=True)
        found["norms"].append(backend.step(1e-3).grad_norm)
    for kind in ("merged", "omitted", "only"):
        found[kind] = {name: tensor.clone() for name, tensor in backend.named_weights(adapters=kind)}
    found["end"] = by_sample(backend.forward(micro, entropy=True), micro)
    return found


def trained_here(backend: Any) -> list[Tensor]:
    """The parameters of this process that an optimizer updates."""
    models = [backend._model] if isinstance(backend, FSDPBackend) else backend._models
    return [each for model in models for each in model.parameters() if each.requires_grad]


def under_megatron(path: Path, role: Role, cases: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    results = {}
    for name, (parallel, options) in cases.items():
        backend = in_layout(model_spec(path, parallel, role, **model, **options))
        place = backend.parallel_rank
        found = learn(backend, role, batches(place.data_rank, place.data_size, 3))
        kept = found if dist.get_rank() == 0 else {}
        rows = {key: found[key] for key in ("outputs", "without", "end")} if place.is_output_rank else {}
        results[name] = {**kept, **rows, "optimized": found["optimized"], "reports": place.is_output_rank}
    return results


def write_start(path: Path, role: Role, model: dict[str, Any], folder: Path) -> None:
    """Write an adapter with an effect to start from."""
    backend = FSDPBackend(model_spec(path, FP32, role, **model))
    generator = torch.Generator().manual_seed(0)
    adapter = {
        name: 0.1 * torch.randn(each.shape, generator=generator)
        for name, each in backend.named_weights(adapters="only")
    }
    write_adapter(adapter, backend._spec.model, folder, task="CAUSAL_LM")


def planned(path: Path, role: Role, parallel: Any, model: dict[str, Any]) -> int:
    """What `iiverl plan` counts on the process that holds most."""
    facts, config = read_model_facts(str(path)), ModelConfig(path=str(path), **model)
    sizes = Layout(
        4,
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        chunks=parallel.virtual_pipeline_model_parallel_size or 1,
    )
    assert facts is not None
    stages: tuple[Stage, ...] = ("first", "last")
    counted = max(held_trained(facts, config, sizes, stage, language=role == "actor") for stage in stages)
    return counted + (1 if role == "critic" else 0)  # the bias of the head is not counted


def assert_same(found: dict[Any, Any], expected: dict[Any, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        pairs = (
            [(found[name], values)] if isinstance(values, Tensor) else zip(found[name], values, strict=True)
        )
        for x, y in pairs:
            torch.testing.assert_close(
                x, y, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_as_under_fsdp(one_rank, four_ranks: Ranks, case: str, tmp_path: Path) -> None:
    family, head, role, cases, targets = CASES[case]
    path = make_model(tmp_path, family, head)
    model = {**ADAPTERS, **targets}
    write_start(path, role, model, tmp_path / "start")
    model["lora_adapter_path"] = str(tmp_path / "start")
    expected = learn(FSDPBackend(model_spec(path, FP32, role, **model)), role, batches(0, 1, 3))
    assert min(g.abs().max() for g in expected["gradient"].values()) > 1e-4
    results = four_ranks.run(under_megatron, path, role, cases, model)
    for name, found in results[0].items():
        print(name)
        for rows in ("outputs", "without", "end"):
            gathered = {key: x for each in results for key, x in each[name].get(rows, {}).items()}
            assert_same(gathered, expected[rows], 1e-5 if rows != "end" else 1e-4)
        assert found["size"] == expected["size"]
        assert max(each[name]["optimized"] for each in results) == planned(path, role, cases[name][0], model)
        assert_same(found["gradient"], expected["gradient"], 1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for kind in ("merged", "omitted", "only"):
            assert_same(found[kind], expected[kind], 1e-4)


def steps(backend: Any, count: int = 3, role: Role = "actor") -> list[float]:
    """Make steps; the norm of each gradient."""
    micro = batches(backend.parallel_rank.data_rank, backend.parallel_rank.data_size)
    norms = []
    for _ in range(count):
        backend.forward_backward(micro, loss_of(role), entropy=True)
        norms.append(backend.step(1e-2).grad_norm)
    return norms


def saves(path: Path, folder: Path, parallel: Any) -> dict[str, Any]:
    """Train, save and go on."""
    backend = in_layout(model_spec(path, parallel, **ADAPTERS))
    steps(backend)
    wait = backend.save(folder)
    weights = {
        kind: {name: each.clone() for name, each in backend.named_weights(adapters=kind)}
        for kind in ("merged", "only")
    }
    micro = batches(0, 1)
    weights["outputs"] = by_sample(backend.forward(micro), micro)
    after = steps(backend)
    wait()
    return {**weights, "after": after}


def resumes(path: Path, folder: Path, parallels: list[Any]) -> list[list[float]]:
    """Go on from what was saved, in each layout."""
    found = []
    for parallel in parallels:
        backend = in_layout(model_spec(path, parallel, **ADAPTERS))
        backend.load(folder)
        found.append(steps(backend))
    return found


def test_a_checkpoint_is_the_adapter_alone_and_every_layout_goes_on_from_it(
    one_rank, four_ranks: Ranks, tmp_path: Path
) -> None:
    from iiverl_megatron.backend import MegatronBackend

    path, saved = make_model(tmp_path, "qwen2"), tmp_path / "saved"
    before = layout(tensor=2, pipeline=2, sequence=True)
    first, *_, last = four_ranks.run(saves, path, saved, before)
    expected = {**first, "outputs": last["outputs"]}  # of the last stage
    same, others = four_ranks.run(resumes, path, saved, [before, layout(pipeline=2, chunks=2)])[0]
    assert same == expected["after"]  # to the bit
    assert others == pytest.approx(expected["after"], rel=1e-5)
    spec = model_spec(path, before, **ADAPTERS)
    for kind in ("merged", "only"):
        found = dict(MegatronBackend.saved_weights(spec, saved, adapter=kind == "only"))
        assert found.keys() == expected[kind].keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected[kind].items())
    with pytest.raises(CheckpointError, match="holds no checkpoint of this model"):
        in_layout(model_spec(path, layout(), **{**ADAPTERS, "lora_rank": 2})).load(saved)

    # FSDP and PEFT read it.
    write_adapter(expected["only"], spec.model, tmp_path / "adapter", task="CAUSAL_LM")
    start = {**ADAPTERS, "lora_adapter_path": str(tmp_path / "adapter")}
    backend, micro = FSDPBackend(model_spec(path, FP32, **start)), batches(0, 1)
    assert_same(by_sample(backend.forward(micro), micro), expected["outputs"], 1e-5)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter")
    for batch in micro:
        for tokens in batch.sequences:
            ids = torch.from_numpy(np.asarray(tokens.token_ids))
            logits = peft(input_ids=ids[None]).logits[0, :-1] / batch.temperature
            trained = torch.from_numpy(tokens.loss_mask)[1:]
            chosen = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][trained]
            torch.testing.assert_close(
                chosen.detach(), expected["outputs"][tuple(ids.tolist())][0], rtol=1e-5, atol=1e-5
            )


LAYER = "model.layers.1.self_attn.k_proj"
SABOTAGE = {
    "nothing": (None, ""),
    "one zeroed": (lambda name, a, b, scale: (b * (name != LAYER), scale), LAYER),
    "one missed": (lambda name, a, b, scale: None if name == LAYER else (b, scale), LAYER),
    "scale forgotten": (lambda name, a, b, scale: (b, 1.0), "model.layers.0"),
    "merged twice": (lambda name, a, b, scale: (b, 2 * scale), "model.layers.0"),
    "exchanged": (
        lambda name, a, b, scale: (b.flip(0) if name == "model.layers.2.mlp.down_proj" else b, scale),
        "model.layers.2.mlp.down_proj",
    ),
}


def sabotaged(path: Path) -> dict[str, str]:
    """The error that each sabotage of merging ends in."""
    from iiverl_megatron import adapters

    backend = in_layout(model_spec(path, layout(tensor=2, sequence=True), **ADAPTERS))
    steps(backend, 1)
    found = {}
    for name, (change, _) in SABOTAGE.items():
        with pytest.MonkeyPatch.context() as patch:
            merge = adapters._merged

            def merged(
                layer: str, weight: Tensor, pairs: Any, scale: float, change=change, merge=merge
            ) -> Tensor:
                layer = layer.removesuffix(".weight")
                a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
                if b not in pairs:
                    return weight
                changed = change(layer, pairs[a], pairs[b], scale) if change else (pairs[b], scale)
                if changed is None:
                    del pairs[a], pairs[b]
                    return weight
                del pairs[b]
                return merge(f"{layer}.weight", weight, {a: pairs.pop(a), b: changed[0]}, changed[1])

            patch.setattr(adapters, "_merged", merged)
            try:
                dict(backend.named_weights())
                found[name] = ""
            except WeightMismatchError as error:
                found[name] = str(error)
            dist.barrier()
    return found


def test_a_merged_weight_is_compared_with_its_layer(four_ranks: Ranks, tmp_path: Path) -> None:
    for found in four_ranks.run(sabotaged, make_model(tmp_path, "qwen3")):
        for name, (_, layer) in SABOTAGE.items():
            if not layer:
                assert not found[name], name
            else:
                assert found[name].startswith(layer), (name, found[name])
                assert "into which an adapter was merged, does not compute" in found[name]


@pytest.mark.parametrize("model", [ADAPTERS, {}], ids=["adapters", "all weights"])
def test_parameters_in_fp32_beside_bf16_weights_learn_while_the_optimizer_is_offloaded(
    one_rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, Any]
) -> None:
    """A step moves the optimizer's state there and back, which copies it; on a CPU it would not."""
    path = make_model(tmp_path, "qwen2", "TokenClassification")
    parallel = layout().model_copy(update={"dtype": "bf16"})
    spec = model_spec(path, parallel, "critic", **model)
    backend = in_layout(dataclasses.replace(spec, offload=Offload(False, True, False)))
    if model:
        assert {each.dtype for each in trained_here(backend)} == {torch.float32}
    before = [each.detach().clone() for each in trained_here(backend)]
    to = Tensor.to

    def copied(self: Tensor, *given: Any, **options: Any) -> Tensor:
        moved = to(self, *given, **options)
        return moved.clone() if given and isinstance(given[0], torch.device) else moved

    monkeypatch.setattr(Tensor, "to", copied)
    steps(backend, 4, "critic")
    changed = [not torch.equal(x, y) for x, y in zip(before, trained_here(backend), strict=True)]
    assert all(changed)


def test_a_name_that_fits_no_layer_is_told(one_rank, tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen2")
    with pytest.raises(ConfigError, match=r"no linear layer is named linear_qkv .*its layers are .*q_proj"):
        in_layout(model_spec(path, layout(), **ADAPTERS, target_modules=("linear_qkv",)))
