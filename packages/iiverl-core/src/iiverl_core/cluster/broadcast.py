"""Weights from device to device: broadcasts in a process group of its own, beside the one that training computes in.

Over NCCL between CUDA devices, and over gloo between processes on CPUs.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from iiverl_core.cluster.store import Store
from iiverl_core.cluster.ways import BrokenWayError, Receiver, Sender, Way

PATIENCE_SECONDS = 600.0  # for one bucket, after which something is wrong that nobody has told of
GIVEN_UP = "given up"  # what the exchange holds under this name is why
LOOK_SECONDS = 0.05  # how often one who waits looks there

Ticket: TypeAlias = list[tuple[str, str, tuple[int, ...]]]
"""Name, dtype and shape of each weight of a bucket."""


class Exchange:
    """Where the processes of a group find each other, and hear that it is given up. Implements `Carrier`.

    The group is made anew once it was given up, since a group with a dead member is of no use.
    """

    def __init__(self, host: str) -> None:
        """`host` is this machine's address, at a free port of which the others reach this process."""
        self._host = host
        self._made = 0
        self._current: tuple[Broadcast, TCPStore] | None = None
        self._before: TCPStore | None = None
        """The store of the group that was given up last, where its members may still have to hear of it."""

    def way(self, receivers: int) -> Way:
        """See `Carrier.way`."""
        if self._current is None:
            store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
            self._made += 1
            self._current = Broadcast(self._host, store.port, receivers, self._made), store
        return self._current[0]

    def give_up(self, reason: str) -> None:
        """See `Carrier.give_up`."""
        if self._current is not None:
            self._before = self._current[1]
            self._before.set(GIVEN_UP, reason)
            self._current = None


@dataclass(frozen=True)
class Broadcast:
    """One sender and so many `receivers`, which meet at `host` and `port`. Implements `Way`.

    `number` tells it from others, which may have had the same port before.
    """

    host: str
    port: int
    receivers: int
    number: int

    def sender(self, store: Store, device: torch.device) -> Sender:
        """See `Way.sender`."""
        return _Sender(Member(self, 0, device))

    def receiver(self, number: int, store: Store, device: torch.device) -> Receiver:
        """See `Way.receiver`."""
        return _Receiver(Member(self, 1 + number, device), device)

    def exchange(self) -> TCPStore:
        """Connect to the exchange."""
        return TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=PATIENCE_SECONDS))


class Member:
    """A process's membership of the group, rank 0 being the sender. Joins and broadcasts on threads, one at a time.

    So nobody is held up by a member that has died: who waits (`wait`) looks at the exchange meanwhile, and stops when
    the group is given up there. Those who gave it up are the members whose own part failed, which gloo lets fail when
    a connection closes; and the process that directs all others, which hears of the death of a process from who
    started it, while NCCL would wait on. `close` aborts what runs: NCCL's kernels end then, and a thread that is stuck
    in gloo, or in joining, stays until its patience ends, with nobody waiting for it.
    """

    def __init__(self, way: Broadcast, rank: int, device: torch.device) -> None:
        self._way, self._rank, self._device = way, rank, device
        self._news = way.exchange()  # the thread may be waiting on a connection of its own
        self._group: Any = None
        self._closed = False
        self._running: threading.Thread | None = None
        self._start(self._join)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Begin to broadcast contiguous tensors from the sender's memory into that of the others, in their order."""
        self._start(lambda: self._broadcast(tensors))

    def wait(self) -> None:
        """Wait until all that was begun is finished.

        Raises:
            BrokenWayError: it will not be, since the group was given up.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._running is not None and self._running.is_alive():
            self._running.join(LOOK_SECONDS)
            self._look()
            if time.monotonic() > deadline:
                self._give_up(f"nothing came within {PATIENCE_SECONDS:.0f} s")
        self._look()

    def close(self) -> None:
        """Leave the group, in the middle of whatever it does."""
        self._closed = True
        if self._group is not None:
            self._group.abort()

    def _start(self, job: Callable[[], None]) -> None:
        before = self._running

        def run() -> None:
            if before is not None:
                before.join()
            if self._closed:
                return
            try:
                job()
            except Exception as error:  # whatever it is, the others must hear of it
                if not self._closed:
                    self._give_up(f"{type(error).__name__}: {error}")

        self._running = threading.Thread(target=run, name="broadcast", daemon=True)
        self._running.start()

    def _join(self) -> None:
        store, size = self._way.exchange(), 1 + self._way.receivers
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

    def _give_up(self, reason: str) -> None:
        try:
            self._news.set(GIVEN_UP, f"in member {self._rank} of the group, {reason}")
        except dist.DistError as error:
            raise BrokenWayError(f"the exchange of the group is gone, and {reason}") from error

    def _look(self) -> None:
        try:
            reason = self._news.get(GIVEN_UP).decode() if self._news.check([GIVEN_UP]) else None
        except dist.DistError as error:
            reason = f"the exchange of the group is gone: {error}"
        if reason is not None:
            raise BrokenWayError(reason)


def _gloo(store: PrefixStore, rank: int, size: int) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=PATIENCE_SECONDS))


def _nccl(store: PrefixStore, rank: int, size: int) -> Any:
    from torch.distributed import ProcessGroupNCCL  # a torch for CPUs has none

    with _no_process_ends_for_it():
        group = ProcessGroupNCCL(store, rank, size, ProcessGroupNCCL.Options())
    group.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
    return group


@contextmanager
def _no_process_ends_for_it() -> Iterator[None]:
    """Have a group made now whose failures are left to who waits: by default torch ends a process over any of them."""
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


@dataclass(frozen=True)
class _Sender:
    member: Member

    def ready(self) -> None:
        self.member.wait()

    def take(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        return name, value.detach().clone(memory_format=torch.contiguous_format)

    def send(self, bucket: Sequence[tuple[str, Tensor]]) -> Ticket:
        self.member.broadcast([value for _, value in bucket])
        return [(name, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in bucket]

    def close(self) -> None:
        self.member.close()


@dataclass(frozen=True)
class _Receiver:
    member: Member
    device: torch.device

    def receive(self, ticket: Ticket) -> Iterator[tuple[str, Tensor]]:
        tensors = [
            torch.empty(shape, dtype=getattr(torch, dtype), device=self.device) for _, dtype, shape in ticket
        ]
        if self.device.type == "cuda":
            # What had this memory before may still be read on this thread's stream; they are written on another.
            torch.cuda.current_stream().synchronize()
        self.member.broadcast(tensors)
        self.member.wait()
        return zip([name for name, _, _ in ticket], tensors, strict=True)

    def close(self) -> None:
        self.member.close()
