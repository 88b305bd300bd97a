"""Schedule samples: the queue between callers and servers.

Every submitted sample gets exactly one outcome. Servers are probed only while samples wait.
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
from iiverl_reward_client.outcomes import Failed, FailureKind, Outcome, Scored
from iiverl_reward_client.probing import Missed, probe
from iiverl_reward_client.protocol import failure_of_status, shortened
from iiverl_reward_client.retrying import Retries, RetryBudget, Timeouts, retry_after
from iiverl_reward_client.sample import RewardSample

# A single sample may have caused these; the others of the request are sent without it.
_PERHAPS_ONE_SAMPLE = (400, 413, 422)
_MAX_DETAIL = 2000


@dataclass(frozen=True, slots=True)
class DispatchOptions:
    """Options for sending samples, see `RewardClient`."""

    protocol: ProtocolName
    timeouts: Timeouts
    retries: Retries
    batch_size: int
    server_version: str | None


@dataclass(slots=True, eq=False)
class _Job:
    """A submitted sample: how often it was sent, and its last failure."""

    sample: RewardSample
    future: asyncio.Future[Outcome]
    attempts: int = 0
    started: float = 0.0
    alone: bool = False
    failure: Failed | None = None
    failed_at: Endpoint | None = None
    expiry: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """One request: its destination, and its samples with their encoded items."""

    endpoint: Endpoint
    permit: RequestPermit
    dialect: Dialect
    jobs: list[_Job]
    items: list[tuple[str, ...]]


class Dispatcher:
    """Sends samples to endpoints, and retries them. Belongs to one event loop."""

    def __init__(
        self,
        endpoints: list[Endpoint],
        sender: Sender,
        options: DispatchOptions,
        max_workers: int,
        cache: ScoreCache | None,
        secrets: Secrets,
    ) -> None:
        self.max_workers = max_workers
        self._endpoints = endpoints
        self._sender = sender
        self._options = options
        self._cache = cache
        self._secrets = secrets
        self._budget = RetryBudget(options.retries)
        self._queue: deque[_Job] = deque()
        self._unfinished: set[asyncio.Future[Outcome]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pump_due = False
        self._wake: asyncio.TimerHandle | None = None
        self._outage: asyncio.TimerHandle | None = None

    def submit(self, sample: RewardSample) -> asyncio.Future[Outcome]:
        """Queue a sample and return a future of its outcome.

        Raises:
            RuntimeError: the client belongs to another event loop.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RuntimeError("a RewardClient belongs to one event loop; create another one for this loop")
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
        """End all requests, and cancel futures without an outcome."""
        for timer in (self._wake, self._outage):
            if timer is not None:
                timer.cancel()
        self._queue.clear()
        for future in list(self._unfinished):
            future.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Scheduling.

    def _pump_soon(self) -> None:
        # Deferred to the next iteration of the loop, so that samples submitted together can share requests.
        if not self._pump_due and self._loop is not None:
            self._pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        try:
            while (request := self._next_request()) is not None:
                self._spawn(self._work(request))
        except Exception as error:
            self._fail_waiting(error)

    async def _work(self, request: _Request | None) -> None:
        """Send a request, and further ones as long as there are any."""
        while request is not None:
            await self._send(request)
            try:
                request = self._next_request()
            except Exception as error:
                self._fail_waiting(error)
                return
            if self._queue and self._in_flight < self.max_workers:
                self._pump_soon()

    def _next_request(self) -> _Request | None:
        """Take the next request from the queue, if one can be sent now."""
        assert self._loop is not None
        while self._in_flight < self.max_workers and (job := self._head()) is not None:
            # The same time for all three decisions: none would notice a pause that ends between two of them.
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
                return _Request(endpoint, endpoint.begin(now), endpoint.dialect, jobs, items)
        return None

    def _head(self) -> _Job | None:
        """Return the next sample without an outcome."""
        while self._queue and self._queue[0].future.done():
            self._queue.popleft()
        return self._queue[0] if self._queue else None

    def _choose(self, job: _Job, now: float) -> Endpoint | None:
        """Choose the server with the fewest requests in flight, preferably not the one where the sample failed."""
        free = [endpoint for endpoint in self._endpoints if endpoint.room(now, self.max_workers) > 0]
        return min(free, key=lambda e: (e is job.failed_at, e.in_flight, e.last_used), default=None)

    def _take(self, endpoint: Endpoint, dialect: Dialect) -> tuple[list[_Job], list[tuple[str, ...]]]:
        """Take the samples of one request from the queue, so many that the queue is spread over all free requests."""
        assert self._loop is not None
        most, most_bytes = 1, math.inf
        if dialect.batches:
            free = self.max_workers - self._in_flight
            most = min(self._options.batch_size, math.ceil(len(self._queue) / free))
            if endpoint.capabilities is not None:
                most = min(most, endpoint.capabilities.max_batch or most)
                most_bytes = endpoint.capabilities.max_body_bytes or most_bytes
        jobs: list[_Job] = []
        items: list[tuple[str, ...]] = []
        size = 64  # bytes around the items
        while len(jobs) < most and (job := self._head()) is not None:
            if jobs and job.alone:
                break
            try:
                item = dialect.item(job.sample)
            except (
                Exception
            ) as error:  # a caller's mapping may raise anything; other samples are not affected
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

    # Sending.

    async def _send(self, request: _Request) -> None:
        """Send one request, and finish or retry its samples."""
        try:
            attempts = await self._ask(request)
            for job, attempt in zip(request.jobs, attempts, strict=True):
                self._finish_or_retry(job, attempt, request.endpoint)
        except Exception as error:  # a bug, which the callers must see
            for job in request.jobs:
                if not job.future.done():
                    job.future.set_exception(error)
        finally:
            request.endpoint.in_flight -= 1
            self._in_flight -= 1

    async def _ask(self, request: _Request) -> list[Attempt]:
        """Send one request, update the endpoint, and return an attempt per sample."""
        assert self._loop is not None
        endpoint, dialect, jobs = request.endpoint, request.dialect, request.jobs
        body = dialect.body(request.items).encode()
        try:
            response = await self._sender.post(endpoint.address, dialect.path, body)
        except httpx.RequestError as error:
            attempt = self._refused(request, failure_of(error), None)
            # One slow sample makes a whole request late; the others do not have to wait for it again.
            return [replace(attempt, alone=_is(attempt, "timeout") and len(jobs) > 1)] * len(jobs)
        status, content = response.status_code, response.content
        if status != 200 and response.headers.get("X-Should-Retry") == "false":
            # The server is up; the sample is what failed.
            self._succeeded(endpoint, request.permit)
            return [Attempt(self._named(endpoint, failure_of_status(status, content)))] * len(jobs)
        if status != 200:
            attempt = self._refused(
                request, failure_of_status(status, content), retry_after(response.headers.get("Retry-After"))
            )
            if len(jobs) > 1 and status in _PERHAPS_ONE_SAMPLE:
                attempt = replace(attempt, alone=True)
            return [attempt] * len(jobs)
        self._succeeded(endpoint, request.permit)
        reading = dialect.read(content, [job.sample for job in jobs])
        if any(_is(attempt, "overload") for attempt in reading.attempts):
            endpoint.slow_down(request.permit, self._loop.time(), self.max_workers)
        attempts = [self._sanitize(endpoint, attempt) for attempt in reading.attempts]
        self._to_cache(endpoint, reading.server_version, jobs, attempts)
        return attempts

    def _refused(self, request: _Request, failure: Failed, wait: float | None) -> Attempt:
        """Record the failure of a whole request, and return what it means for each sample."""
        assert self._loop is not None
        now, endpoint = self._loop.time(), request.endpoint
        failure = self._named(endpoint, failure)
        attempt = after_failure(failure)
        if not attempt.retry:
            self._succeeded(endpoint, request.permit)  # a server that refuses is up
            return attempt
        if failure.kind == "timeout" and endpoint.last_success > request.permit.sent:
            return attempt  # others were answered in the meantime: this request is slow, and the server is up
        endpoint.failed(request.permit, now, failure)
        first_sent = min(job.started for job in request.jobs)
        slow = failure.kind == "timeout" and endpoint.state != "open" and endpoint.last_success > first_sent
        attempt = replace(attempt, outcome=replace(failure, outage=not slow))
        if failure.kind in ("overload", "timeout"):
            endpoint.slow_down(request.permit, now, self.max_workers)
        if wait is not None:
            endpoint.pause(now + wait)
        return attempt

    def _finish_or_retry(self, job: _Job, attempt: Attempt, endpoint: Endpoint) -> None:
        assert self._loop is not None
        if job.future.done():
            return
        if isinstance(attempt.outcome, Scored):
            self._finish(job, attempt.outcome)
            return
        if attempt.alone:
            job.alone = True
            job.attempts -= 1  # this sample may not have caused the refusal
            self._queue.appendleft(job)
            return
        retries = self._options.retries
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
            job.expiry = self._loop.call_at(job.started + self._options.timeouts.sample, self._expire, job)
        self._loop.call_later(
            max(retries.delay(job.attempts), attempt.retry_after or 0.0), self._requeue, job
        )

    def _requeue(self, job: _Job) -> None:
        if not job.future.done():
            self._queue.appendleft(job)
            self._pump_soon()

    def _expire(self, job: _Job) -> None:
        """Fail a sample whose time is over."""
        if not job.future.done() and job.failure is not None:
            seconds = self._options.timeouts.sample
            detail = f"{job.failure.detail}; given up {seconds:g} s after the first attempt"
            self._finish(job, replace(job.failure, attempts=job.attempts, detail=detail))

    def _finish(self, job: _Job, outcome: Outcome) -> None:
        if job.expiry is not None:
            job.expiry.cancel()
        if not job.future.done():
            job.future.set_result(outcome)

    def _sanitize(self, endpoint: Endpoint, attempt: Attempt) -> Attempt:
        """Hide secrets in an outcome, and name the server in a failure."""
        outcome = attempt.outcome
        if isinstance(outcome, Failed):
            return replace(attempt, outcome=self._named(endpoint, outcome))
        if outcome.info or outcome.components:
            hidden = replace(
                outcome,
                info=self._secrets.hide_in(outcome.info),
                components={self._secrets.hide(name): value for name, value in outcome.components.items()},
            )
            return replace(attempt, outcome=hidden)
        return attempt

    def _named(self, endpoint: Endpoint, failure: Failed) -> Failed:
        detail = shortened(self._secrets.hide(failure.detail), _MAX_DETAIL)
        return replace(failure, detail=f"{endpoint.address.shown}: {detail}")

    # Unavailable servers.

    def _succeeded(self, endpoint: Endpoint, permit: RequestPermit) -> None:
        assert self._loop is not None
        endpoint.last_success = self._loop.time()
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
            seen = await probe(self._sender, endpoint.address, self._options.protocol)
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
        """Schedule the next attempt to use a server, and the end of the wait."""
        assert self._loop is not None
        if any(endpoint.in_use(now) for endpoint in self._endpoints):
            return  # it is busy; the end of a request continues
        if self._outage is None:
            self._outage = self._loop.call_later(self._options.timeouts.sample, self._give_up)
        times = [endpoint.wakes_at() for endpoint in self._endpoints if not endpoint.probing]
        if self._wake is not None:
            self._wake.cancel()
        if times and (first := min(times)) > now:
            self._wake = self._loop.call_at(first, self._pump)

    def _give_up(self) -> None:
        """Fail waiting samples if no server could be used for too long."""
        assert self._loop is not None
        self._outage = None
        now = self._loop.time()
        if any(endpoint.in_use(now) for endpoint in self._endpoints):
            return
        last = [e.last_failure for e in self._endpoints if e.last_failure is not None]
        kind = last[0].kind if last else "timeout"
        causes = "; ".join(failure.detail for failure in last)
        detail = f"no reward server could be used for {self._options.timeouts.sample:g} s ({causes})"
        while (job := self._head()) is not None:
            self._queue.popleft()
            self._finish(job, Failed(kind, job.attempts, detail, outage=True))

    def _fail_waiting(self, error: Exception) -> None:
        """Raise a bug in all waiting callers, instead of letting them wait forever."""
        while (job := self._head()) is not None:
            job.future.set_exception(error)

    # The cache.

    def _from_cache(self, endpoint: Endpoint, job: _Job) -> bool:
        """Finish a sample from the cache; return whether it was there."""
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
        version = endpoint.capabilities.server_version if endpoint.capabilities is not None else None
        return version or self._options.server_version

    def _protocol(self, endpoint: Endpoint) -> str:
        return "v1" if endpoint.dialect is V1 else self._options.protocol

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is(attempt: Attempt, kind: FailureKind) -> bool:
    return isinstance(attempt.outcome, Failed) and attempt.outcome.kind == kind
