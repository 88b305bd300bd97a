"""Score with a user's function in processes that are killed and replaced if a call takes too long."""

import asyncio
import logging
import os
import pickle
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iiverl_core.config import CustomRewardFunctionConfig
from iiverl_core.errors import ConfigError
from iiverl_core.orphans import Lifeline
from iiverl_core.reward_process import Call, Reply, Setup
from iiverl_core.rewards.custom import arguments_of
from iiverl_core.rewards.threads import ThreadScorer
from iiverl_core.samples import Rollout, SampleId
from iiverl_core.user_process import EndedError, UserProcess
from iiverl_reward_client import Failed, FailureKind, Outcome, Scored

logger = logging.getLogger(__name__)

MOST_PROCESSES = 8  # by default, as in verl
_GRACE_S = 2.0  # for a coroutine function to report that its own limit has passed
_LOOK_S = 0.5  # between two looks at which call blocks a process
_ATTEMPTS = 2  # of a call whose process ended without telling which call was to blame
_HOPELESS = 8  # calls in a row that took too long: every further one would cost as much


class FunctionPool(ThreadScorer):
    """A `Scorer` that calls a user's function in several processes, in order of submission.

    Each process makes one call at a time, or, of a coroutine function, up to `ASYNC_CALLS` side by side. The first one
    is started at once, further ones when calls have waited for as long as a process takes to start. What calls print is
    appended to the file `output`.
    """

    def __init__(self, config: CustomRewardFunctionConfig, output: Path) -> None:
        super().__init__()
        assert config.path is not None
        self._setup = Setup(list(sys.path), config.path, config.name, config.reward_kwargs, config.timeout)
        self._workers = config.workers
        self._output = output
        self._printed = _size(output) > 0
        self._loop = asyncio.new_event_loop()
        self._waiting: asyncio.Queue[_Request] = asyncio.Queue()
        self._slots: asyncio.Queue[_Process] = asyncio.Queue()  # a process once per call that it can take
        self._processes: set[_Process] = set()
        self._start_s: float | None = None  # that a process takes to start
        self._timeouts_in_a_row: dict[tuple[Any, ...], int] = {}  # by split and step
        self._task: asyncio.Task[None] | None = None
        self._thread.start()

    def collect(self, ids: Collection[SampleId], may_fail: float | None = None) -> Mapping[SampleId, Outcome]:
        """Wait for outcomes; see `Scorer.collect`.

        Raises:
            ConfigError: the function cannot be loaded in a process of its own.
        """
        outcomes = super().collect(ids, may_fail)
        for step in {id[:2] for id in ids}:
            self._timeouts_in_a_row.pop(step, None)
        if not self._printed and _size(self._output) > 0:
            self._printed = True
            logger.warning("the reward function prints; its output is in %s", self._output)
        return outcomes

    def _take(self, rollout: Rollout) -> None:
        with suppress(RuntimeError):  # the loop has ended with an error, which `collect` raises
            self._loop.call_soon_threadsafe(self._waiting.put_nowait, _Request(rollout, time.monotonic()))

    def _end(self) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    def _work(self) -> None:
        self._lifeline = Lifeline()
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._lifeline.close()

    async def _serve(self) -> None:
        self._task = asyncio.current_task()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._start_one()
                while not self._closed:
                    request = await self._waiting.get()
                    if self._timeouts_in_a_row.get(request.rollout.id[:2], 0) < _HOPELESS:
                        process = await self._free_process(request)
                        self._tasks.create_task(self._score(process, request))
                    else:
                        self._fail(
                            request, "timeout", f"not called, since the last {_HOPELESS} calls took too long"
                        )
        finally:
            await asyncio.gather(*(process.close() for process in self._processes))

    async def _free_process(self, request: "_Request") -> "_Process":
        """Wait for a process that can take a call; start one more if the request has waited for long."""
        while True:
            patience = None
            if self._start_s is not None and len(self._processes) < self._most_processes:
                patience = max(0.0, request.submitted + self._start_s - time.monotonic())
            try:
                async with asyncio.timeout(patience):
                    process = await self._slots.get()
            except TimeoutError:
                self._start_one()
                continue
            if process in self._processes:
                return process

    def _start_one(self) -> None:
        self._output.parent.mkdir(parents=True, exist_ok=True)
        process = _Process()
        self._processes.add(process)
        self._tasks.create_task(self._start(process))

    async def _start(self, process: "_Process") -> None:
        began = time.monotonic()
        with self._output.open("ab") as output:
            await process.start(self._lifeline.fd, output)
        self._tasks.create_task(process.read_answers())
        try:
            ready = await process.ask(0, self._setup)
        except EndedError:
            raise ConfigError(
                f"custom_reward_function.path: importing {self._setup.path} {process.how}"
            ) from None
        if ready.problem:
            raise ConfigError(ready.detail)
        process.is_async = ready.calls > 1
        self._most_processes = process_count(self._workers, process.is_async)
        self._start_s = time.monotonic() - began
        for _ in range(ready.calls):
            self._slots.put_nowait(process)

    async def _score(self, process: "_Process", request: "_Request") -> None:
        """Make a call. If its process ends, whichever call was running there has failed, and others are made again."""
        rollout = request.rollout
        request.began = request.began or time.monotonic()
        process.last_id += 1
        call = Call(process.last_id, str(rollout.id), arguments_of(rollout))
        try:
            reply = await self._reply(process, call)
        except EndedError:
            if process in self._processes:
                self._processes.remove(process)
                self._start_one()
            running = process.running
            if running == 0:
                request.attempts += 1
            if running == call.id or request.attempts >= _ATTEMPTS:
                self._fail(request, process.problem, process.how)
            else:
                self._waiting.put_nowait(request)
            return
        self._slots.put_nowait(process)
        if not reply.problem:
            self._timeouts_in_a_row.pop(rollout.id[:2], None)
            self._finish_now(request, Scored(reply.score, reply.components, _info(reply.info)))
        else:
            self._fail(request, reply.problem, reply.detail)

    async def _reply(self, process: "_Process", call: Call) -> Reply:
        """Await the reply to a call, and kill the process if that takes too long and no other call is to blame.

        Raises:
            EndedError: the process ended.
        """
        asked = asyncio.ensure_future(process.ask(call.id, call))
        limit = self._setup.timeout_s + (_GRACE_S if process.is_async else 0)
        try:
            while not (await asyncio.wait((asked,), timeout=limit))[0]:
                # A coroutine function that blocks delays other calls too, until its own limit.
                limit = _LOOK_S
                if process.running in (0, call.id):
                    process.kill("timeout")
            return await asked
        finally:
            asked.cancel()

    def _fail(self, request: "_Request", kind: FailureKind, detail: str) -> None:
        step = request.rollout.id[:2]
        if kind == "timeout":
            self._timeouts_in_a_row[step] = self._timeouts_in_a_row.get(step, 0) + 1
            detail = (
                detail or f"took longer than {self._setup.timeout_s:g} s (custom_reward_function.timeout)"
            )
        else:
            self._timeouts_in_a_row.pop(step, None)
        if kind == "timeout" or detail.startswith("ended"):
            detail = f"{self._setup.name} {detail}, for {request.rollout.prompt.place}"
        self._finish_now(request, Failed(kind, detail=detail))

    def _finish_now(self, request: "_Request", outcome: Outcome) -> None:
        now = time.monotonic()
        self._finish(request.rollout.id, outcome, (request.began or now, now))


def process_count(workers: int | None, is_async: bool) -> int:
    """Return the most processes for `custom_reward_function.workers`, which may be null."""
    if workers is not None:
        return workers
    return 1 if is_async else min(MOST_PROCESSES, _processors())


@dataclass(slots=True)
class _Request:
    """A rollout that waits for its outcome, and how often its process ended without telling why."""

    rollout: Rollout
    submitted: float
    attempts: int = 0
    began: float | None = None


class _Process(UserProcess):
    """A process that calls the function."""

    def __init__(self) -> None:
        super().__init__("iiverl_core.reward_process")
        self.is_async = False


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _info(pickled: bytes) -> dict[str, Any]:
    """Read what the function returned beside numbers; its own classes may not be readable here."""
    if not pickled:
        return {}
    try:
        return pickle.loads(pickled)
    except Exception as error:  # of the user's classes
        return {"info": f"cannot be read outside the function's process: {error}"}


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
