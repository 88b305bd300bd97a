"""Weight sync: the actor's weights go from trainer workers to engines in rollout workers, in buckets of bounded size.

While an engine loads a bucket, the next one is gathered and sent, so a rollout worker has at most two.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from iiverl_core.cluster.messages import ReceivedWeights, WeightSync
from iiverl_core.cluster.store import Store
from iiverl_core.cluster.weight_transport import (
    BucketMetadata,
    BucketReceiver,
    BucketSender,
    WeightTransport,
    WeightTransportError,
)

T = TypeVar("T")


class SyncAbortedError(Exception):
    """A weight sync that will not be finished, since it failed in another process."""


class WeightSender:
    """A trainer worker's part in weight syncs.

    All trainer workers take part, since each whole tensor is gathered from all of them, and the one that `sends` passes
    the weights on.
    """

    def __init__(self, store: Store, device: torch.device, *, sends: bool) -> None:
        self._store, self._device, self._sends = store, device, sends
        self._transport: WeightTransport | None = None
        self._endpoint: BucketSender | None = None
        self._weights: Iterator[tuple[str, Tensor]] | None = None
        self._unflushed = False

    def begin(self, weights: Iterable[tuple[str, Tensor]], transport: WeightTransport) -> None:
        """Begin to send a model's named weights, from the first on; a sync that is unfinished is dropped."""
        if transport != self._transport:
            if self._endpoint is not None:
                self._endpoint.close()
            self._endpoint = transport.open_sender(self._store, self._device) if self._sends else None
            self._transport = transport
        self._weights, self._unflushed = iter(weights), False

    def next_bucket(self, size: int) -> BucketMetadata | None:
        """Gather and send the next bucket, of at least `size` bytes unless it is the last, and return its metadata.

        Returns None after the last, and in a worker that does not send.

        Raises:
            WeightTransportError: the bucket before cannot be sent.
        """
        if self._weights is None:
            raise RuntimeError("no weights to send: call begin first")
        if self._endpoint is not None and self._unflushed:
            self._endpoint.flush()
        bucket: list[Any] = []
        held = 0
        for name, value in self._weights:
            held += value.nbytes
            if self._endpoint is not None:
                bucket.append(self._endpoint.pack(name, value))
            if held >= size:
                break
        if self._endpoint is None or not bucket:
            return None
        self._unflushed = True
        return self._endpoint.send(bucket)


class WeightReceiver:
    """A rollout worker's part in weight syncs: receives buckets and feeds them to `update` of its engine."""

    def __init__(
        self,
        index: int,
        store: Store,
        device: torch.device,
        update: Callable[[Iterator[tuple[str, Tensor]], WeightSync], ReceivedWeights],
    ) -> None:
        self._index, self._store, self._device = index, store, device
        self._update = update
        self._transport: WeightTransport | None = None
        self._endpoint: BucketReceiver | None = None
        self._running: StreamedUpdate[ReceivedWeights] | None = None

    def begin(self, sync: WeightSync, transport: WeightTransport) -> None:
        """Expect the weights of a sync; one that is unfinished is aborted."""
        if self._running is not None:
            self._running.abort()
        if transport != self._transport:
            if self._endpoint is not None:
                self._endpoint.close()
            self._endpoint = transport.open_receiver(self._index, self._store, self._device)
            self._transport = transport
        self._running = StreamedUpdate(lambda weights: self._update(weights, sync))

    def load(self, bucket: BucketMetadata) -> str | None:
        """Receive a bucket, and hand it over once the engine has loaded the one before; returns the reason if it cannot arrive.

        Raises what the engine's update raised, maybe with an earlier bucket.
        """
        if self._endpoint is None:
            raise RuntimeError("no weights are expected: call begin first")
        try:
            weights = self._endpoint.receive(bucket)
        except WeightTransportError as error:
            return str(error)
        self._expected().feed(weights)
        return None

    def finish(self) -> ReceivedWeights:
        """Wait until the engine has all weights, and return what it was given; raises what its update raised."""
        received = self._expected().finish()
        self._running = None
        return received

    def _expected(self) -> "StreamedUpdate[ReceivedWeights]":
        if self._running is None:
            raise RuntimeError("no weights are expected: call begin first")
        return self._running


class StreamedUpdate(Generic[T]):
    """Feeds buckets, which come one call at a time, to an `update` that iterates over all weights.

    The update runs on a thread and waits for the next bucket. `feed` returns once all of the bucket before has been taken,
    so there are at most two: one that is being loaded, and one that arrives meanwhile.
    """

    def __init__(self, update: Callable[[Iterator[tuple[str, Tensor]]], T]) -> None:
        self._result: T
        self._buckets: queue.Queue[Iterable[tuple[str, Tensor]] | SyncAbortedError | None] = queue.Queue(
            maxsize=1
        )
        self._taken = threading.Event()
        self._taken.set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(update,), name="weights", daemon=True)
        self._thread.start()

    def feed(self, bucket: Iterable[tuple[str, Tensor]]) -> None:
        """Hand over a bucket once the one before is taken; raises what the update raised."""
        while not self._taken.wait(0.1):
            self._check()
        self._check()
        self._taken.clear()
        self._put(bucket)

    def finish(self) -> T:
        """Wait until the update has all weights, and return its result; raises what it raised."""
        self._put(None)
        self._thread.join()
        self._check()
        return self._result

    def abort(self) -> None:
        """Raise `SyncAbortedError` in the update where it waits for more, and wait until it has ended."""
        while self._thread.is_alive():
            try:
                self._buckets.put(SyncAbortedError(), timeout=0.1)
            except queue.Full:
                continue
            self._thread.join()

    def _put(self, item: Iterable[tuple[str, Tensor]] | None) -> None:
        while True:
            self._check()
            try:
                return self._buckets.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, update: Callable[[Iterator[tuple[str, Tensor]]], T]) -> None:
        try:
            self._result = update(self._weights())
        except BaseException as error:  # of any type: whoever feeds must learn of it
            self._error = error
        finally:
            self._taken.set()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        while (bucket := self._buckets.get()) is not None:
            if isinstance(bucket, SyncAbortedError):
                raise bucket
            yield from bucket
            if torch.cuda.is_initialized():
                # The next bucket may get this one's memory, from another thread and on another stream.
                torch.cuda.synchronize()
            del bucket  # nothing of it stays while the next one is awaited
            self._taken.set()
