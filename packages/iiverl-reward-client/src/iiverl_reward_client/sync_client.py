"""The synchronous client: a `RewardClient` on an event loop in its own thread."""

import asyncio
import concurrent.futures
import threading
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from iiverl_reward_client.client import RewardClient
from iiverl_reward_client.dialects import Capabilities
from iiverl_reward_client.outcomes import Failed, Outcome
from iiverl_reward_client.sample import RewardSample, checked

T = TypeVar("T")


class SyncRewardClient:
    """Wraps a `RewardClient` in methods that any thread may call. It owns the client and closes it.

    The client must not have been used before. The thread is a daemon, so a program may exit without `close`.
    """

    def __init__(self, client: RewardClient) -> None:
        self.client = client
        self._loop = asyncio.new_event_loop()
        self._arrived: deque[tuple[RewardSample, concurrent.futures.Future[Outcome]]] = deque()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="iiverl-reward-client", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"Sync{self.client!r}"

    def submit(self, sample: RewardSample) -> concurrent.futures.Future[Outcome]:
        """Queue a sample and return a future of its outcome. Cancelling the future drops the sample.

        Raises:
            TypeError: `sample` is not a `RewardSample`.
            RuntimeError: the client is closed.
        """
        checked(sample)
        future: concurrent.futures.Future[Outcome] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the reward client is closed")
            self._arrived.append((sample, future))
            if len(self._arrived) == 1:  # otherwise the loop has been woken already
                self._loop.call_soon_threadsafe(self._take_arrived)
        return future

    def score(self, sample: RewardSample) -> Outcome:
        """Score one sample."""
        return self.submit(sample).result()

    def score_batch(self, samples: Iterable[RewardSample]) -> list[Outcome]:
        """Score samples and return their outcomes in the same order.

        Raises:
            TypeError: one of them is not a `RewardSample`; none is sent then.
        """
        futures = list(map(self.submit, [checked(sample) for sample in samples]))
        return [future.result() for future in futures]

    def score_stream(self, samples: Iterable[RewardSample]) -> Iterator[tuple[RewardSample, Outcome]]:
        """Score samples, all submitted at once, and yield each with its outcome as it finishes.

        Raises:
            TypeError: one of them is not a `RewardSample`; none is sent then.
        """
        sample_of = {self.submit(sample): sample for sample in [checked(sample) for sample in samples]}
        finished = concurrent.futures.as_completed(sample_of)
        return ((sample_of[future], future.result()) for future in finished)

    def capabilities(self) -> dict[str, Capabilities | Failed | None]:
        """Query the capabilities of each server; None for one without `/v1/rewards`."""
        return self._await(self.client.capabilities())

    def ping(self) -> dict[str, float | Failed]:
        """Ping each server; return the seconds it took to answer, or the failure."""
        return self._await(self.client.ping())

    def close(self) -> None:
        """Close the connections, end the thread, and cancel futures without an outcome."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self.client.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            work.close()
            raise RuntimeError("the reward client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _take_arrived(self) -> None:
        """Submit the samples that arrived since the loop was woken."""
        with self._lock:
            arrived = list(self._arrived)
            self._arrived.clear()
        for sample, future in arrived:
            if self._closed:
                future.cancel()
                continue
            try:
                _link(self.client.submit(sample), future)
            except Exception as error:  # other samples are not affected
                future.set_exception(error)


def _link(inner: asyncio.Future[Outcome], outer: concurrent.futures.Future[Outcome]) -> None:
    """Resolve the future that other threads hold from the loop's future."""

    def decide(done: asyncio.Future[Outcome]) -> None:
        if done.cancelled():
            outer.cancel()
        elif not outer.set_running_or_notify_cancel():
            return
        elif (error := done.exception()) is not None:
            outer.set_exception(error)
        else:
            outer.set_result(done.result())

    inner.add_done_callback(decide)
