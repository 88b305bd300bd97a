"""Token sequences in a safetensors file."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from iiverl_core.cluster.store import Store, open_all
from iiverl_core.errors import CheckpointError
from iiverl_core.samples import SequenceRef, TokenSequence

_FIELDS = ("token_ids", "loss_mask", "log_probs")


def write_sequences(path: Path, sequences: Sequence[SequenceRef], store: Store) -> None:
    """Write the token arrays of sequences, which are in `store`, in their order.

    Raises:
        CheckpointError: the file cannot be written.
    """
    write_arrays(path, pack(open_all(store, [each.tokens for each in sequences])), {})


def read_sequences(path: Path) -> list[TokenSequence]:
    """Read what `write_sequences` wrote.

    Raises:
        CheckpointError: the file is not one of token sequences.
    """
    try:
        return unpack(read_arrays(path)[0])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a file of token sequences: {error}") from error


def pack(sequences: Sequence[TokenSequence]) -> dict[str, np.ndarray]:
    """Concatenate sequences to arrays by name.

    Per token of all sequences: `token_ids` int64, `loss_mask` bool, `log_probs` fp32 (those of the engine). Per sequence:
    `lengths` int64. Further model inputs are `extras.NAME.I` for the I-th sequence.
    """
    arrays: dict[str, np.ndarray] = {
        "lengths": np.array([len(each.token_ids) for each in sequences], np.int64)
    }
    for name, kind in zip(_FIELDS, (np.int64, np.bool_, np.float32), strict=True):
        parts = [getattr(each, name) for each in sequences]
        arrays[name] = np.concatenate(parts) if parts else np.zeros(0, kind)
    for i, each in enumerate(sequences):
        arrays |= {f"extras.{name}.{i}": value for name, value in each.extras.items()}
    return arrays


def unpack(arrays: Mapping[str, np.ndarray]) -> list[TokenSequence]:
    """Return the sequences of `pack`; other arrays are ignored."""
    extras: list[dict[str, np.ndarray]] = [{} for _ in arrays["lengths"]]
    for name, value in arrays.items():
        if name.startswith("extras."):
            field, _, index = name.removeprefix("extras.").rpartition(".")
            extras[int(index)][field] = value
    ends = np.cumsum(arrays["lengths"])[:-1]
    fields = (np.split(arrays[name], ends) for name in _FIELDS)
    rows = zip(*fields, extras, strict=bool(extras))  # without sequences, each field still has an empty part
    return [TokenSequence(*arrays, extras=own) for *arrays, own in rows]


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays as a safetensors file, atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(arrays), temporary, dict(metadata))
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file: arrays by name, and the metadata.

    Raises:
        CheckpointError: it is not such a file.
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
