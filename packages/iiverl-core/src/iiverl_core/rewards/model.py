"""Scoring by a reward model, which the workers run together once all rollouts of a step are there."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from iiverl_core.rewards.scorer import Scorer, Span, covered
from iiverl_core.samples import Rollout, SampleId, SequenceRef, TokenSequence
from iiverl_reward_client import Failed, Outcome, Scored

RewardModelInput: TypeAlias = SequenceRef | TokenSequence
"""The sequence that a reward model reads: the rollout's own, or one rewritten in the model's tokens."""

ScoreSequences: TypeAlias = Callable[[Mapping[SampleId, RewardModelInput]], Sequence[float]]
"""Gives a reward model's score of each sequence, in their order. NaN and infinity become failures."""

Rewrite: TypeAlias = Callable[[Rollout], RewardModelInput | Failed]
"""Gives the sequence that the reward model reads for a rollout, or the reason why there is none."""


class ModelScorer:
    """A `Scorer` around a reward model, and where there is one around another scorer, whose scores are added.

    The processes of a sharded model work together, so `score` is called once for all rollouts that were submitted since
    the last `collect`, in the order of their ids, and not at all if there is none. It gets the last sequence of each
    rollout or, with `rewrite`, that function's, which is called on a thread as rollouts are submitted. The other scorer
    gets the rollouts at once, and goes on while the model works.

    A score comes with the components `reward_model` and, of the other scorer, `other_name`, beside the other's own
    components and info. A rollout that one of the two could not score has no score.
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
        """Take one finished rollout and return at once.

        Raises:
            RuntimeError: the scorer is closed.
            ValueError: a rollout of this id was submitted since the last `collect`.
        """
        if self._closed:
            raise RuntimeError("the scorer is closed")
        if rollout.id in self._inputs:
            raise ValueError(f"{rollout.id} was submitted twice")
        if self._other is not None:
            self._other.submit(rollout)
        self._inputs[rollout.id] = self._thread.submit(self._rewrite, rollout)

    def collect(self) -> Mapping[SampleId, Outcome]:
        """Ask the model for all rollouts submitted since the last call, wait for the other scorer, and put both together.

        Raises:
            RuntimeError: the scorer is closed, or the model gave another number of scores than it got sequences.
            BaseException: what the model, `rewrite` or the other scorer raised. The scorer is of no more use then.
        """
        if self._closed:
            raise RuntimeError("the scorer is closed")
        inputs = {id: self._inputs[id].result() for id in sorted(self._inputs)}
        began = time.monotonic()
        by_model = self._ask_model(inputs)
        self.busy_spans = [(began, time.monotonic())] if inputs else []
        outcomes: dict[SampleId, Outcome] = by_model
        if self._other is not None:
            by_other = self._other.collect()
            outcomes = {id: self._together(by_model[id], by_other[id]) for id in by_model}
            self.busy_spans += self._other.busy_spans
        self._inputs.clear()
        return outcomes

    def close(self) -> None:
        """Drop what was submitted and not collected, and close the other scorer."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._inputs.clear()
        if self._other is not None:
            self._other.close()

    def _ask_model(self, inputs: Mapping[SampleId, RewardModelInput | Failed]) -> dict[SampleId, Outcome]:
        """Score what the model can read; the rest keeps its failure."""
        readable = {id: each for id, each in inputs.items() if not isinstance(each, Failed)}
        scores = self._score(readable) if readable else ()
        if len(scores) != len(readable):
            raise RuntimeError(f"the reward model gave {len(scores)} scores for {len(readable)} sequences")
        by_id = dict(zip(readable, map(float, scores), strict=True))
        return {id: each if isinstance(each, Failed) else _scored(by_id[id]) for id, each in inputs.items()}

    def _together(self, by_model: Outcome, by_other: Outcome) -> Outcome:
        if isinstance(by_model, Failed):
            return by_model
        if isinstance(by_other, Failed):
            return by_other
        own = {self._other_name: by_other.score, **by_model.components}
        return _scored(by_model.score + by_other.score, {**by_other.components, **own}, by_other.info)


def _scored(
    score: float, components: Mapping[str, float] | None = None, info: Mapping[str, Any] | None = None
) -> Outcome:
    if not math.isfinite(score):
        detail = f"with the reward model the score comes to {score}, which is no finite number"
        return Failed("bad_response", detail=detail)
    return Scored(score, components or {"reward_model": score}, info or {})


def _last_sequence(rollout: Rollout) -> RewardModelInput:
    return rollout.sequences[-1]
