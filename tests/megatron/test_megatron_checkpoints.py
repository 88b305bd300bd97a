"""Weights from and to checkpoints of transformers, and checkpoints that another layout goes on from."""

import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from iiverl_core.training.safetensors_files import write_safetensors

sys.path.insert(0, str(Path(__file__).parent))
from layouts import FAMILIES, batches, in_layout, layout, loss_of, make_model, model_spec

from ranks import Ranks

pytestmark = [pytest.mark.megatron, pytest.mark.slow]


def through(path: Path, folder: Path, dense: bool) -> list[str]:
    """Read a model and write it in every layout; the names of the layouts."""
    names = []
    for tensor, pipeline, experts in itertools.product((1, 2), (1, 2), (1,) if dense else (1, 2)):
        backend = in_layout(model_spec(path, layout(tensor, pipeline, experts, sequence=True)))
        names.append(f"{tensor}-{pipeline}-{experts}")
        write_safetensors(
            backend.named_weights(), folder / names[-1], write=dist.get_rank() == 0, shard_bytes=100_000
        )
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_written(four_ranks: Ranks, family: str, tmp_path: Path) -> None:
    path = make_model(tmp_path, family)
    original = load_file(path / "model.safetensors")
    for name in four_ranks.run(through, path, tmp_path / "out", family != "qwen3_moe")[0]:
        files = sorted((tmp_path / "out" / name).glob("*.safetensors"))
        assert len(files) > 1
        found = {key: tensor for file in files for key, tensor in load_file(file).items()}
        assert found.keys() == original.keys()
        for key, tensor in original.items():
            assert torch.equal(found[key], tensor), f"{key} in {name}"


def written(path: Path, folder: Path) -> None:
    backend = in_layout(model_spec(path, layout(2, 2, sequence=True)))
    write_safetensors(backend.named_weights(), folder, write=dist.get_rank() == 0, shard_bytes=100_000)


def test_transformers_reads_what_is_written(four_ranks: Ranks, tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen3_moe")
    four_ranks.run(written, path, tmp_path / "out")
    shutil.copy(path / "config.json", tmp_path / "out")
    ids = torch.arange(12)[None]
    logits = [AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (path, tmp_path / "out")]
    assert torch.equal(*logits)


def after_a_step(backend: Any, role: Any) -> list[float]:
    """Make one more step; the loss before it, on each process that has it, and the gradient's norm."""
    micro = batches(backend.place.data_rank, backend.place.data_size)
    metrics = backend.forward_backward(micro, loss_of(role), entropy=True)
    return [*metrics.values(), backend.step(1e-2).grad_norm]


def saves(path: Path, folder: Path, role: Any, parallel: Any) -> list[float]:
    """Train, save, and train on: the loss and norm of the step after saving."""
    backend = in_layout(model_spec(path, parallel, role))
    for _ in range(2):
        after_a_step(backend, role)
    backend.save(folder)
    return totals(after_a_step(backend, role), backend)


def resumes(path: Path, folder: Path, role: Any, parallel: Any) -> tuple[list[float], list[float]]:
    """The same step of a model that starts from what was saved, and of one that does not."""
    backend = in_layout(model_spec(path, parallel, role))
    fresh = totals(after_a_step(backend, role), backend)
    backend.load(folder)
    after = totals(after_a_step(backend, role), backend)
    return after, fresh


def totals(numbers: list[float], backend: Any) -> list[float]:
    """Metrics summed over the processes that report; the norm, which all know, comes last."""
    reports = backend.place.reports
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, numbers if reports else None)
    parts = [each for each in everyone if each is not None]
    return [sum(column) for column in zip(*(part[:-1] for part in parts), strict=True)] + [numbers[-1]]


LAYOUTS = {
    "the same": (layout(2, 1), layout(2, 1)),
    "tensor to pipeline": (layout(2, 1, sequence=True), layout(1, 2)),
    "pipeline to virtual pipeline": (layout(2, 2), layout(1, 2, chunks=2)),
}
CASES = {
    **{f"actor, {name}": ("qwen2", "CausalLM", "actor", *pair) for name, pair in LAYOUTS.items()},
    "critic, tensor to pipeline": (
        "qwen3",
        "TokenClassification",
        "critic",
        *LAYOUTS["tensor to pipeline"],
    ),
    "experts": ("qwen3_moe", "CausalLM", "actor", layout(2, 1, 2, sequence=True), layout(1, 2, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_another_layout_goes_on_where_one_stopped(four_ranks: Ranks, case: str, tmp_path: Path) -> None:
    family, head, role, before, after = CASES[case]
    path = make_model(tmp_path, family, head)
    expected = four_ranks.run(saves, path, tmp_path / "saved", role, before)[0]
    found, fresh = four_ranks.run(resumes, path, tmp_path / "saved", role, after)[0]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert fresh != pytest.approx(expected, rel=1e-3)
