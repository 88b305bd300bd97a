"""Write a model in the format of transformers and vLLM: a folder of safetensors, configuration and tokenizer."""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, GenerationConfig

from iiverl_core.config import Role, RunConfig
from iiverl_core.data import load_image_processor, load_tokenizer
from iiverl_core.dtypes import torch_dtype
from iiverl_core.errors import ConfigError
from iiverl_core.training.model_config import read_model_config

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
"""Size of a file of weights."""


def write_safetensors(
    weights: Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    write: bool,
    shard_bytes: int = SHARD_BYTES,
    one_at_a_time: bool = False,
) -> Callable[[], None]:
    """Copy named weights, and write them in the background into files of about `shard_bytes`, with an index of them.

    `weights` are those of `TrainingBackend.named_weights`, which all processes iterate over together; one of them
    writes. A file is written while the weights of the next one are copied, so those of two are in memory, unless only
    `one_at_a_time` may be. Weights already in the folder are replaced; other files are kept.

    Returns:
        A function that waits for the files, and raises OSError or SafetensorError if one cannot be written.
    """
    files: dict[Path, list[str]] = {}
    pending: dict[str, Tensor] = {}
    writing: Future[None] | None = None
    total = pending_bytes = 0
    if not write:
        for _ in weights:
            pass
        return lambda: None
    folder.mkdir(parents=True, exist_ok=True)
    thread = ThreadPoolExecutor(1, thread_name_prefix="safetensors")

    def flush() -> None:
        nonlocal pending, pending_bytes, writing
        if pending:
            file = folder / f"writing-{len(files):05d}.safetensors"
            files[file] = list(pending)
            if writing is not None:
                writing.result()
            writing = thread.submit(save_file, pending, file, {"format": "pt"})
            pending, pending_bytes = {}, 0
            if one_at_a_time:
                writing.result()

    try:
        for name, value in weights:
            pending[name] = torch.empty(value.shape, dtype=value.dtype).copy_(value)
            pending_bytes += value.nbytes
            total += value.nbytes
            if pending_bytes >= shard_bytes:
                flush()
        flush()
        naming = thread.submit(_name_files, folder, files, total)
    finally:
        thread.shutdown(wait=False)

    def wait() -> None:
        if writing is not None:
            writing.result()
        naming.result()

    return wait


def _name_files(folder: Path, files: Mapping[Path, list[str]], total: int) -> None:
    """Replace the weights in a folder by new files, which have the weights of these names, `total` bytes in all."""
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


def describe(run: RunConfig, role: Role) -> dict[str, bytes]:
    """Return the files of `write_description`, by their path in the folder."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_description(run, role, folder)
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_description(run: RunConfig, role: Role, folder: Path, dtype: str | None = None) -> None:
    """Write what belongs to a model's weights in `folder`: configuration, generation settings, tokenizer, chat template.

    For a model that reads images, also its processor of images.

    Raises:
        ConfigError: transformers has no class for a critic of this architecture.
    """
    model = run.roles[role].model
    config = read_model_config(
        model.path,
        model.override_config,
        trust_remote_code=model.trust_remote_code,
        key=run.roles[role].key("model"),
    )
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
    images = load_image_processor(run)
    (images.processor if images else load_tokenizer(run)).save_pretrained(folder)
