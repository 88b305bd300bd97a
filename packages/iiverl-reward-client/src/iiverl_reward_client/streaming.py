"""Stream outcomes as they finish, while samples are still arriving."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable

from iiverl_reward_client.outcomes import Outcome
from iiverl_reward_client.sample import RewardSample


async def stream(
    samples: Iterable[RewardSample] | AsyncIterable[RewardSample],
    submit: Callable[[RewardSample], asyncio.Future[Outcome]],
    window: int,
) -> AsyncIterator[tuple[RewardSample, Outcome]]:
    """Submit samples as they arrive, with at most `window` outcomes not yet consumed, and yield each as it finishes."""
    finished: asyncio.Queue[tuple[RewardSample, asyncio.Future[Outcome]] | None] = asyncio.Queue()
    slots = asyncio.Semaphore(window)
    pending: set[asyncio.Future[Outcome]] = set()
    consumed = 0

    def finish(sample: RewardSample, future: asyncio.Future[Outcome]) -> None:
        pending.discard(future)
        finished.put_nowait((sample, future))

    async def feed() -> int:
        count = 0
        async for sample in _asynchronous(samples):
            await slots.acquire()
            future = submit(sample)
            pending.add(future)
            future.add_done_callback(lambda done, sample=sample: finish(sample, done))
            count += 1
        return count

    feeder = asyncio.create_task(feed())
    feeder.add_done_callback(lambda _: finished.put_nowait(None))
    try:
        while not feeder.done() or consumed < feeder.result():
            item = await finished.get()
            if item is None:
                continue
            sample, future = item
            consumed += 1
            slots.release()
            yield sample, future.result()
    finally:
        feeder.cancel()
        for future in list(pending):
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
