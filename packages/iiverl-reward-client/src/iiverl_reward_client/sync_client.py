"""The synchronous face: the same client on an event loop in a thread of its own."""

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
    """Gives a `RewardClient` methods that any thread may call. It takes the client over, and closes it.

    The client must not have been used before. The thread is a daemon: a program may end without `close`.
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
        """Take a sample and return at once; the future will hold its outcome. Cancelling it drops the sample.

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
            if len(self._arrived) == 1:  # else the loop has been woken for those before
                self._loop.call_soon_threadsafe(self._take_arrived)
        return future

    def score(self, sample: RewardSample) -> Outcome:
        """Score one sample."""
        return self.submit(sample).result()

    def score_batch(self, samples: Iterable[RewardSample]) -> list[Outcome]:
        """Score samples and give their outcomes in the same order.

        Raises:
            TypeError: one of them is not a `RewardSample`; then none is sent.
        """
        futures = list(map(self.submit, [checked(sample) for sample in samples]))
        return [future.result() for future in futures]

    def score_stream(self, samples: Iterable[RewardSample]) -> Iterator[tuple[RewardSample, Outcome]]:
        """Score samples, all submitted at once, and give each with its outcome as it finishes.

        Raises:
            TypeError: one of them is not a `RewardSample`; then none is sent.
        """
        sample_of = {self.submit(sample): sample for sample in [checked(sample) for sample in samples]}
        finished = concurrent.futures.as_completed(sample_of)
        return ((sample_of[future], future.result()) for future in finished)

    def capabilities(self) -> dict[str, Capabilities | Failed | None]:
        """Ask every server what it can do: None where it does not speak `/v1/rewards`."""
        return self._await(self.client.capabilities())

    def ping(self) -> dict[str, float | Failed]:
        """See which servers answer: the seconds that took, or why there was no answer."""
        return self._await(self.client.ping())

    def close(self) -> None:
        """Close the connections and end the thread; futures without an outcome are cancelled."""
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
        """Hand over what was submitted since the loop was woken."""
        with self._lock:
            arrived = list(self._arrived)
            self._arrived.clear()
        for sample, future in arrived:
            if self._closed:
                future.cancel()
                continue
            try:
                _link(self.client.submit(sample), future)
            except Exception as error:  # one sample's fault keeps no other from being scored
                future.set_exception(error)


def _link(inner: asyncio.Future[Outcome], outer: concurrent.futures.Future[Outcome]) -> None:
    """Let the future of the loop decide the one that other threads hold."""

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
