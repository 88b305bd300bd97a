"""Weights on their way from the processes that train to engines in other processes: in buckets of bounded size."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from iiverl_core.cluster.ways import Sender


class Departing:
    """The named weights of a model, which leave in buckets of at least `size` bytes, the last one excepted.

    Every process of a sharded model has to take the same part: each whole tensor is gathered from all of them.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]], sender: Sender | None) -> None:
        """A process without a `sender` only takes part."""
        self._weights = iter(weights)
        self._sender = sender
        self._sent = 0

    def next(self, size: int) -> Any:
        """Gather and send the next bucket and give its ticket; None after the last, and where this process sends nothing."""
        if self._sender is not None and self._sent:
            self._sender.ready()
        bucket: list[Any] = []
        held = 0
        for name, value in self._weights:
            held += value.nbytes
            if self._sender is not None:
                bucket.append(self._sender.take(name, value))
            if held >= size:
                break
        if self._sender is None or not bucket:
            return None
        self._sent += 1
        return self._sender.send(bucket)


class DroppedError(Exception):
    """An update that will not be finished, since others have not got theirs."""


class Arriving:
    """Feeds buckets, which come one call at a time, to an engine that asks for one weight after the other.

    The engine's update runs on a thread and waits for the next bucket. `feed` returns once the engine has taken all of
    it, so no more than one is here at a time.
    """

    def __init__(self, update: Callable[[Iterator[tuple[str, Tensor]]], None]) -> None:
        self._buckets: queue.Queue[Iterable[tuple[str, Tensor]] | DroppedError | None] = queue.Queue(
            maxsize=1
        )
        self._taken = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(update,), name="weights", daemon=True)
        self._thread.start()

    def feed(self, bucket: Iterable[tuple[str, Tensor]]) -> None:
        """Hand over a bucket; raises what the update raised."""
        self._check()
        self._taken.clear()
        self._put(bucket)
        while not self._taken.wait(0.1):
            self._check()
        self._check()

    def finish(self) -> None:
        """Wait until the engine has all weights; raises what the update raised."""
        self._put(None)
        self._thread.join()
        self._check()

    def drop(self) -> None:
        """Let the update fail where it waits for more, and wait until it has."""
        while self._thread.is_alive():
            try:
                self._buckets.put(DroppedError(), timeout=0.1)
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

    def _run(self, update: Callable[[Iterator[tuple[str, Tensor]]], None]) -> None:
        try:
            update(self._weights())
        except BaseException as error:  # whatever it is, the one who feeds must hear of it
            self._error = error
        finally:
            self._taken.set()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        while (bucket := self._buckets.get()) is not None:
            if isinstance(bucket, DroppedError):
                raise bucket
            yield from bucket
            del bucket  # nothing of it stays while the next one is waited for
            self._taken.set()
