"""Weights from and to checkpoints of transformers, and checkpoints that another layout goes on from."""

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import batches, in_layout, layout, loss_of, make_model, model_spec
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from iiverl_core.errors import CheckpointError
from iiverl_core.training.model_folder import write_safetensors
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


# `test_megatron_parity.py` compares what backends read of the others.
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
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
    write_safetensors(backend.named_weights(), folder, write=dist.get_rank() == 0, shard_bytes=100_000)()


def test_transformers_reads_what_is_written(four_ranks: Ranks, tmp_path: Path) -> None:
    path = make_model(tmp_path, "qwen3_moe")
    four_ranks.run(written, path, tmp_path / "out")
    shutil.copy(path / "config.json", tmp_path / "out")
    ids = torch.arange(12)[None]
    logits = [AutoModelForCausalLM.from_pretrained(p)(ids).logits for p in (path, tmp_path / "out")]
    assert torch.equal(*logits)


def after_steps(backend: Any, role: Any, steps: int = 3) -> list[float]:
    """Make more steps; metrics before each, summed over the processes that report, and the gradient's norm."""
    micro = batches(backend.parallel_rank.data_rank, backend.parallel_rank.data_size, 3)
    found = []
    for _ in range(steps):
        metrics = backend.forward_backward(micro, loss_of(role), entropy=True)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(
            everyone, list(metrics.values()) if backend.parallel_rank.is_output_rank else None
        )
        parts = [each for each in everyone if each is not None]
        found += [*map(sum, zip(*parts, strict=True)), backend.step(1e-2).grad_norm]
    return found


def saves(path: Path, folder: Path, role: Any, parallel: Any) -> list[float]:
    """Train, save, and train on: what the steps after saving tell."""
    backend = in_layout(model_spec(path, parallel, role))
    after_steps(backend, role, 2)
    wait = backend.save(folder)
    after = after_steps(
        backend, role
    )  # while the files are being written: they hold what was when it was saved
    wait()
    return after


def saves_weights(path: Path, folder: Path, role: Any, parallel: Any) -> dict[str, torch.Tensor]:
    """Save after a step; the weights by name."""
    backend = in_layout(model_spec(path, parallel, role))
    after_steps(backend, role, 1)
    backend.save(folder)()
    return {name: value.clone() for name, value in backend.named_weights()}


def resumes(path: Path, folder: Path, role: Any, parallel: Any) -> tuple[list[float], list[float]]:
    """The same steps of a model that starts from what was saved, and of one that does not."""
    fresh = after_steps(in_layout(model_spec(path, parallel, role)), role)
    backend = in_layout(model_spec(path, parallel, role))
    backend.load(folder)
    return after_steps(backend, role), fresh


CASES = {
    "actor, the same": ("qwen2", "CausalLM", "actor", layout(2, 1), layout(2, 1)),
    "actor, tensor to pipeline": (
        *("qwen2", "CausalLM", "actor"),
        *(layout(2, 1, sequence=True), layout(1, 2)),
    ),
    "actor, pipeline to virtual pipeline": (
        *("qwen2", "CausalLM", "actor"),
        *(layout(2, 2), layout(1, 2, chunks=2)),
    ),
    "critic, tensor to pipeline": (
        *("qwen3", "TokenClassification", "critic"),
        *(layout(2, 1, sequence=True), layout(1, 2)),
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


@pytest.mark.parametrize(
    ("family", "head", "role", "parallel"),
    [
        ("qwen2", "CausalLM", "actor", layout(2, 2, sequence=True)),  # tied, with biases
        ("qwen3", "TokenClassification", "critic", layout(2, 1)),
        ("qwen3_moe", "CausalLM", "actor", layout(2, 2, 2, sequence=True)),
    ],
)
def test_the_weights_of_any_layout_are_read_in_one_process(
    one_rank, four_ranks: Ranks, family: str, head: str, role: Any, parallel: Any, tmp_path: Path
) -> None:
    from iiverl_megatron.backend import MegatronBackend

    path = make_model(tmp_path, family, head)
    expected = four_ranks.run(saves_weights, path, tmp_path / "saved", role, parallel)[0]
    found = dict(MegatronBackend.saved_weights(model_spec(path, parallel, role), tmp_path / "saved"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(CheckpointError, match="none holds no checkpoint of a model"):
        dict(MegatronBackend.saved_weights(model_spec(path, parallel, role), tmp_path / "none"))


def test_what_has_made_no_step_is_saved_too(one_rank, tmp_path: Path) -> None:
    """As an actor is while its critic warms up; it is read back by one that has gone on."""
    backend = in_layout(model_spec(make_model(tmp_path, "qwen2"), layout()))
    backend.save(tmp_path / "saved")()
    expected = after_steps(backend, "actor")
    backend.load(tmp_path / "saved")
    assert after_steps(backend, "actor") == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_names_in_a_checkpoint_are_those_that_transformer_engine_has(one_rank, tmp_path: Path) -> None:
    """It has the norm before attention within the next layer, that before experts by itself, and states of its own."""
    from megatron.core import dist_checkpointing

    in_layout(model_spec(make_model(tmp_path, "qwen3_moe"), layout())).save(tmp_path / "saved")()
    saved = dist_checkpointing.load_tensors_metadata(str(tmp_path / "saved"))
    names = {re.sub(r"^decoder\.layers\.(\d+\.)?", "", name) for name in saved}
    assert {"self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight"} <= names
    assert not any("_extra_state" in name for name in names)


def test_states_of_modules_that_did_not_save_any_are_left_as_they_are(
    one_rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iiverl_megatron import layers

    class Stateful(layers.RMSNorm):
        def get_extra_state(self) -> torch.Tensor:
            return torch.ones(1)

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError("nobody has saved it")

    spec = model_spec(make_model(tmp_path, "qwen3"), layout())
    before = in_layout(spec)
    after_steps(before, "actor")
    before.save(tmp_path / "saved")()
    monkeypatch.setattr(layers, "RMSNorm", Stateful)
    after = in_layout(spec)
    after.load(tmp_path / "saved")
    expected = dict(before.named_weights())
    found = dict(after.named_weights())
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_random_states_of_another_kind_of_device_are_left(
    one_rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iiverl_megatron import checkpoint

    backend = in_layout(model_spec(make_model(tmp_path, "qwen2"), layout()))
    backend.save(tmp_path / "saved")()
    saved = torch.get_rng_state()
    torch.rand(1)
    moved = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_drawn_in", lambda chunks: ("cuda", 1, 1))
        backend.load(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), moved)
    backend.load(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), saved)


def test_a_folder_without_a_checkpoint_and_one_that_is_broken(one_rank, tmp_path: Path) -> None:
    backend = in_layout(model_spec(make_model(tmp_path, "qwen2"), layout()))
    (tmp_path / "empty").mkdir()
    backend.save(tmp_path / "broken")()
    for file in (tmp_path / "broken").glob("*.distcp"):
        file.write_bytes(b"")
    for folder in ("none", "empty", "broken"):
        with pytest.raises(CheckpointError, match=f"{folder} holds no checkpoint of this model"):
            backend.load(tmp_path / folder)
