"""Write a model in the format of transformers and vLLM: a folder of safetensors, configuration and tokenizer."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, AutoConfig, GenerationConfig

from iiverl_core.config import Role, RunConfig
from iiverl_core.data import load_tokenizer
from iiverl_core.dtypes import torch_dtype
from iiverl_core.errors import ConfigError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
"""Size of a file of weights."""


def write_safetensors(
    weights: Iterable[tuple[str, Tensor]], folder: Path, *, write: bool, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write named weights into files of about `shard_bytes`, with an index of them.

    `weights` are those of `TrainingBackend.named_weights`, which all processes iterate over together; one of them
    writes. The weights of at most one file are in memory. Weights already in the folder are replaced; other files are
    kept.
    """
    files: dict[Path, list[str]] = {}
    pending: dict[str, Tensor] = {}
    total = pending_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        if pending:
            file = folder / f"writing-{len(files):05d}.safetensors"
            save_file(pending, file, metadata={"format": "pt"})
            files[file] = list(pending)
            pending.clear()
            pending_bytes = 0

    if write:
        folder.mkdir(parents=True, exist_ok=True)
    for name, value in weights:
        if write:
            pending[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value)
            pending_bytes += value.nbytes
            total += value.nbytes
            if pending_bytes >= shard_bytes:
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


def write_description(run: RunConfig, role: Role, folder: Path, dtype: str | None = None) -> None:
    """Write what belongs to a model's weights in `folder`: configuration, generation settings, tokenizer, chat template.

    Raises:
        ConfigError: transformers has no class for a critic of this architecture.
    """
    model = run.roles[role].model
    trust = model.trust_remote_code
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=trust, **model.override_config)
    if dtype is not None:
        config.dtype = torch_dtype(dtype)
    if role == "critic":
        if type(config) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
            raise ConfigError(f"transformers has no token classification for {config.model_type}")
        model_class: Any = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)]
        config.architectures = [model_class.__name__]
        config.num_labels = 1
    config.save_pretrained(folder)
    with suppress(OSError):  # not every model has generation settings
        GenerationConfig.from_pretrained(model.path).save_pretrained(folder)
    load_tokenizer(run).save_pretrained(folder)
