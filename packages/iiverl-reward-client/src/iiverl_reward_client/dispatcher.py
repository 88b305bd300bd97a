"""Schedule samples: the queue between those who submit samples and the servers.

Every submitted sample comes to exactly one outcome. There is no background chatter: servers are probed only while
samples wait.
"""

import asyncio
import math
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import httpx

from iiverl_reward_client.addresses import Secrets
from iiverl_reward_client.cache import ScoreCache
from iiverl_reward_client.dialects import V1, Attempt, Dialect, ProtocolName, after_failure
from iiverl_reward_client.endpoint import Endpoint, RequestPermit
from iiverl_reward_client.exchange import Sender, failure_of
from iiverl_reward_client.outcomes import Failed, Outcome, Scored
from iiverl_reward_client.probing import Missed, probe
from iiverl_reward_client.protocol import failure_of_status
from iiverl_reward_client.retrying import Retries, RetryBudget, Timeouts, retry_after
from iiverl_reward_client.sample import RewardSample

# Refusals that may be one sample's fault: the others of its request deserve to be sent without it.
_PERHAPS_ONE_SAMPLE = (400, 413, 422)


@dataclass(frozen=True, slots=True)
class Settings:
    """How samples are sent; `RewardClient` explains each."""

    protocol: ProtocolName
    timeouts: Timeouts
    retries: Retries
    batch_size: int
    server_version: str | None


@dataclass(slots=True, eq=False)
class _Job:
    """A sample on its way: how often it was sent, and what happened last."""

    sample: RewardSample
    future: asyncio.Future[Outcome]
    attempts: int = 0
    started: float = 0.0
    alone: bool = False
    failure: Failed | None = None
    failed_at: Endpoint | None = None
    expiry: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """One request: where it goes, and the samples in it, each with what is sent of it."""

    endpoint: Endpoint
    permit: RequestPermit
    dialect: Dialect
    jobs: list[_Job]
    items: list[tuple[str, ...]]


