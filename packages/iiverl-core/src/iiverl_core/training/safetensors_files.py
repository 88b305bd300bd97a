"""A model on disk as transformers reads it: safetensors of bounded size, written a tensor at a time."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def write_safetensors(
    weights: Iterable[tuple[str, Tensor]], folder: Path, *, write: bool, shard_bytes: int = 4 * 2**30
) -> None:
    """Write named weights into files of about `shard_bytes`, and what says which is where.

    `weights` are those of `TrainingBackend.named_weights`, which all processes go through together; one of them writes.
    No more than one file's weights are in memory. What lies in the folder already stays, but for a model's weights.
    """
    files: dict[Path, list[str]] = {}
    waiting: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        nonlocal held
        if waiting:
            file = folder / f"writing-{len(files):05d}.safetensors"
            save_file(waiting, file, metadata={"format": "pt"})
            files[file] = list(waiting)
            waiting.clear()
            held = 0

    if write:
        folder.mkdir(parents=True, exist_ok=True)
    for name, value in weights:
        if write:
            waiting[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value)
            held += value.nbytes
            total += value.nbytes
            if held >= shard_bytes:
                flush()
    if not write:
        return
    flush()
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        old.unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for i, (file, names) in enumerate(files.items(), 1):
        final = "model" + (f"-{i:05d}-of-{len(files):05d}" if len(files) > 1 else "") + ".safetensors"
        file.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
