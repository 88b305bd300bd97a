"""Checkpoints of verl are recognised, and the way to their weights is said."""

from pathlib import Path

import pytest

from iiverl_core.checkpoints import latest, recognise, verify
from iiverl_core.errors import CheckpointError


def lay(root: Path, *names: str) -> Path:
    folder = root / "global_step_40"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


SHARDS = ("actor/model_world_size_2_rank_0.pt", "actor/model_world_size_2_rank_1.pt", "data.pt")
TOKENIZER = ("actor/huggingface/config.json", "actor/huggingface/tokenizer.json")


@pytest.mark.parametrize(
    ("names", "shards", "weights"),
    [
        ((*SHARDS, *TOKENIZER), "fsdp", None),
        ((*SHARDS, *TOKENIZER, "actor/huggingface/model.safetensors"), "fsdp", "actor/huggingface"),
        (("actor/dist_ckpt/common.pt", *TOKENIZER), "megatron", None),
        (
            ("actor/model/dist_ckpt/x", "actor/model/huggingface/config.json",
             "actor/model/huggingface/model-00001-of-00002.safetensors"),
            "megatron", "actor/model/huggingface",
        ),
        ((*TOKENIZER, "actor/huggingface/pytorch_model.bin"), None, "actor/huggingface"),
    ],
)  # fmt: skip
def test_layouts_of_verl(tmp_path: Path, names: tuple[str, ...], shards: str, weights: str | None) -> None:
    folder = lay(tmp_path, *names)
    found = recognise(folder)
    assert found is not None
    assert found.shards == shards
    assert found.weights == (folder / weights if weights else None)
    text = found.explain()
    if weights:
        assert f"actor_rollout_ref.model.path={folder / weights}" in text
    else:
        command = (
            f"python -m verl.model_merger merge --backend {shards} --local_dir {folder}/actor --target_dir "
        )
        assert command in text


@pytest.mark.parametrize("names", [(), ("actor/.metadata", "actor/__0_0.distcp"), TOKENIZER])
def test_others_are_not_verl_s(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert recognise(lay(tmp_path, *names)) is None


def test_a_run_passes_them_over_and_says_why(tmp_path: Path) -> None:
    folder = lay(tmp_path, *SHARDS)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    found = latest(tmp_path)
    assert found.checkpoint is None
    ((where, reason),) = found.passed_over
    assert where == folder and "is a checkpoint of verl" in reason
    assert found.pointer_problem is not None and "names step 40" in found.pointer_problem
    with pytest.raises(CheckpointError, match=r"verl\.model_merger"):
        verify(folder)


def test_a_checkpoint_of_ours_without_its_manifest_is_not_taken_for_verl_s(tmp_path: Path) -> None:
    folder = lay(tmp_path, "train_state.json", *TOKENIZER, "actor/huggingface/model.safetensors")
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        verify(folder)
