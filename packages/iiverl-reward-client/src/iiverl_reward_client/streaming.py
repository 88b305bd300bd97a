"""Outcomes as they come, of samples that may still be coming themselves."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable

from iiverl_reward_client.outcomes import Outcome
from iiverl_reward_client.sample import RewardSample


async def stream(
    samples: Iterable[RewardSample] | AsyncIterable[RewardSample],
    submit: Callable[[RewardSample], asyncio.Future[Outcome]],
    window: int,
) -> AsyncIterator[tuple[RewardSample, Outcome]]:
    """Submit samples as they come, `window` at most without an outcome that was taken, and give each as it finishes."""
    finished: asyncio.Queue[tuple[RewardSample, asyncio.Future[Outcome]] | None] = asyncio.Queue()
    room = asyncio.Semaphore(window)
    under_way: set[asyncio.Future[Outcome]] = set()
    taken = 0

    def finish(sample: RewardSample, future: asyncio.Future[Outcome]) -> None:
        under_way.discard(future)
        finished.put_nowait((sample, future))

    async def feed() -> int:
        count = 0
        async for sample in _asynchronous(samples):
            await room.acquire()
            future = submit(sample)
            under_way.add(future)
            future.add_done_callback(lambda done, sample=sample: finish(sample, done))
            count += 1
        return count

    feeder = asyncio.create_task(feed())
    feeder.add_done_callback(lambda _: finished.put_nowait(None))
    try:
        while not feeder.done() or taken < feeder.result():
            item = await finished.get()
            if item is None:
                continue
            sample, future = item
            taken += 1
            room.release()
            yield sample, future.result()
    finally:
        feeder.cancel()
        for future in list(under_way):
            future.cancel()


async def _asynchronous(
    samples: Iterable[RewardSample] | AsyncIterable[RewardSample],
) -> AsyncIterator[RewardSample]:
    if isinstance(samples, AsyncIterable):
        async for sample in samples:
            yield sample
    else:
        for sample in samples:
            yield sample
