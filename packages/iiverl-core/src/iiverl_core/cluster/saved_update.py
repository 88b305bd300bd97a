"""The token arrays of one optimizer step in a file, from which the step can be computed again."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from iiverl_core.cluster.messages import RankBatch, Trained
from iiverl_core.cluster.store import Store, open_all
from iiverl_core.errors import CheckpointError
from iiverl_core.samples import Handle, SampleId, SequenceRef, TokenSequence


@dataclass(frozen=True)
class SavedUpdate:
    """The arguments of `ModelRunner.update` for a whole mini-batch.

    `batch` has its sequences, their arrays, and their loss weights as planned, for a single rank. Its handles hold the
    arrays themselves, as `LocalStore` expects.
    """

    role: Trained
    batch: RankBatch
    lr: float


def write_update(path: Path, update: SavedUpdate, store: Store) -> None:
    """Write an optimizer step whose arrays are in `store` as a safetensors file, atomically.

    Per token of all sequences, concatenated: `token_ids` int64, `loss_mask` bool, `log_probs` fp32 (those of the engine).
    Per trained token: `arrays.NAME` fp32. Per sequence: `lengths` int64, `weights` float64. Further model inputs are
    `extras.NAME.I` for the I-th sequence. The metadata has the rest as JSON.

    Raises:
        CheckpointError: the file cannot be written.
    """
    batch = update.batch
    tokens: list[TokenSequence] = open_all(store, [each.tokens for each in batch.sequences])
    names = list(batch.sequences[0].arrays)
    tensors = {
        "token_ids": np.concatenate([each.token_ids for each in tokens]),
        "loss_mask": np.concatenate([each.loss_mask for each in tokens]),
        "log_probs": np.concatenate([each.log_probs for each in tokens]),
        "lengths": np.array([len(each.token_ids) for each in tokens]),
        "weights": np.array(batch.weights),
    }
    for name in names:
        arrays = open_all(store, [each.arrays[name] for each in batch.sequences])
        tensors[f"arrays.{name}"] = np.concatenate(arrays)
    for i, each in enumerate(tokens):
        tensors |= {f"extras.{name}.{i}": value for name, value in each.extras.items()}
    metadata = {
        "role": update.role,
        "lr": update.lr,
        "ids": [list(each.id) for each in batch.sequences],
        "micro_batches": batch.micro_batches,
        "inv_num_tokens": batch.inv_num_tokens,
        "arrays": list(batch.arrays),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, {"update": json.dumps(metadata)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def read_update(path: Path) -> SavedUpdate:
    """Read what `write_update` wrote.

    Raises:
        CheckpointError: the file is not one of an optimizer step.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = json.loads((file.metadata() or {})["update"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a file of an optimizer step: {error}") from error
    ends = np.cumsum(tensors["lengths"])[:-1]
    fields = (np.split(tensors[name], ends) for name in ("token_ids", "loss_mask", "log_probs"))
    tokens = [
        TokenSequence(*each, extras=_extras(tensors, i)) for i, each in enumerate(zip(*fields, strict=True))
    ]
    trained_ends = np.cumsum([each.trained for each in tokens])[:-1]
    arrays = {
        name.removeprefix("arrays."): np.split(values, trained_ends)
        for name, values in tensors.items()
        if name.startswith("arrays.")
    }
    batch = RankBatch(
        sequences=_references(metadata["ids"], tokens, arrays),
        micro_batches=metadata["micro_batches"],
        weights=tensors["weights"].tolist(),
        inv_num_tokens=metadata["inv_num_tokens"],
        arrays=tuple(metadata["arrays"]),
    )
    return SavedUpdate(cast("Trained", metadata["role"]), batch, metadata["lr"])


def _extras(tensors: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """Return the further inputs of the i-th sequence."""
    found = {}
    for name, value in tensors.items():
        if name.startswith("extras."):
            field, _, index = name.removeprefix("extras.").rpartition(".")
            if int(index) == i:
                found[field] = value
    return found


def _references(
    ids: Sequence[Sequence[object]],
    tokens: Sequence[TokenSequence],
    arrays: Mapping[str, Sequence[np.ndarray]],
) -> list[SequenceRef]:
    return [
        SequenceRef(
            id=SampleId(*id),  # type: ignore[arg-type]
            tokens=Handle([each]),
            length=len(each.token_ids),
            trained=each.trained,
            arrays={name: Handle([parts[i]]) for name, parts in arrays.items()},
        )
        for i, (id, each) in enumerate(zip(ids, tokens, strict=True))
    ]
