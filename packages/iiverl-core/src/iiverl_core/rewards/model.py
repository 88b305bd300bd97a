"""Score with a reward model, which the workers run together once the rollouts are finished."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from iiverl_core.rewards.scorer import Scorer, Span, covered
from iiverl_core.samples import Rollout, SampleId, SequenceRef, TokenSequence
from iiverl_reward_client import Failed, Outcome, Scored

RewardModelInput: TypeAlias = SequenceRef | TokenSequence
"""The sequence that a reward model reads: the rollout's own, or one rewritten in the model's tokens."""

ScoreSequences: TypeAlias = Callable[[Mapping[SampleId, RewardModelInput]], Sequence[float]]
"""Returns the reward model's score of each sequence, in order. NaN and infinity become failures."""

Rewrite: TypeAlias = Callable[[Rollout], RewardModelInput | Failed]
"""Returns the sequence that the reward model reads for a rollout, or a failure."""


class ModelScorer:
    """A `Scorer` that runs a reward model and adds the scores of an optional other scorer.

    The processes of a sharded model work together, so `score` is called once for all rollouts that are collected
    together, ordered by id, and not at all if there are none. It is called with the last sequence of each rollout or,
    with `rewrite`, the sequences that `rewrite` returns; that function runs on a thread as rollouts are submitted. The
    other scorer gets the rollouts immediately and works while the model does.

    A score has the components `reward_model` and, for the other scorer, `other_name`, in addition to that scorer's own
    components and info. A rollout that one of the two cannot score has no score.
    """

    def __init__(
        self,
        score: ScoreSequences,
        *,
        rewrite: Rewrite | None = None,
        other: Scorer | None = None,
        other_name: str = "other",
    ) -> None:
        self._score, self._rewrite = score, rewrite or _last_sequence
        self._other, self._other_name = other, other_name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="iiverl-reward-tokens")
        self._inputs: dict[SampleId, Future[RewardModelInput | Failed]] = {}
        self._closed = False
        self.busy_spans: list[Span] = []

    @property
    def busy_seconds(self) -> float:
        """See `Scorer.busy_seconds`; rewriting does not count."""
        return covered(self.busy_spans)

    def submit(self, rollout: Rollout) -> None:
        """Queue a rollout; see `Scorer.submit`. Raises `RuntimeError` if the scorer is closed."""
        if self._closed:
            raise RuntimeError("the scorer is closed")
        if rollout.id in self._inputs:
            raise ValueError(f"{rollout.id} was submitted twice")
        if self._other is not None:
            self._other.submit(rollout)
        self._inputs[rollout.id] = self._thread.submit(self._rewrite, rollout)

    def collect(self, ids: Collection[SampleId], may_fail: float | None = None) -> Mapping[SampleId, Outcome]:
        """Run the model on these rollouts, wait for the other scorer, and combine the two.

        Raises:
            RuntimeError: the scorer is closed, or the model returned a wrong number of scores.
            BaseException: the model, `rewrite` or the other scorer raised it. The scorer cannot be used any more.
        """
        if self._closed:
            raise RuntimeError("the scorer is closed")
        inputs = {id: self._inputs[id].result() for id in sorted(ids)}
        began = time.monotonic()
        by_model = self._score_inputs(inputs)
        self.busy_spans = [(began, time.monotonic())] if inputs else []
        outcomes: dict[SampleId, Outcome] = by_model
        if self._other is not None:
            by_other = self._other.collect(list(inputs), may_fail)
            outcomes = {id: self._combine(by_model[id], by_other[id]) for id in by_model}
            self.busy_spans += self._other.busy_spans
        for id in inputs:
            del self._inputs[id]
        return outcomes

    def is_scored(self, ids: Collection[SampleId]) -> bool:
        """See `Scorer.is_scored`: the model scores in `collect`."""
        return not ids

    def close(self) -> None:
        """Drop pending rollouts, and close the other scorer."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._inputs.clear()
        if self._other is not None:
            self._other.close()

    def _score_inputs(self, inputs: Mapping[SampleId, RewardModelInput | Failed]) -> dict[SampleId, Outcome]:
        readable = {id: each for id, each in inputs.items() if not isinstance(each, Failed)}
        scores = self._score(readable) if readable else ()
        if len(scores) != len(readable):
            raise RuntimeError(
                f"the reward model returned {len(scores)} scores for {len(readable)} sequences"
            )
        by_id = dict(zip(readable, map(float, scores), strict=True))
        return {id: each if isinstance(each, Failed) else _scored(by_id[id]) for id, each in inputs.items()}

    def _combine(self, by_model: Outcome, by_other: Outcome) -> Outcome:
        if isinstance(by_model, Failed):
            return by_model
        if isinstance(by_other, Failed):
            return by_other
        sources = {self._other_name: by_other.score, **by_model.components}
        return _scored(by_model.score + by_other.score, {**by_other.components, **sources}, by_other.info)


def _scored(
    score: float, components: Mapping[str, float] | None = None, info: Mapping[str, Any] | None = None
) -> Outcome:
    if not math.isfinite(score):
        detail = f"with the reward model the score is {score}, which is not a finite number"
        return Failed("bad_response", detail=detail)
    return Scored(score, components or {"reward_model": score}, info or {})


def _last_sequence(rollout: Rollout) -> RewardModelInput:
    return rollout.sequences[-1]
