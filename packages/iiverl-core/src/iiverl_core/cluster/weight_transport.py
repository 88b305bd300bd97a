"""Carry buckets of weights from a trainer worker to rollout workers: through the store, or by broadcast.

A broadcast goes over NCCL between CUDA devices and over gloo between processes on CPUs, in a process group of its own.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from iiverl_core.cluster.store import Store, open_all, put_all

TIMEOUT_S = 600.0  # for one bucket; the failures that are noticed abort the transport long before
POLL_S = 0.05  # how often a waiting endpoint checks whether the transport was aborted
ABORT_KEY = "aborted"  # under which a rendezvous holds the reason

BucketMetadata: TypeAlias = Any
"""What `BucketSender.send` returns and a receiver needs to get the bucket: small, and picklable."""


class WeightTransportError(Exception):
    """A bucket cannot arrive: a process at another end of the transport died, or the connection failed."""


class BucketSender(Protocol):
    """The end of a transport in the trainer worker that sends."""

    def flush(self) -> None:
        """Wait until the last bucket is sent, and its memory is free.

        Raises:
            WeightTransportError: it cannot be sent.
        """
        ...

    def pack(self, name: str, value: Tensor) -> Any:
        """Copy a weight, whose own memory may change afterwards, into the form in which it is sent."""
        ...

    def send(self, bucket: Sequence[Any]) -> BucketMetadata:
        """Start to send a bucket of packed weights, without waiting for a receiver."""
        ...

    def close(self) -> None:
        """Free the endpoint's resources, also in the middle of a transfer."""
        ...


class BucketReceiver(Protocol):
    """The end of a transport in a rollout worker."""

    def receive(self, bucket: BucketMetadata) -> Iterator[tuple[str, Tensor]]:
        """Wait for a bucket; then give each weight by name, in memory of its own.

        Raises:
            WeightTransportError: the bucket cannot arrive.
        """
        ...

    def close(self) -> None:
        """Free the endpoint's resources, also in the middle of a transfer."""
        ...


class WeightTransport(Protocol):
    """A picklable, comparable description of how weights are transferred; each process opens its end from it."""

    def open_sender(self, store: Store, device: torch.device) -> BucketSender:
        """Open the sender's end."""
        ...

    def open_receiver(self, index: int, store: Store, device: torch.device) -> BucketReceiver:
        """Open the end of one of the receivers."""
        ...


class WeightTransportFactory(Protocol):
    """Makes and aborts transports, in the controller's process."""

    def transport(self, receivers: Sequence[int]) -> WeightTransport:
        """Return the transport to receivers, given by index: the same as before, unless that was aborted or had others."""
        ...

    def abort(self, reason: str) -> None:
        """Abort the current transport: every endpoint that waits raises `WeightTransportError` with this reason."""
        ...


@dataclass(frozen=True)
class SerializedTensor:
    """A tensor as bytes, which a store passes on without copying them: name, dtype, shape, and uint8 array."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    @classmethod
    def of(cls, name: str, value: Tensor) -> "SerializedTensor":
        """Serialize a tensor; the array is a copy in this machine's memory."""
        plain = value.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().copy()
        return cls(name, _dtype_name(plain), tuple(plain.shape), data)

    def tensor(self) -> Tensor:
        """Return the tensor, in memory of its own: a store's must not be written."""
        value = np.frombuffer(bytearray(self.data), dtype=np.uint8)
        return torch.from_numpy(value).view(getattr(torch, self.dtype)).reshape(self.shape)


@dataclass(frozen=True)
class StoreTransport:
    """Through the store of token arrays, which is shared memory on one machine.

    Implements `WeightTransport` and `WeightTransportFactory`: there is nothing to connect or to abort.
    """

    def transport(self, receivers: Sequence[int]) -> WeightTransport:
        """See `WeightTransportFactory.transport`."""
        return self

    def abort(self, reason: str) -> None:
        """See `WeightTransportFactory.abort`; no endpoint ever waits for another."""

    def open_sender(self, store: Store, device: torch.device) -> BucketSender:
        """See `WeightTransport.open_sender`."""
        return _StoreEndpoint(store)

    def open_receiver(self, index: int, store: Store, device: torch.device) -> BucketReceiver:
        """See `WeightTransport.open_receiver`."""
        return _StoreEndpoint(store)


@dataclass(frozen=True)
class _StoreEndpoint:
    store: Store

    def flush(self) -> None:
        pass

    def pack(self, name: str, value: Tensor) -> SerializedTensor:
        return SerializedTensor.of(name, value)

    def send(self, bucket: Sequence[SerializedTensor]) -> BucketMetadata:
        return put_all(self.store, [list(bucket)])[0]

    def receive(self, bucket: BucketMetadata) -> Iterator[tuple[str, Tensor]]:
        return ((each.name, each.tensor()) for each in open_all(self.store, [bucket])[0])

    def close(self) -> None:
        pass


class BroadcastRendezvous:
    """Hosts the store where endpoints find each other and learn of an abort. Implements `WeightTransportFactory`.

    After an abort the next transport has a new process group, since one with a dead member is of no use.
    """

    def __init__(self, host: str) -> None:
        """`host` is this machine's address, at which the other processes can reach a free port of this one."""
        self._host = host
        self._generation = 0
        self._current: tuple[BroadcastTransport, TCPStore] | None = None
        self._aborted: TCPStore | None = None
        """The store of the last transport that was aborted, whose endpoints may still have to read the reason."""

    def transport(self, receivers: Sequence[int]) -> WeightTransport:
        """See `WeightTransportFactory.transport`."""
        receivers = tuple(receivers)
        if self._current is not None and self._current[0].receivers != receivers:
            self.abort("other processes receive the weights from now on")
        if self._current is None:
            store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
            self._generation += 1
            self._current = BroadcastTransport(self._host, store.port, receivers, self._generation), store
        return self._current[0]

    def abort(self, reason: str) -> None:
        """See `WeightTransportFactory.abort`."""
        if self._current is not None:
            self._aborted = self._current[1]
            self._aborted.set(ABORT_KEY, reason)
            self._current = None


