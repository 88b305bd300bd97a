"""Run many rollouts on one engine, concurrently and in one thread; they can be interrupted, and go on later."""

import asyncio
from collections import deque
from collections.abc import Callable, Generator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace

from iiverl_core import activity
from iiverl_core.rollout.engine import (
    Completion,
    GenerationRequest,
    RolloutEngine,
    SamplingParams,
    check_unfinished,
)
from iiverl_core.rollout.rollouter import Rollouter, RolloutRequest, RolloutTokens, turn_seed
from iiverl_core.samples import SampleId, SequenceImage, WeightsSpan, joined_spans

WAIT_S = 0.1  # for what is not the engine, between two looks for an interruption


def run_rollouts(
    engine: RolloutEngine,
    rollouter: Rollouter,
    requests: Sequence[RolloutRequest],
    params: SamplingParams,
    *,
    in_lockstep: bool = False,
) -> Generator[RolloutTokens]:
    """Run rollouts concurrently on one engine, in this thread, and yield each as it finishes.

    Rollouters run until all of them wait, then the engine advances by one step. So the first requests of all rollouts
    are submitted before the first step, or those of the first `concurrency`. If anything fails or the iterator is closed,
    every rollout is cancelled and its requests are dropped.

    With `in_lockstep`, the engine advances only when every rollout waits for it, and for nothing else. So the responses
    that are decoded together do not depend on how long anything else takes.

    Raises:
        RuntimeError: the engine has no weights; or requests were dropped, by an update of the weights or `sleep`,
            before their rollouts were taken.
        Exception: what a rollouter raises, with a note that names the rollout.
    """
    runner = RolloutRunner(engine, rollouter, params, in_lockstep=in_lockstep)
    try:
        yield from runner.run(requests)
    finally:
        runner.close()


