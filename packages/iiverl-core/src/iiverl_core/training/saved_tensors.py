"""Read tensors of a folder of `torch.distributed.checkpoint`, one at a time, in one process without a group."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from iiverl_core.errors import CheckpointError


class SavedTensors:
    """The tensors in a folder.

    `shapes` has that of each whole tensor, whatever processes wrote its parts; `names` has all entries, tensors or not.
    """

    def __init__(self, folder: Path) -> None:
        """Read the index of the folder.

        Raises:
            CheckpointError: there is none.
        """
        self._folder = folder
        self._reader = FileSystemReader(folder)
        try:
            index = self._reader.read_metadata()
        except (OSError, EOFError, UnpicklingError) as error:
            raise CheckpointError(f"{folder} holds no checkpoint of a model: {error}") from error
        self._reader.set_up_storage_reader(index, is_coordinator=True)
        self.names = frozenset(index.state_dict_metadata)
        self._entries = {
            name: entry
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, entry in self._entries.items()}

    def read(
        self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """Read a tensor into CPU memory, or the part of it that begins at `offsets` and has the shape `sizes`.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self._folder} holds no {name}")
        shape = torch.Size(entry.size if sizes is None else sizes)
        chunk = ChunkStorageMetadata(torch.Size(offsets or [0] * len(shape)), shape)
        items = create_read_items_for_chunk_list(name, entry, [chunk])
        found = torch.empty(shape, dtype=entry.properties.dtype)
        if sum(item.lengths.numel() for item in items) != found.numel():
            raise CheckpointError(f"{self._folder} holds only a part of {name}")
        try:
            self._reader.read_data(LoadPlan(items), _Destination(found)).wait()
        except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
            raise CheckpointError(f"{name} in {self._folder} cannot be read: {error}") from error
        return found


def differences(one: SavedTensors, other: SavedTensors) -> Iterator[str]:
    """Yield a line for each tensor that is not the same in both, bit by bit; tensors are read one at a time."""
    for name in sorted(one.shapes.keys() | other.shapes.keys()):
        if one.shapes.get(name) != other.shapes.get(name):
            yield f"{name} has shape {one.shapes.get(name)} -> {other.shapes.get(name)}"
            continue
        left, right = one.read(name), other.read(name)
        if left.dtype != right.dtype:
            yield f"{name} is {left.dtype} -> {right.dtype}"
        elif not torch.equal(_bits(left), _bits(right)):
            yield f"{name} differs by up to {(left.double() - right.double()).abs().max().item():.3g}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class _Destination(DefaultLoadPlanner):
    """Names the place in `tensor` of each part that is read."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the place of a part."""
        place = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._tensor[tuple(slice(start, start + length) for start, length in place)]