class Dispatcher:
    """Sends samples to endpoints, and again where that may help. Belongs to one event loop."""

    def __init__(
        self,
        endpoints: list[Endpoint],
        sender: Sender,
        settings: Settings,
        max_workers: int,
        cache: ScoreCache | None,
        secrets: Secrets,
    ) -> None:
        self.max_workers = max_workers
        self._endpoints = endpoints
        self._sender = sender
        self._settings = settings
        self._cache = cache
        self._secrets = secrets
        self._budget = RetryBudget(settings.retries)
        self._queue: deque[_Job] = deque()
        self._unfinished: set[asyncio.Future[Outcome]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pump_due = False
        self._wake: asyncio.TimerHandle | None = None
        self._outage: asyncio.TimerHandle | None = None

    def submit(self, sample: RewardSample) -> asyncio.Future[Outcome]:
        """Take a sample and return at once; the future will hold its outcome.

        Raises:
            RuntimeError: another event loop has used this before.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("a RewardClient belongs to one event loop; make another one for this loop")
        if not self._unfinished:
            self._budget.reset()
        self._budget.add_sample()
        job = _Job(sample, loop.create_future())
        self._unfinished.add(job.future)
        job.future.add_done_callback(self._unfinished.discard)
        self._queue.append(job)
        self._pump_soon()
        return job.future

    async def aclose(self) -> None:
        """End all requests; what has no outcome yet is cancelled."""
        for timer in (self._wake, self._outage):
            if timer is not None:
                timer.cancel()
        self._queue.clear()
        for future in list(self._unfinished):
            future.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Choosing what to send where.

    def _pump_soon(self) -> None:
        # Put off until the others of this turn of the loop have spoken, so that samples submitted together can share
        # requests.
        if not self._pump_due and self._loop is not None:
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Send as much as can be sent."""
        self._pump_due = False
        try:
            while (order := self._next_order()) is not None:
                self._spawn(self._work(order))
        except Exception as error:
            self._fail_waiting(error)

    async def _work(self, order: _Order | None) -> None:
        """Send one request, and then the next as long as there is one."""
        while order is not None:
            await self._send(order)
            try:
                order = self._next_order()
            except Exception as error:
                self._fail_waiting(error)
                return
            if self._queue and self._in_flight < self.max_workers:
                self._pump_soon()

    def _next_order(self) -> _Order | None:
        """Take the next request off the queue, if one can be sent now."""
        assert self._loop is not None
        while self._in_flight < self.max_workers and (job := self._head()) is not None:
            # One moment for all three decisions: a pause that ends between two of them would be seen by neither.
            now = self._loop.time()
            self._probe_where_due(now)
            endpoint = self._choose(job, now)
            if endpoint is None:
                self._wait_for_a_server(now)
                return None
            assert endpoint.dialect is not None
            jobs, items = self._take(endpoint, endpoint.dialect)
            if jobs:
                self._in_flight += 1
                return _Order(endpoint, endpoint.begin(now), endpoint.dialect, jobs, items)
        return None

    def _head(self) -> _Job | None:
        """Look at the next sample that still wants an outcome."""
        while self._queue and self._queue[0].future.done():
            self._queue.popleft()
        return self._queue[0] if self._queue else None

    def _choose(self, job: _Job, now: float) -> Endpoint | None:
        """Choose the server with the fewest requests under way, another than the one where the sample failed."""
        free = [endpoint for endpoint in self._endpoints if endpoint.room(now, self.max_workers) > 0]
        return min(free, key=lambda e: (e is job.failed_at, e.in_flight, e.last_used), default=None)

    def _take(self, endpoint: Endpoint, dialect: Dialect) -> tuple[list[_Job], list[tuple[str, ...]]]:
        """Take the samples of one request off the queue: as many as spread what waits over the free requests."""
        assert self._loop is not None
        most, most_bytes = 1, math.inf
        if dialect.batches:
            free = self.max_workers - self._in_flight
            most = min(self._settings.batch_size, math.ceil(len(self._queue) / free))
            if endpoint.capabilities is not None:
                most = min(most, endpoint.capabilities.max_batch or most)
                most_bytes = endpoint.capabilities.max_body_bytes or most_bytes
        jobs: list[_Job] = []
        items: list[tuple[str, ...]] = []
        size = 64  # what stands around the items
        while len(jobs) < most and (job := self._head()) is not None:
            if jobs and job.alone:
                break
            try:
                item = dialect.item(job.sample)
            except (
                Exception
            ) as error:  # a caller's mapping may raise anything, and costs no other sample its score
                detail = f"the sample cannot be sent: {str(error) or type(error).__name__}"
                self._finish(job, Failed("bad_request", job.attempts, detail))
                continue
            if self._from_cache(endpoint, job):
                continue
            size += sum(map(len, item)) + len(item)
            if jobs and size > most_bytes:
                break
            self._queue.popleft()
            job.attempts += 1
            job.started = job.started or self._loop.time()
            jobs.append(job)
            items.append(item)
            if job.alone:
                break
        return jobs, items

    # Sending, and what comes of it.

    async def _send(self, order: _Order) -> None:
        """Send one request, and see to its samples."""
        try:
            attempts = await self._ask(order)
            for job, attempt in zip(order.jobs, attempts, strict=True):
                self._settle(job, attempt, order.endpoint)
        except Exception as error:  # a fault of the program, for those who wait to see
            for job in order.jobs:
                if not job.future.done():
                    job.future.set_exception(error)
        finally:
            order.endpoint.in_flight -= 1
            self._in_flight -= 1

    async def _ask(self, order: _Order) -> list[Attempt]:
        """Send one request, tell the endpoint how it went, and give what it came to for each sample."""
        assert self._loop is not None
        endpoint, dialect, jobs = order.endpoint, order.dialect, order.jobs
        body = dialect.body(order.items).encode()
        try:
            response = await self._sender.post(endpoint.address, dialect.path, body)
        except httpx.RequestError as error:
            return [self._refused(order, failure_of(error), None)] * len(jobs)
        status, content = response.status_code, response.content
        if status != 200:
            attempt = self._refused(
                order, failure_of_status(status, content), retry_after(response.headers.get("Retry-After"))
            )
            if len(jobs) > 1 and status in _PERHAPS_ONE_SAMPLE:
                attempt = replace(attempt, alone=True)
            return [attempt] * len(jobs)
        self._succeeded(endpoint, order.permit)
        reading = dialect.read(content, [job.sample for job in jobs])
        if any(_is_overload(attempt) for attempt in reading.attempts):
            endpoint.slow_down(order.permit, self._loop.time(), self.max_workers)
        attempts = [self._told(endpoint, attempt) for attempt in reading.attempts]
        self._to_cache(endpoint, reading.server_version, jobs, attempts)
        return attempts

    def _refused(self, order: _Order, failure: Failed, wait: float | None) -> Attempt:
        """Tell the endpoint that a whole request failed, and give what that means for each of its samples."""
        assert self._loop is not None
        now, endpoint = self._loop.time(), order.endpoint
        failure = self._named(endpoint, failure)
        attempt = after_failure(failure)
        if not attempt.retry:
            self._succeeded(endpoint, order.permit)  # a server that refuses is at work
            return attempt
        endpoint.failed(order.permit, now, failure)
        if failure.kind in ("overload", "timeout"):
            endpoint.slow_down(order.permit, now, self.max_workers)
        if wait is not None:
            endpoint.pause(now + wait)
        return attempt

    def _settle(self, job: _Job, attempt: Attempt, endpoint: Endpoint) -> None:
        """Finish a sample, or see that it is sent again."""
        assert self._loop is not None
        if job.future.done():
            return
        if isinstance(attempt.outcome, Scored):
            self._finish(job, attempt.outcome)
            return
        if attempt.alone:
            job.alone = True
            job.attempts -= 1  # the request was refused, and nobody knows yet whether for this sample
            self._queue.appendleft(job)
            return
        retries = self._settings.retries
        job.failure = replace(attempt.outcome, attempts=job.attempts)
        job.failed_at = endpoint
        if not attempt.retry or job.attempts > retries.limit:
            self._finish(job, job.failure)
            return
        if not self._budget.spend():
            detail = f"{job.failure.detail}; not sent again, as the batch has used up its retries"
            self._finish(job, replace(job.failure, detail=detail))
            return
        if job.expiry is None:
            job.expiry = self._loop.call_at(job.started + self._settings.timeouts.sample, self._expire, job)
        self._loop.call_later(
            max(retries.delay(job.attempts), attempt.retry_after or 0.0), self._requeue, job
        )

    def _requeue(self, job: _Job) -> None:
        if not job.future.done():
            self._queue.appendleft(job)
            self._pump_soon()

    def _expire(self, job: _Job) -> None:
        """Give a sample up whose time is over, wherever it is."""
        if not job.future.done() and job.failure is not None:
            seconds = self._settings.timeouts.sample
            detail = f"{job.failure.detail}; given up {seconds:g} s after the first attempt"
            self._finish(job, replace(job.failure, attempts=job.attempts, detail=detail))

    def _finish(self, job: _Job, outcome: Outcome) -> None:
        if job.expiry is not None:
            job.expiry.cancel()
        if not job.future.done():
            job.future.set_result(outcome)

    def _told(self, endpoint: Endpoint, attempt: Attempt) -> Attempt:
        """Hide what is secret from whoever reads an outcome, and name the server in a failure."""
        outcome = attempt.outcome
        if isinstance(outcome, Failed):
            return replace(attempt, outcome=self._named(endpoint, outcome))
        if outcome.info:
            return replace(attempt, outcome=replace(outcome, info=self._secrets.hide_in(outcome.info)))
        return attempt

    def _named(self, endpoint: Endpoint, failure: Failed) -> Failed:
        return replace(failure, detail=f"{endpoint.address.shown}: {self._secrets.hide(failure.detail)}")

    # Servers that are away.

    def _succeeded(self, endpoint: Endpoint, permit: RequestPermit) -> None:
        endpoint.succeeded(permit, self.max_workers)
        if self._outage is not None:
            self._outage.cancel()
            self._outage = None

    def _probe_where_due(self, now: float) -> None:
        for endpoint in self._endpoints:
            if endpoint.wants_probe(now):
                endpoint.probing = True
                self._spawn(self._probe(endpoint))

    async def _probe(self, endpoint: Endpoint) -> None:
        assert self._loop is not None
        try:
            seen = await probe(self._sender, endpoint.address, self._settings.protocol)
        except Exception as error:
            self._fail_waiting(error)
            return
        finally:
            endpoint.probing = False
        if isinstance(seen, Missed):
            endpoint.missed(self._loop.time(), self._named(endpoint, seen.failure))
            if seen.wait is not None:
                endpoint.pause(self._loop.time() + seen.wait)
        else:
            endpoint.found(seen.dialect, seen.capabilities)
        self._pump_soon()

    def _wait_for_a_server(self, now: float) -> None:
        """See that the queue goes on when a server comes back, and that it does not wait for ever."""
        assert self._loop is not None
        if any(endpoint.in_use(now) for endpoint in self._endpoints):
            return  # it is busy, and the end of a request will go on
        if self._outage is None:
            self._outage = self._loop.call_later(self._settings.timeouts.sample, self._give_up)
        times = [endpoint.wakes_at() for endpoint in self._endpoints if not endpoint.probing]
        if self._wake is not None:
            self._wake.cancel()
        if times and (first := min(times)) > now:
            self._wake = self._loop.call_at(first, self._pump)

    def _give_up(self) -> None:
        """Fail what waits, when no server could be used for too long."""
        assert self._loop is not None
        self._outage = None
        now = self._loop.time()
        if any(endpoint.in_use(now) for endpoint in self._endpoints):
            return
        last = [e.last_failure for e in self._endpoints if e.last_failure is not None]
        kind = last[0].kind if last else "timeout"
        told = "; ".join(failure.detail for failure in last)
        detail = f"no reward server could be used for {self._settings.timeouts.sample:g} s ({told})"
        while (job := self._head()) is not None:
            self._queue.popleft()
            self._finish(job, Failed(kind, job.attempts, detail))

    def _fail_waiting(self, error: Exception) -> None:
        """Raise a fault of the program where it is seen: in everyone who waits, instead of letting them wait for ever."""
        while (job := self._head()) is not None:
            job.future.set_exception(error)

    # The cache.

    def _from_cache(self, endpoint: Endpoint, job: _Job) -> bool:
        """Finish a sample that this server's version has scored before."""
        version = self._version(endpoint)
        if self._cache is None or version is None:
            return False
        scored = self._cache.get(self._protocol(endpoint), version, job.sample)
        if scored is None:
            return False
        self._queue.popleft()
        self._finish(job, scored)
        return True

    def _to_cache(
        self, endpoint: Endpoint, answered: str | None, jobs: list[_Job], attempts: list[Attempt]
    ) -> None:
        version = answered or self._version(endpoint)
        if self._cache is None or version is None:
            return
        for job, attempt in zip(jobs, attempts, strict=True):
            if isinstance(attempt.outcome, Scored):
                self._cache.put(self._protocol(endpoint), version, job.sample, attempt.outcome)

    def _version(self, endpoint: Endpoint) -> str | None:
        told = endpoint.capabilities.server_version if endpoint.capabilities is not None else None
        return told or self._settings.server_version

    def _protocol(self, endpoint: Endpoint) -> str:
        return "v1" if endpoint.dialect is V1 else self._settings.protocol

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_overload(attempt: Attempt) -> bool:
    return isinstance(attempt.outcome, Failed) and attempt.outcome.kind == "overload"
