"""The token arrays of one optimizer step in a file, from which the step can be computed again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from iiverl_core.cluster.messages import RankBatch, Trained
from iiverl_core.cluster.saved_sequences import pack, read_arrays, unpack, write_arrays
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

    It has the arrays of `pack`; per trained token `arrays.NAME` fp32, and per sequence `weights` float64. The metadata has
    the rest as JSON.

    Raises:
        CheckpointError: the file cannot be written.
    """
    batch = update.batch
    arrays = pack(open_all(store, [each.tokens for each in batch.sequences]))
    arrays["weights"] = np.array(batch.weights)
    for name in batch.sequences[0].arrays:
        parts = open_all(store, [each.arrays[name] for each in batch.sequences])
        arrays[f"arrays.{name}"] = np.concatenate(parts)
    metadata = {
        "role": update.role,
        "lr": update.lr,
        "ids": [list(each.id) for each in batch.sequences],
        "micro_batches": batch.micro_batches,
        "inv_num_tokens": batch.inv_num_tokens,
        "arrays": list(batch.arrays),
    }
    write_arrays(path, arrays, {"update": json.dumps(metadata)})


def read_update(path: Path) -> SavedUpdate:
    """Read what `write_update` wrote.

    Raises:
        CheckpointError: the file is not one of an optimizer step.
    """
    tensors, texts = read_arrays(path)
    try:
        metadata, tokens = json.loads(texts["update"]), unpack(tensors)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a file of an optimizer step: {error}") from error
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
