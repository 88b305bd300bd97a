"""Ways for weights, from a process that trains to processes that generate, and the way through the store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from iiverl_core.cluster.store import Store, open_all, put_all


class BrokenWayError(Exception):
    """Weights cannot arrive on this way, because a process at its other end died or something between them failed."""


class Sender(Protocol):
    """The end of a way in the process that sends."""

    def ready(self) -> None:
        """Wait until the bucket before has left, and its memory is free."""
        ...

    def take(self, name: str, value: Tensor) -> Any:
        """Copy a weight, whose own memory may change afterwards, into the form in which it travels."""
        ...

    def send(self, bucket: Sequence[Any]) -> Any:
        """Send a bucket of what `take` gave, without waiting for anyone; give what lets a receiver have it."""
        ...

    def close(self) -> None:
        """Free what the way held, whatever is under way there."""
        ...


class Receiver(Protocol):
    """The end of a way in a process that generates."""

    def receive(self, ticket: Any) -> Iterator[tuple[str, Tensor]]:
        """Wait for the bucket of a ticket that `Sender.send` gave; then each weight by name, in memory of its own.

        Raises:
            BrokenWayError: the bucket does not come.
        """
        ...

    def close(self) -> None:
        """Free what the way held, whatever is under way there."""
        ...


class Way(Protocol):
    """A way that weights go: small, sent to all processes that take part, and equal where it is the same one."""

    def sender(self, store: Store, device: torch.device) -> Sender:
        """Make the sender's end."""
        ...

    def receiver(self, number: int, store: Store, device: torch.device) -> Receiver:
        """Make the end of receiver `number`."""
        ...


class Carrier(Protocol):
    """Knows the way, in the process that directs the others."""

    def way(self, receivers: int) -> Way:
        """Give the way to so many processes: the one before, unless that was given up."""
        ...

    def give_up(self, reason: str) -> None:
        """Give up the way: who waits there is told why, and does not wait any longer."""
        ...


@dataclass(frozen=True)
class Packed:
    """A tensor as bytes, which a store passes on without copying them: name, dtype, shape, and uint8 array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @classmethod
    def of(cls, name: str, value: Tensor) -> "Packed":
        """Pack a tensor; the array is a copy in this machine's memory."""
        plain = value.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().copy()
        return cls(name, str(plain.dtype).removeprefix("torch."), tuple(plain.shape), data)

    def tensor(self) -> Tensor:
        """Give the tensor, in memory of its own: a store's is not to be written."""
        value = np.frombuffer(bytearray(self.data), dtype=np.uint8)
        return torch.from_numpy(value).view(getattr(torch, self.dtype)).reshape(self.shape)


@dataclass(frozen=True)
class ThroughStore:
    """Through the store of token arrays, which is shared memory on one machine. Implements `Way` and `Carrier`."""

    def way(self, receivers: int) -> Way:
        """See `Carrier.way`."""
        return self

    def give_up(self, reason: str) -> None:
        """See `Carrier.give_up`; nobody waits for anyone here."""

    def sender(self, store: Store, device: torch.device) -> Sender:
        """See `Way.sender`."""
        return _IntoStore(store)

    def receiver(self, number: int, store: Store, device: torch.device) -> Receiver:
        """See `Way.receiver`."""
        return _OutOfStore(store)


@dataclass(frozen=True)
class _IntoStore:
    store: Store

    def ready(self) -> None:
        pass

    def take(self, name: str, value: Tensor) -> Packed:
        return Packed.of(name, value)

    def send(self, bucket: Sequence[Packed]) -> Any:
        return put_all(self.store, [list(bucket)])[0]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _OutOfStore:
    store: Store

    def receive(self, ticket: Any) -> Iterator[tuple[str, Tensor]]:
        return ((packed.name, packed.tensor()) for packed in open_all(self.store, [ticket])[0])

    def close(self) -> None:
        pass