@dataclass(frozen=True)
class BroadcastTransport:
    """Broadcasts from one sender to `receivers`, given by index, which find each other at `host` and `port`.

    `generation` distinguishes it from earlier ones, which may have had the same port. Implements `WeightTransport`.
    """

    host: str
    port: int
    receivers: tuple[int, ...]
    generation: int

    def open_sender(self, store: Store, device: torch.device) -> BucketSender:
        """See `WeightTransport.open_sender`."""
        return BroadcastEndpoint(self, 0, device)

    def open_receiver(self, index: int, store: Store, device: torch.device) -> BucketReceiver:
        """See `WeightTransport.open_receiver`."""
        return BroadcastEndpoint(self, 1 + self.receivers.index(index), device)

    def connect(self) -> TCPStore:
        """Connect to the rendezvous."""
        return TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))


class BroadcastEndpoint:
    """A process in the broadcast's group; rank 0 sends. Implements `BucketSender` and `BucketReceiver`.

    It joins and broadcasts on threads, one at a time, so that a dead member blocks nobody: the caller that waits polls
    the rendezvous meanwhile, and stops when the transport was aborted there. It is aborted by endpoints whose own part
    failed, as gloo's does when a connection closes, and by the controller, which learns of a process's death from Ray,
    while NCCL would wait on. `close` aborts running calls: NCCL's kernels end then, and a thread that is stuck in gloo,
    or in joining, stays until its timeout, with nobody waiting for it.
    """

    def __init__(self, transport: BroadcastTransport, rank: int, device: torch.device) -> None:
        self._transport, self._rank, self._device = transport, rank, device
        self._abort_store = transport.connect()  # the thread may be waiting on a connection of its own
        self._group: Any = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._start(self._join)

    def flush(self) -> None:
        """See `BucketSender.flush`."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(POLL_S)
            self._check_abort()
            if time.monotonic() > deadline:
                self._abort(f"nothing arrived within {TIMEOUT_S:.0f} s")
        self._check_abort()

    def pack(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        """See `BucketSender.pack`."""
        return name, value.detach().clone(memory_format=torch.contiguous_format)

    def send(self, bucket: Sequence[tuple[str, Tensor]]) -> BucketMetadata:
        """See `BucketSender.send`; the metadata are name, dtype and shape of each weight."""
        self._start(lambda: self._broadcast([value for _, value in bucket]))
        return [(name, _dtype_name(value), tuple(value.shape)) for name, value in bucket]

    def receive(self, bucket: BucketMetadata) -> Iterator[tuple[str, Tensor]]:
        """See `BucketReceiver.receive`."""
        tensors = [
            torch.empty(shape, dtype=getattr(torch, dtype), device=self._device) for _, dtype, shape in bucket
        ]
        if self._device.type == "cuda":
            # What had this memory before may still be read on this thread's stream; they are written on another.
            torch.cuda.current_stream().synchronize()
        self._start(lambda: self._broadcast(tensors))
        self.flush()
        return zip([name for name, _, _ in bucket], tensors, strict=True)

    def close(self) -> None:
        """See `BucketSender.close`."""
        self._closed = True
        if self._group is not None:
            self._group.abort()

    def _start(self, job: Callable[[], None]) -> None:
        before = self._thread

        def run() -> None:
            if before is not None:
                before.join()
            if self._closed:
                return
            try:
                job()
            except Exception as error:  # of any type: the other endpoints must learn of it
                if not self._closed:
                    self._abort(f"{type(error).__name__}: {error}")

        self._thread = threading.Thread(target=run, name="broadcast", daemon=True)
        self._thread.start()

    def _join(self) -> None:
        store, size = self._transport.connect(), 1 + len(self._transport.receivers)
        make = _nccl if self._device.type == "cuda" else _gloo
        self._group = make(PrefixStore("group", store), self._rank, size)
        if self._closed:
            self._group.abort()

    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        parts = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors if tensor.numel()]
        for work in [self._group.broadcast([part], options) for part in parts]:
            work.wait()
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # there, the wait above is only the stream's

    def _abort(self, reason: str) -> None:
        try:
            self._abort_store.set(ABORT_KEY, f"in member {self._rank} of the group, {reason}")
        except dist.DistError as error:
            raise WeightTransportError(f"the rendezvous of the group is gone, and {reason}") from error

    def _check_abort(self) -> None:
        try:
            aborted = self._abort_store.check([ABORT_KEY])
            reason = self._abort_store.get(ABORT_KEY).decode() if aborted else None
        except dist.DistError as error:
            reason = f"the rendezvous of the group is gone: {error}"
        if reason is not None:
            raise WeightTransportError(reason)


def _dtype_name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _gloo(store: PrefixStore, rank: int, size: int) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=TIMEOUT_S))


def _nccl(store: PrefixStore, rank: int, size: int) -> Any:
    from torch.distributed import ProcessGroupNCCL  # a torch for CPUs has none

    with _errors_left_to_the_caller():
        group = ProcessGroupNCCL(store, rank, size, ProcessGroupNCCL.Options())
    group.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
    return group


@contextmanager
def _errors_left_to_the_caller() -> Iterator[None]:
    """Let a group made in this context leave its failures to the caller: by default torch ends the process."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
