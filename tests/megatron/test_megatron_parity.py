"""Megatron computes what FSDP computes: outputs, losses, gradients and steps, in every layout."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import (
    CPU,
    batches,
    by_sample,
    gradients,
    in_layout,
    layout,
    loss_of,
    make_model,
    model_spec,
)

from iiverl_core.config import FSDPConfig, Offload
from iiverl_core.training import Role
from iiverl_core.training.layout import lay_out
from iiverl_core.training.metrics import merge
from iiverl_fsdp.backend import FSDPBackend
from ranks import Ranks

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

FP32 = FSDPConfig(mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"})
STEPS = 3
DENSE = {
    "data parallel": (layout(), {}),
    "tensor, offloaded": (layout(tensor=2), {}),
    "tensor and sequence, packed": (layout(tensor=2, sequence=True), {"use_remove_padding": True}),
    "pipeline, two layers recomputed together": (
        layout(pipeline=2, recompute_num_layers=2),
        {"use_remove_padding": True, "enable_gradient_checkpointing": True},
    ),
    "tensor and pipeline": (layout(tensor=2, pipeline=2, sequence=True), {}),
    "context": (layout(context=2), {"use_remove_padding": True}),
    "context and tensor": (layout(tensor=2, context=2, sequence=True), {}),
    "virtual pipeline": (layout(pipeline=2, chunks=2), {"enable_gradient_checkpointing": True}),
    "more processes than heads of keys, three of four layers recomputed": (
        layout(tensor=4, recompute_method="block", recompute_num_layers=3),
        {"use_remove_padding": True, "enable_gradient_checkpointing": True},
    ),
}
EXPERTS = {
    "experts, offloaded": (layout(experts=2), {}),
    "experts over tensor-parallel processes": (layout(tensor=2, experts=2, sequence=True), {}),
    "experts in a pipeline": (layout(pipeline=2, experts=2), {"use_remove_padding": True}),
}
# What another family or head has of its own meets these divisions; the rest is the actor's.
NORMS = (
    "tensor and sequence, packed",
    "tensor and pipeline",
    "context and tensor",
    "more processes than heads of keys, three of four layers recomputed",
)
VALUES = ("tensor and sequence, packed", "tensor and pipeline", "context", "virtual pipeline")
CASES: dict[str, tuple[str, str, Role, dict[str, tuple[Any, dict[str, Any]]]]] = {
    "actor": ("qwen2", "CausalLM", "actor", DENSE),
    "actor with norms of queries and keys": (
        *("qwen3", "CausalLM", "actor"),
        {name: DENSE[name] for name in NORMS},
    ),
    "critic": ("qwen2", "TokenClassification", "critic", {name: DENSE[name] for name in VALUES}),
    "reward model": ("llama", "SequenceClassification", "reward", DENSE),
    "mixture of experts": ("qwen3_moe", "CausalLM", "actor", EXPERTS),
}


def learn(backend: Any, role: Role, micro: list[Any]) -> dict[str, Any]:
    """What a model says before a step, the loss's metrics, the gradient, and the weights after some steps."""
    found: dict[str, Any] = {"outputs": by_sample(backend.forward(micro, entropy=True), micro)}
    if role == "reward":
        return found
    found["size"] = backend.parameter_count()
    found["start"] = {name: tensor.clone() for name, tensor in backend.named_weights()}
    found["metrics"] = backend.forward_backward(micro, loss_of(role), entropy=True)
    found["gradient"] = gradients(backend)  # and clears it
    found["norms"] = []
    for _ in range(STEPS):
        backend.forward_backward(micro, loss_of(role), entropy=True)
        found["norms"].append(backend.step(1e-3).grad_norm)
    found["end"] = {name: tensor.clone() for name, tensor in backend.named_weights()}
    return found


