"""Checkpoints of verl and II-VERL: recognised by their files, with instructions to start from their weights."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from iiverl_core.config import ROLE_KEYS

MODEL_PATH = f"{ROLE_KEYS['actor'].model}.path"
MERGER = "python -m verl.model_merger merge"
"""verl's tool that merges shards into full weights; it requires an installation of verl."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A `global_step_N` folder of verl or II-VERL.

    `weights` is a folder of Hugging Face weights of the actor that a run can start from; None if there are
    only shards. `shards` is their format, and `actor` is the folder to merge.
    """

    folder: Path
    actor: Path
    shards: Literal["fsdp", "megatron"] | None
    weights: Path | None

    def explain(self) -> str:
        """Explain what this is, and how to start from its weights."""
        known = f"{self.folder} is a checkpoint of verl: its optimizer and its place in the data cannot be resumed."
        if self.weights is not None:
            return f"{known}\nStart from its weights: {MODEL_PATH}={shlex.quote(str(self.weights))}"
        merged = self.actor / "merged"
        return (
            f"{known}\nTo start from its weights, merge them where verl is installed:\n"
            f"  {MERGER} --backend {self.shards} --local_dir {shlex.quote(str(self.actor))} "
            f"--target_dir {shlex.quote(str(merged))}\n"
            f"and set {MODEL_PATH}={shlex.quote(str(merged))}"
        )


def recognise(folder: Path) -> ForeignCheckpoint | None:
    """Recognise a checkpoint of verl or II-VERL; return None if the folder is not one.

    Their FSDP backend writes `actor/model_world_size_*_rank_*.pt`, their Megatron backend `actor/dist_ckpt` (later
    `actor/model/dist_ckpt`). `huggingface` beside them has only the tokenizer, unless `hf_model` was saved too.
    """
    actor = next((path for path in (folder / "actor", folder) if path.is_dir()), None)
    if actor is None:
        return None
    shards: Literal["fsdp", "megatron"] | None = None
    if any(actor.glob("model_world_size_*_rank_*.pt")):
        shards = "fsdp"
    elif any((actor / name).is_dir() for name in ("dist_ckpt", "model/dist_ckpt")):
        shards = "megatron"
    weights = next((path for path in _weight_folders(folder, actor) if _holds_weights(path)), None)
    if shards is None and weights is None:
        return None
    return ForeignCheckpoint(folder, actor, shards, weights)


def _weight_folders(folder: Path, actor: Path) -> Iterator[Path]:
    yield from (actor / "huggingface", actor / "model" / "huggingface", folder / "actor_huggingface")
    yield actor / "merged"


def _holds_weights(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))
