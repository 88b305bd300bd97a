"""Read the safetensors files of a transformers checkpoint, one tensor at a time."""

import json
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from torch import Tensor

from iiverl_core.errors import ConfigError
from iiverl_core.training import ModelSpec

INDEX = "model.safetensors.index.json"


class CheckpointFiles:
    """The weights in the folder `spec.weights`, or at `spec.model.path`, a folder or a Hub name."""

    def __init__(self, spec: ModelSpec) -> None:
        """Index the tensors of each file.

        Raises:
            ConfigError: there are no safetensors.
        """
        self._where = f"the {spec.role} model '{spec.model.path}'"
        folder = spec.weights or self._folder(spec.model.path)
        self._opened: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        index = folder / INDEX
        if index.is_file():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._file_of = {name: folder / file for name, file in named.items()}
        else:
            for file in sorted(folder.glob("*.safetensors")):
                self._file_of |= dict.fromkeys(self._open(file).keys(), file)
        if not self._file_of:
            raise ConfigError(
                f"{self._where} has no safetensors in {folder}; save it with transformers' save_pretrained, which writes them"
            )

    def _folder(self, path: str) -> Path:
        folder = Path(path).expanduser()
        if folder.exists():
            return folder
        try:
            return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ConfigError(f"no weights can be read from {self._where}: {error}") from error

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safe_open(file, framework="pt")
            except OSError as error:
                raise ConfigError(f"{file} of {self._where} cannot be read: {error}") from error
        return self._opened[file]

    def read(self, name: str) -> Tensor | None:
        """Read a tensor into CPU memory; None if there is none of that name."""
        file = self._file_of.get(name)
        return None if file is None else self._open(file).get_tensor(name)

    def refuse_missing(self, name: str) -> NoReturn:
        """Raise ConfigError for a tensor that the checkpoint lacks."""
        if name.startswith("score."):
            raise ConfigError(
                f"{self._where} is no reward model: its checkpoint has no {name}, and random weights in its place would "
                "give random scores; name a sequence-classification model in reward_model.model.path"
            )
        raise ConfigError(
            f"the checkpoint of {self._where} lacks {name}; is it whole, and is its config.json of the same model?"
        )

    def refuse_shape(self, name: str, found: Tensor) -> NoReturn:
        """Raise ConfigError for a tensor whose shape does not fit the model."""
        if name.startswith("score.") and found.shape[0] != 1:
            raise ConfigError(
                f"{self._where} has a head of shape {tuple(found.shape)}, that is num_labels {found.shape[0]}; a model "
                "of this role gives one number, num_labels 1"
            )
        raise ConfigError(
            f"{name} of {self._where} has shape {tuple(found.shape)}, which does not fit its config.json; check "
            "that and model.override_config"
        )