def under_megatron(path: Path, role: Role, cases: dict[str, tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    torch.set_num_threads(1)
    results = {}
    for name, (parallel, options) in cases.items():
        spec = model_spec(path, parallel, role, **options)
        if "offloaded" in name:
            spec = dataclasses.replace(spec, offload=Offload(True, True, True))
        backend = in_layout(spec)
        micro = batches(backend.parallel_rank.data_rank, backend.parallel_rank.data_size, 3)
        found = learn(backend, role, micro)
        first = dist.get_rank() == 0
        kept = found if first else {key: found[key] for key in ("outputs", "metrics") if key in found}
        results[name] = {**kept, "place": backend.parallel_rank}
    return results


def under_fsdp(path: Path, role: Role) -> dict[str, Any]:
    backend = FSDPBackend(model_spec(path, FP32, role))

    return learn(backend, role, batches(0, 1, 3))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_in_every_layout(one_rank, four_ranks: Ranks, case: str, tmp_path: Path) -> None:
    family, head, role, cases = CASES[case]
    path = make_model(tmp_path, family, head)
    expected = under_fsdp(path, role)
    assert role == "reward" or max(g.abs().max() for g in expected["gradient"].values()) > 1e-2
    for name, found in joined(four_ranks.run(under_megatron, path, role, cases)).items():
        print(name)
        outputs = {key: torch.cat([x.flatten() for x in row]) for key, row in found["outputs"].items()}
        rows = {key: torch.cat([x.flatten() for x in row]) for key, row in expected["outputs"].items()}
        assert_same(outputs, rows, 1e-5)
        if role == "reward":
            continue
        assert found["metrics"].keys() == expected["metrics"].keys()
        for metric, value in expected["metrics"].items():
            assert found["metrics"][metric] == pytest.approx(value, rel=1e-4, abs=1e-6), metric
        assert found["size"] == expected["size"] == sum(t.numel() for t in expected["start"].values())
        assert_same(found["start"], expected["start"], 0.0)
        assert_same(found["gradient"], expected["gradient"], 1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        assert_same(found["end"], expected["end"], 1e-4)
        moved = max((found["end"][n] - found["start"][n]).abs().max() for n in found["end"])
        assert moved > 2e-3


SHARED = {
    "tensor and sequence": ("qwen2", layout(tensor=2, sequence=True), {}),
    "tensor and pipeline": ("qwen3", layout(tensor=2, pipeline=2, sequence=True), {}),
    "virtual pipeline": ("llama", layout(pipeline=2, chunks=2), {"enable_gradient_checkpointing": True}),
    "experts": ("qwen3_moe", layout(experts=2), {}),
}


def with_and_without_sharing(paths: dict[str, Path]) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    results = {}
    for name, (family, parallel, options) in SHARED.items():
        backend = in_layout(model_spec(paths[family], parallel, **options))
        assert backend.layout == "shared"
        place = backend.parallel_rank
        both = []
        for grouped in (False, True):
            micro = batches(place.data_rank, place.data_size, 5, alike=True, grouped=grouped)
            outputs = by_sample(backend.forward(micro, entropy=True), micro)
            metrics = backend.forward_backward(micro, loss_of("actor"), entropy=True)
            both.append({"outputs": outputs, "metrics": metrics, "gradient": gradients(backend)})
        columns = [
            sum(lay_out(each.sequences, "shared", CPU, each.groups).input_ids_BL.numel() for each in micro)
            for micro in (
                batches(place.data_rank, place.data_size, 5, alike=True, grouped=grouped)
                for grouped in (False, True)
            )
        ]
        results[name] = {"alone": both[0], "shared": both[1], "columns": columns}
    return results


def test_prompts_can_be_shared_in_every_layout(four_ranks: Ranks, tmp_path: Path) -> None:
    paths = {family: make_model(tmp_path, family) for family, _, _ in SHARED.values()}
    results = four_ranks.run(with_and_without_sharing, paths)
    for name in SHARED:
        print(name)
        alone, shared = (sum(found[name]["columns"][i] for found in results) for i in range(2))
        assert shared < alone
        for found in results:
            alone, shared = found[name]["alone"], found[name]["shared"]
            assert shared["outputs"].keys() == alone["outputs"].keys()
            for key, row in alone["outputs"].items():
                for x, y in zip(shared["outputs"][key], row, strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
            assert shared["metrics"] == pytest.approx(alone["metrics"], rel=1e-5, abs=1e-6)
            assert_same(shared["gradient"], alone["gradient"], 1e-6)


def joined(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What all processes found, of each case: outputs of those that report, sums of their metrics."""
    together = {}
    for case in results[0]:
        reporting = [r[case] for r in results if r[case]["place"].is_output_rank]
        ranks = [r["place"].data_rank for r in reporting]
        assert sorted(ranks) == list(range(reporting[0]["place"].data_size))
        outputs = {key: row for r in reporting for key, row in r["outputs"].items()}
        metrics: dict[str, float] = {}
        for r in reporting:
            merge(metrics, r.get("metrics", {}))
        together[case] = {**results[0][case], "outputs": outputs, "metrics": metrics}
    return together
