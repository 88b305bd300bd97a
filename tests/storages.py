"""The memory that tensors take: their storages, counted after every operation."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Counts the bytes of given tensors and of all that operations create, as long as something refers to them.

    A storage counts with its size at the time: FSDP empties some and fills them again.
    """

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in tensors:
            self._add(tensor)
        self.first = self.most = self.now

    @property
    def now(self) -> int:
        """Bytes of the storages that are alive."""
        alive = [reference() for reference in list(self._alive.values())]
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it calls operations on its local part, which come here
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._add(each)
        self.most = max(self.most, self.now)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        id = storage._cdata
        if id not in self._alive:
            self._alive[id] = weakref.ref(storage)
            weakref.finalize(storage, self._alive.pop, id)
