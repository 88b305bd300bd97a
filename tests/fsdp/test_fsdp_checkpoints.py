"""Training goes on from a checkpoint as if it had not stopped, on however many processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from iiverl_core.config import FSDPConfig, ModelConfig, Offload, OptimConfig
from iiverl_core.errors import CheckpointError
from iiverl_core.samples import TokenSequence
from iiverl_core.training import MicroBatch, ModelSpec, Outputs, Role
from iiverl_core.training.batching import make_micro_batch
from iiverl_fsdp.backend import FSDPBackend
from ranks import Ranks

CPU = torch.device("cpu")
PRECISION: dict[str, Any] = {"mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32"}}
SAMPLES = 4
TOLERANCE = 1e-6


def spec_of(path: Path, role: Role = "actor", *, offload: bool = False, trained: bool = True) -> ModelSpec:
    return ModelSpec(
        role=role,
        model=ModelConfig(path=str(path), use_remove_padding=False),
        parallel=FSDPConfig(**PRECISION),
        device=CPU,
        optim=OptimConfig() if trained else None,
        grad_clip=1.0,
        offload=Offload(parameters=offload, optimizer=offload),
    )


def backend_of(path: Path, role: Role = "actor", **options: bool) -> FSDPBackend:
    return FSDPBackend(spec_of(path, role, **options))


def batches() -> list[MicroBatch]:
    """This process's samples, each a micro-batch."""
    rng = np.random.default_rng(0)
    samples = [
        (
            TokenSequence.single_turn(rng.integers(0, 256, p), rng.integers(0, 256, r), np.zeros(r)),
            rng.normal(size=r),
        )
        for p, r in rng.integers(3, 12, (SAMPLES, 2))
    ]
    return [
        make_micro_batch([tokens], {"targets": [targets]}, [1 / SAMPLES], device=CPU)
        for tokens, targets in samples[dist.get_rank() :: dist.get_world_size()]
    ]


