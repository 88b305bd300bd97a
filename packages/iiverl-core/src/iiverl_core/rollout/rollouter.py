"""From prompts to rollouts: the `Rollouter` protocol, a single turn, and running many on one engine."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

import numpy as np

from iiverl_core import activity
from iiverl_core.rollout.engine import (
    Completion,
    GenerationRequest,
    RolloutEngine,
    SamplingParams,
    check_unfinished,
)
from iiverl_core.samples import FinishReason, PickledByFields, Prompt, SampleId, TokenSequence


@dataclass(frozen=True, slots=True)
class RolloutRequest(PickledByFields):
    """Ask for one rollout of a prompt; `seed` and `id.member` decide its random numbers."""

    id: SampleId
    prompt: Prompt
    seed: int


@dataclass(frozen=True, slots=True)
class RolloutTokens:
    """A finished rollout as token arrays.

    `response_ids` (R,) int64 are the tokens after the prompt, as scorers read them; `finish_reason` is why the last turn
    ended. A rollout has one sequence, or several if its context was rewritten.
    """

    id: SampleId
    prompt: Prompt
    sequences: tuple[TokenSequence, ...]
    response_ids: np.ndarray
    finish_reason: FinishReason
    weights_version: int


class Generate(Protocol):
    """Generates one response for a rollout."""

    async def __call__(self, prompt_ids: Sequence[int], *, max_tokens: int | None = None) -> Completion:
        """Generate a response to `prompt_ids`, which hold all turns so far; `max_tokens` lowers the run's limit.

        Raises as `RolloutEngine.submit`.
        """
        ...


class Rollouter(Protocol):
    """Decides how a prompt becomes a rollout: a single turn, a loop of tool calls, an environment.

    If the engine is spread over several processes, each runs the same rollouts, so the order in which a rollouter calls
    `generate` must depend on the responses alone.
    """

    async def rollout(self, prompt: Prompt, id: SampleId, generate: Generate) -> RolloutTokens:
        """Make one rollout; many run concurrently, so await everything that takes long."""
        ...


class SingleTurn:
    """One response to the prompt. Implements `Rollouter`."""

    async def rollout(self, prompt: Prompt, id: SampleId, generate: Generate) -> RolloutTokens:
        """See `Rollouter.rollout`; every token of the response is trained on."""
        done = await generate(prompt.ids)
        sequence = TokenSequence.single_turn(prompt.ids, done.token_ids, done.log_probs, done.kept)
        return RolloutTokens(
            id, prompt, (sequence,), done.token_ids, done.finish_reason, done.weights_version
        )


def run_rollouts(
    engine: RolloutEngine, rollouter: Rollouter, requests: Sequence[RolloutRequest], params: SamplingParams
) -> Iterator[RolloutTokens]:
    """Run rollouts concurrently on one engine, in this thread, and yield each as it finishes.

    Rollouters run until all of them wait, then the engine advances by one step. So the first requests of all rollouts
    are submitted before the first step. If anything fails or the iterator is closed, every rollout is cancelled and its
    requests are dropped.

    Raises:
        RuntimeError: the engine has no weights; or requests were dropped, by an update of the weights or `sleep`,
            before their rollouts were taken.
        Exception: what a rollouter raises, with a note that names the rollout.
    """
    runner = _Runner(engine, params)
    try:
        runner.start(rollouter, requests)
        yield from runner.run()
    finally:
        runner.close()


class _Runner:
    """The event loop that rollouts share, and their requests. The loop runs only between two yields."""

    def __init__(self, engine: RolloutEngine, params: SamplingParams) -> None:
        self._engine, self._params, self._version = engine, params, engine.weights_version
        self._loop = asyncio.new_event_loop()
        self._progress = asyncio.Event()  # a rollout finished, or a request was submitted
        self._rollouts: dict[asyncio.Task[RolloutTokens], SampleId] = {}
        self._finished: list[asyncio.Task[RolloutTokens]] = []
        self._responses: dict[GenerationRequest, asyncio.Future[Completion]] = {}

    def start(self, rollouter: Rollouter, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            task = self._loop.create_task(
                rollouter.rollout(request.prompt, request.id, self._generate_for(request))
            )
            task.add_done_callback(self._finish)
            self._rollouts[task] = request.id

    def run(self) -> Iterator[RolloutTokens]:
        while self._rollouts:
            self._progress.clear()
            self._loop.run_until_complete(asyncio.sleep(0))  # run everything that is ready, once
            finished, self._finished = self._finished, []
            for task in finished:
                yield self._result(task)
            if self._responses:
                check_unfinished(self._engine, len(self._responses), self._version)
                activity.advance()
                for done in self._engine.step():
                    response = self._responses.pop(done.request)
                    if not response.cancelled():
                        response.set_result(done)
            elif self._rollouts and not finished:
                self._loop.run_until_complete(self._progress.wait())

    def close(self) -> None:
        self._engine.abort(self._responses.keys())
        for task in self._rollouts:
            task.cancel()
        try:
            self._loop.run_until_complete(
                asyncio.wait(self._rollouts) if self._rollouts else asyncio.sleep(0)
            )
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def _generate_for(self, rollout: RolloutRequest) -> Generate:
        turns = 0

        async def generate(prompt_ids: Sequence[int], *, max_tokens: int | None = None) -> Completion:
            nonlocal turns
            request = GenerationRequest(rollout.id, prompt_ids, turn_seed(rollout.seed, turns))
            turns += 1
            limit = (
                self._params.max_tokens if max_tokens is None else min(max_tokens, self._params.max_tokens)
            )
            self._engine.submit(request, replace(self._params, max_tokens=limit))
            response = self._responses[request] = self._loop.create_future()
            self._progress.set()
            try:
                return await response
            except asyncio.CancelledError:
                if self._responses.pop(request, None) is not None:
                    self._engine.abort({request})
                raise

        return generate

    def _finish(self, task: asyncio.Task[RolloutTokens]) -> None:
        self._finished.append(task)
        self._progress.set()

    def _result(self, task: asyncio.Task[RolloutTokens]) -> RolloutTokens:
        id = self._rollouts.pop(task)
        try:
            return task.result()
        except BaseException as error:
            error.add_note(f"in the rollout {id}")
            raise


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a rollout's request: `seed` for the first turn, derived ones for later turns."""
    if turn == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed}/turn {turn}".encode(), digest_size=8).digest())