class RolloutRunner:
    """Runs rollouts as `run_rollouts` does, and can be interrupted: rollouts then wait where they are until the next `run`.

    So the engine can be given newer weights, or other requests in between. It holds the event loop that rollouts share, and
    their requests; the loop runs only between two yields.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rollouter: Rollouter,
        params: SamplingParams,
        *,
        in_lockstep: bool = False,
    ) -> None:
        self._engine, self._rollouter, self._params = engine, rollouter, params
        self.version = engine.weights_version
        self._in_lockstep = in_lockstep
        self._loop = asyncio.new_event_loop()
        self._progress = asyncio.Event()  # a rollout finished, or a request was submitted
        self._rollouts: dict[asyncio.Task[RolloutTokens], _Generate] = {}
        self._finished: list[asyncio.Task[RolloutTokens]] = []
        self._queued: list[_Queued] = []
        self._pending: dict[GenerationRequest, _Queued] = {}

    def run(
        self, requests: Sequence[RolloutRequest], interrupted: Callable[[], bool] = lambda: False
    ) -> Generator[RolloutTokens]:
        """Yield the rollouts of `requests` as they finish, until all have, or `interrupted` returns True.

        That is asked before each step of the engine. Rollouts of earlier calls that `requests` name go on from where they
        are; others are cancelled.

        Raises as `run_rollouts` does; `close` is to be called then.
        """
        self.version = self._engine.weights_version
        running = {generate.rollout.id for generate in self._rollouts.values()}
        self._cancel(running - {each.id for each in requests})
        waiting = deque((i, each) for i, each in enumerate(requests) if each.id not in running)
        while self._rollouts or waiting:
            self._progress.clear()
            while waiting and len(self._rollouts) < (self._rollouter.concurrency or len(requests)):
                position, request = waiting.popleft()
                generate = _Generate(self, request, position)
                task = self._loop.create_task(self._rollouter.rollout(request, generate))
                task.add_done_callback(self._finish)
                self._rollouts[task] = generate
            self._loop.run_until_complete(asyncio.sleep(0))  # run everything that is ready, once
            finished, self._finished = self._finished, []
            for task in finished:
                yield self._result(task)
            if finished and waiting:
                continue  # others take their places before the next step
            if interrupted():
                return self._interrupt()
            if self._may_step():
                self._submit()
                check_unfinished(self._engine, len(self._pending), self.version)
                activity.advance()
                for done in self._engine.step():
                    response = self._pending.pop(done.request).response
                    if not response.cancelled():
                        response.set_result(done)
            elif not finished:
                self._loop.run_until_complete(self._wait())

    @property
    def unfinished(self) -> int:
        """Rollouts that wait for the next `run`."""
        return len(self._rollouts)

    def close(self) -> None:
        """Cancel what is unfinished."""
        self._engine.abort(self._pending.keys())
        try:
            self._cancel({generate.rollout.id for generate in self._rollouts.values()})
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def _cancel(self, ids: Set[SampleId]) -> None:
        """Cancel rollouts, and wait until they have ended."""
        tasks = [task for task, generate in self._rollouts.items() if generate.rollout.id in ids]
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.wait(tasks) if tasks else asyncio.sleep(0))
        self._finished = [task for task in self._finished if task not in tasks]
        for task in tasks:
            del self._rollouts[task]

    def _interrupt(self) -> None:
        """Take the engine's requests back, to be submitted as they are continued."""
        for request, continued in self._engine.interrupt().items():
            self._queued.append(replace(self._pending.pop(request), request=continued))

    async def _wait(self) -> None:
        """Wait for progress, or a moment, after which an interruption may have come."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._progress.wait(), WAIT_S)

    async def generate(self, request: GenerationRequest, position: int, max_tokens: int | None) -> Completion:
        """Queue a request of the rollout at `position`, and await its response."""
        limit = self._params.max_tokens if max_tokens is None else min(max_tokens, self._params.max_tokens)
        response: asyncio.Future[Completion] = self._loop.create_future()
        self._queued.append(_Queued(position, request, limit, response))
        self._progress.set()
        try:
            return await response
        except asyncio.CancelledError:
            self._queued = [each for each in self._queued if each.response is not response]
            for pending in [each.request for each in self._pending.values() if each.response is response]:
                del self._pending[pending]
                self._engine.abort({pending})
            raise

    def _may_step(self) -> bool:
        if not self._in_lockstep:
            return bool(self._pending or self._queued)
        waiting = {request.id for request in self._pending} | {each.request.id for each in self._queued}
        return bool(waiting) and len(waiting) == len(self._rollouts)

    def _submit(self) -> None:
        """Submit what is queued, in the order of the rollouts, which does not depend on what they waited for."""
        queued, self._queued = sorted(self._queued, key=lambda each: each.position), []
        for each in queued:
            try:
                self._engine.submit(each.request, replace(self._params, max_tokens=each.max_tokens))
            except (ValueError, RuntimeError) as error:
                each.response.set_exception(error)
            else:
                self._pending[each.request] = each

    def _finish(self, task: asyncio.Task[RolloutTokens]) -> None:
        self._finished.append(task)
        self._progress.set()

    def _result(self, task: asyncio.Task[RolloutTokens]) -> RolloutTokens:
        generate = self._rollouts.pop(task)
        try:
            done = task.result()
        except BaseException as error:
            error.add_note(f"in the rollout {generate.rollout.id}")
            raise
        versions = {each.version for each in generate.spans}
        if len(versions) < 2:
            return done
        return replace(done, spans=joined_spans(*generate.spans), weights_version=generate.spans[-1].version)


@dataclass(frozen=True, slots=True, eq=False)
class _Queued:
    """A request that the engine gets before its next step."""

    position: int
    request: GenerationRequest
    max_tokens: int
    response: asyncio.Future[Completion]


class _Generate:
    """Implements `Generate` for the rollout at `position`; each of its requests has a seed of its own.

    `spans` say which weights sampled its tokens so far.
    """

    def __init__(self, runner: RolloutRunner, rollout: RolloutRequest, position: int) -> None:
        self._runner, self.rollout, self._position = runner, rollout, position
        self._turns = 0
        self.spans = list[WeightsSpan]()

    @property
    def weights_version(self) -> int:
        """See `Generate.weights_version`."""
        return self._runner.version

    async def __call__(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        images: Sequence[SequenceImage] | None = None,
    ) -> Completion:
        """See `Generate.__call__`."""
        seed = turn_seed(self.rollout.seed, self._turns)
        self._turns += 1
        images = self.rollout.images if images is None else images
        request = GenerationRequest(self.rollout.id, prompt_ids, seed, images)
        done = await self._runner.generate(request, self._position, max_tokens)
        self.spans += done.spans
        return done