def loss(outputs: Outputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    targets_T = batch.arrays_T["targets"]
    if outputs.values_T is not None:
        total = (batch.weights_T * (outputs.values_T - targets_T).square()).sum()
    else:
        assert outputs.log_probs_T is not None
        total = -(batch.weights_T * targets_T * outputs.log_probs_T).sum()
    return total, {"loss": total.detach()}


def step(backend: FSDPBackend) -> tuple[float, float]:
    """The whole batch's loss before a step, and its gradient's norm."""
    total = torch.tensor(backend.forward_backward(batches(), loss)["loss"])
    dist.all_reduce(total)
    return total.item(), backend.step(1e-2).grad_norm


def saved(path: Path, role: Role, folder: Path) -> dict[str, Tensor]:
    """Save after a step; the weights by name."""
    backend = backend_of(path, role)
    step(backend)
    backend.save(folder)()
    return {name: value.clone() for name, value in backend.named_weights()}


def interrupted(path: Path, role: Role, offload: bool, folder: Path) -> list[float]:
    """Save after two steps; the third and the fourth, of which the one shows the weights, the other the optimizer."""
    backend = backend_of(path, role, offload=offload)
    for _ in range(2):
        step(backend)
    backend.forward(batches())  # leaves some parameters whole
    wait = backend.save(folder)
    after = [
        *step(backend),
        *step(backend),
    ]  # while the files are being written: they hold what was when it was saved
    wait()
    return after


def resumed(path: Path, role: Role, offload: bool, folder: Path) -> tuple[list[float], list[float]]:
    """Two steps before loading, and two after."""
    backend = backend_of(path, role, offload=offload)
    before = [*step(backend), *step(backend)]
    backend.load(folder)
    return before, [*step(backend), *step(backend)]


@pytest.fixture(scope="module")
def paths(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Role, Path]:
    """A model for each role; the critic's head is not zero, so that all of it learns from the first step on."""
    model = AutoModelForTokenClassification.from_pretrained(tiny_model_path, num_labels=1)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("critic")
    model.save_pretrained(path)
    return {"actor": tiny_model_path, "critic": path}


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True], ids=["device", "offload"])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_training_goes_on_where_it_stopped(
    one_rank, ranks: Callable[..., Ranks], paths: dict[Role, Path], role: Role, offload: bool, tmp_path: Path
) -> None:
    path, two_ranks = paths[role], ranks(2)
    expected = two_ranks.run(interrupted, path, role, offload, tmp_path / "two")[0]
    for before, after in (
        resumed(path, role, not offload, tmp_path / "two"),
        two_ranks.run(resumed, path, role, offload, tmp_path / "two")[0],
    ):
        assert after == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
        assert before != pytest.approx(expected, rel=1e-2)
    alone = interrupted(path, role, offload, tmp_path / "one")
    _, after = two_ranks.run(resumed, path, role, offload, tmp_path / "one")[1]
    assert after == pytest.approx(alone, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_the_weights_of_two_processes_are_read_without_a_group(
    ranks: Callable[..., Ranks], paths: dict[Role, Path], role: Role, tmp_path: Path
) -> None:
    expected = ranks(2).run(saved, paths[role], role, tmp_path / "two")[0]
    found = dict(FSDPBackend.saved_weights(spec_of(paths[role], role), tmp_path / "two"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_model_that_has_made_no_step_is_saved_as_it_is(
    one_rank, tiny_model_path: Path, tmp_path: Path
) -> None:
    backend, other = backend_of(tiny_model_path), backend_of(tiny_model_path)
    backend.save(tmp_path)()
    expected = [step(backend) for _ in range(2)]
    for _ in range(2):  # the second time, it has states to forget
        other.load(tmp_path)
        assert [step(other) for _ in range(2)] == expected


def test_states_of_the_optimizer_are_there_before_the_first_step_and_change_nothing(
    one_rank, tiny_model_path: Path
) -> None:
    """Against AdamW as torch makes it, which allocates them in the first step."""
    backend = backend_of(tiny_model_path)
    sizes = [
        (parameter.numel(), [value.numel() for value in backend._optimizer.state[parameter].values()])
        for parameter in backend._model.parameters()
    ]
    assert all(states == [1, size, size] for size, states in sizes)
    lazy = backend_of(tiny_model_path)
    lazy._optimizer.state.clear()
    assert [step(lazy) for _ in range(3)] == [step(backend) for _ in range(3)]


def test_a_model_without_an_optimizer_has_its_weights_alone(
    one_rank, tiny_model_path: Path, tmp_path: Path
) -> None:
    actor, reference = backend_of(tiny_model_path), backend_of(tiny_model_path, "reference", trained=False)
    step(actor)
    actor.save(tmp_path / "actor")()
    reference.load(tmp_path / "actor")
    given = dict(actor.named_weights())
    assert all(torch.equal(value, given[name]) for name, value in reference.named_weights())
    reference.save(tmp_path / "reference")()
    with pytest.raises(CheckpointError, match=r"reference holds no optimizer: it is of a model"):
        actor.load(tmp_path / "reference")


def test_tied_weights_are_saved_once_and_stay_tied(one_rank, tiny_model_path: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    backend = backend_of(tmp_path / "tied")
    step(backend)
    backend.save(tmp_path / "saved")()
    names = FileSystemReader(tmp_path / "saved").read_metadata().state_dict_metadata
    assert "model.model.embed_tokens.weight" in names
    assert "model.lm_head.weight" not in names
    other = backend_of(tmp_path / "tied")
    other.load(tmp_path / "saved")
    assert step(other) == step(backend)


def test_a_folder_without_a_checkpoint_is_told(one_rank, tiny_model_path: Path, tmp_path: Path) -> None:
    backend = backend_of(tiny_model_path)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/none holds no checkpoint of a model"):
        backend.load(tmp_path / "none")
    backend.save(tmp_path / "broken")()
    for file in (tmp_path / "broken").glob("*.distcp"):
        file.unlink()
    with pytest.raises(CheckpointError, match=rf"the checkpoint in {tmp_path}/broken is not whole: .*distcp"):
        backend.load(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=rf"model\.\S+ in {tmp_path}/broken cannot be read: .*distcp"):
        dict(FSDPBackend.saved_weights(spec_of(tiny_model_path), tmp_path / "broken"))
    (tmp_path / "broken" / ".metadata").write_bytes(b"")
    with pytest.raises(CheckpointError, match="broken holds no checkpoint of a model"):
        backend.load(tmp_path / "broken")


def test_a_folder_that_cannot_be_written_is_told(one_rank, tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=rf"cannot write a checkpoint to {tmp_path}/file/folder: "):
        backend_of(tiny_model_path).save(tmp_path / "file" / "folder")()


def test_another_models_checkpoint_is_told_and_not_taken(
    one_rank, tiny_model_path: Path, tmp_path: Path
) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_model_path).config
    config.update({"vocab_size": 300})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "smaller")
    backend_of(tmp_path / "smaller").save(tmp_path / "saved")()
    backend = backend_of(tiny_model_path)
    before = {name: value.clone() for name, value in backend.named_weights()}
    told = (
        rf"{tmp_path}/saved holds a checkpoint of another model: lm_head\.weight has shape \(300, 64\) there"
    )
    with pytest.raises(CheckpointError, match=told):
        backend.load(tmp_path / "saved")
    assert all(torch.equal(value, before[name]) for name, value in backend.named_weights())
    critic = backend_of(tiny_model_path, "critic")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(300, 64\) there and is not here"):
        critic.load(tmp_path / "saved")
