"""Token sequences in safetensors files: in checkpoints, and beside the samples of a step."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from iiverl_core.errors import CheckpointError
from iiverl_core.samples import ImageInputs, SampleId, SequenceImage, TokenSequence

SEQUENCES_SUFFIX = ".safetensors"
TOKENIZER_FILE = "tokenizer.json"
"""Name of a file of the package `tokenizers`, beside files of sequences, with which their ids can be read."""

_FIELDS: dict[str, Any] = {"token_ids": np.int32, "loss_mask": np.bool_, "log_probs": np.float32}
"""Arrays with an entry per token of all sequences, and their types in a file."""
_EXTRAS, _NUMBERS, _STARTS = "extras.", "numbers.", "starts."
_IMAGE, _IMAGES = "image.", "images."

TokenNumbers: TypeAlias = Mapping[str, Mapping[int, np.ndarray]]
"""By name and position of a sequence, a number per trained token of it, (trained,) float32."""


def write_sequences(
    path: Path,
    sequences: Sequence[TokenSequence],
    ids: Sequence[SampleId],
    numbers: TokenNumbers | None = None,
) -> None:
    """Write sequences in their order, and numbers that were computed for some of them, as one file, atomically.

    Per token of all sequences there are `token_ids` int32, `loss_mask` bool and `log_probs` fp32 (those of the engine), and
    per sequence `lengths` int64 and `ids` int64: step, group and member of its rollout. Further model inputs are
    `extras.NAME.I` for the I-th sequence. `numbers.NAME` fp32 has the numbers of all sequences, and `starts.NAME` int64 where
    those of each begin, -1 if it has none. Images, each once, are `image.FIELD.N`, and `images.I` (n, 2) has the numbers and
    the first tokens of those of the I-th sequence.

    Raises:
        CheckpointError: the file cannot be written.
    """
    arrays = {
        "lengths": np.array([len(each.token_ids) for each in sequences], np.int64),
        "ids": np.array([id[1:] for id in ids], np.int64).reshape(-1, 3),
    }
    for name, kind in _FIELDS.items():
        arrays[name] = _joined([getattr(each, name) for each in sequences], kind)
    for i, each in enumerate(sequences):
        arrays |= {f"{_EXTRAS}{name}.{i}": value for name, value in each.extras.items()}
    arrays |= _image_arrays(sequences)
    for name, by_position in (numbers or {}).items():
        starts = np.full(len(sequences), -1, np.int64)
        starts[list(by_position)] = np.cumsum([0, *map(len, by_position.values())])[:-1]
        arrays[f"{_STARTS}{name}"] = starts
        arrays[f"{_NUMBERS}{name}"] = _joined(list(by_position.values()), np.float32)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _image_arrays(sequences: Sequence[TokenSequence]) -> dict[str, np.ndarray]:
    images = {id(image): image for each in sequences for _, image in each.images}
    number = {key: n for n, key in enumerate(images)}
    arrays: dict[str, np.ndarray] = {}
    for n, image in enumerate(images.values()):
        for field in fields(image):
            value = getattr(image, field.name)
            array = np.array(bytearray(value), np.uint8) if isinstance(value, bytes) else np.asarray(value)
            arrays[f"{_IMAGE}{field.name}.{n}"] = array
    for i, each in enumerate(sequences):
        if each.images:
            arrays[f"{_IMAGES}{i}"] = np.array([(number[id(image)], start) for start, image in each.images])
    return arrays


def read_sequences(path: Path) -> list[TokenSequence]:
    """Read the sequences that `write_sequences` wrote.

    Raises:
        CheckpointError: the file is not one of token sequences.
    """
    file = SequenceFile(path)
    return [file.sequence(position) for position in range(len(file))]


class SequenceFile:
    """A file of `write_sequences`, of which only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            CheckpointError: it cannot be read, or is not one of token sequences.
        """
        try:
            self._file = safe_open(path, framework="np")
            names = list(self._file.keys())
            self._bounds = [0, *np.cumsum(self._file.get_tensor("lengths")).tolist()]
            self.ids: list[tuple[int, int, int]] = [tuple(id) for id in self._file.get_tensor("ids").tolist()]
            """Step, group and member of each sequence's rollout."""
            if missing := _FIELDS.keys() - set(names):
                raise KeyError(", ".join(sorted(missing)))
            self._starts = {
                name.removeprefix(_STARTS): self._file.get_tensor(name)
                for name in names
                if name.startswith(_STARTS)
            }
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"{path} is not a file of token sequences: {error}") from error
        self._names = set(names)
        self._images: dict[int, ImageInputs] = {}
        self._extras: dict[int, list[str]] = {}
        for name in names:
            if name.startswith(_EXTRAS):
                extra, _, position = name.removeprefix(_EXTRAS).rpartition(".")
                self._extras.setdefault(int(position), []).append(extra)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def sequence(self, position: int) -> TokenSequence:
        """Read the sequence at a position."""
        start, end = self._bounds[position : position + 2]
        token_ids, loss_mask, log_probs = (self._file.get_slice(name)[start:end] for name in _FIELDS)
        names = self._extras.get(position, ())
        extras = {name: self._file.get_tensor(f"{_EXTRAS}{name}.{position}") for name in names}
        images = ()
        if (placed := f"{_IMAGES}{position}") in self._names:
            numbers = self._file.get_tensor(placed).tolist()
            images = tuple(SequenceImage(start, self._image(number)) for number, start in numbers)
        return TokenSequence(token_ids.astype(np.int64), loss_mask, log_probs, extras, images)

    def _image(self, number: int) -> ImageInputs:
        """Read an image, once for all sequences that have it."""
        if number not in self._images:
            values: dict[str, Any] = {
                field.name: self._file.get_tensor(f"{_IMAGE}{field.name}.{number}")
                for field in fields(ImageInputs)
            }
            texts = {name: values[name].tobytes() for name in ("digest", "thumbnail")}
            self._images[number] = ImageInputs(**{**values, **texts, "tokens": int(values["tokens"])})
        return self._images[number]

    def numbers(self, position: int, trained: int) -> dict[str, np.ndarray]:
        """Read the numbers per trained token of the sequence at a position, which has `trained` of them, by name."""
        return {
            name: self._file.get_slice(f"{_NUMBERS}{name}")[starts[position] : starts[position] + trained]
            for name, starts in self._starts.items()
            if starts[position] >= 0
        }


def _joined(parts: Sequence[np.ndarray], kind: Any) -> np.ndarray:
    return np.concatenate(parts).astype(kind, copy=False) if parts else np.zeros(0, kind)
