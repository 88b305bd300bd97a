"""Write a model as transformers and vLLM read it: a folder of safetensors, configuration and tokenizer."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, AutoConfig, GenerationConfig

from iiverl_core.config import Role, RunConfig
from iiverl_core.data import load_tokenizer
from iiverl_core.dtypes import torch_dtype
from iiverl_core.errors import ConfigError

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
        config.architectures = [MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING[type(config)].__name__]
        config.num_labels = 1
    config.save_pretrained(folder)
    with suppress(OSError):  # not every model has generation settings
        GenerationConfig.from_pretrained(model.path).save_pretrained(folder)
    load_tokenizer(run).save_pretrained(folder)
