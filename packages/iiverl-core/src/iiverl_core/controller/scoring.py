"""Wait for the outcomes of a step's rollouts, and apply what the configuration says about them."""

import time
from collections.abc import Collection, Mapping, Sequence

from iiverl_core.config import RunConfig
from iiverl_core.controller.batch import with_outcomes
from iiverl_core.controller.observer import Observer, StepRecord
from iiverl_core.errors import IIVerlError
from iiverl_core.rewards import (
    Scorer,
    apply_failure_policy,
    check_failures,
    shape_overlong,
    with_environment,
)
from iiverl_core.rewards.scorer import Span, covered
from iiverl_core.samples import Rollout, SampleId
from iiverl_reward_client import Failed, Outcome


class Scoring:
    """The outcomes of rollouts that belong together, collected all at once or part by part.

    `total` is their number, on which the limit of failures depends.
    """

    def __init__(self, run: RunConfig, scorer: Scorer, observer: Observer, step: int, total: int) -> None:
        self._run, self._scorer, self._observer = run, scorer, observer
        self._step, self._total = step, total
        self._rollouts: list[Rollout] = []
        self._outcomes: dict[SampleId, Outcome] = {}  # of those that were collected, as they came
        self._exposed = 0.0
        self._spans: list[Span] = []  # in which they were scored; those of several parts overlap

    def score(self, rollouts: Sequence[Rollout], *, shaped: bool = True) -> list[Rollout]:
        """Return rollouts with their outcomes, by group and member; with `shaped`, long ones are penalized if configured.

        Raises:
            IIVerlError: too many of all rollouts have failed so far, or one has and none may.
        """
        began = time.perf_counter()
        outcomes = self._collect(rollouts)
        self._exposed += time.perf_counter() - began
        self._spans += self._scorer.busy_spans
        self._rollouts += rollouts
        self._outcomes |= outcomes
        api, overlong = self._run.rewards.api, self._run.rewards.overlong
        try:
            check_failures(self._outcomes, api.max_failed_fraction, self._total)
            outcomes = apply_failure_policy(outcomes, api)
        except IIVerlError:
            # The step is not trained on, but its rollouts and scores are kept for inspection.
            if shaped:
                kept = [each for each in self._rollouts if each.id.member < self._run.rollout.n]
                self._observer.write_rollouts(StepRecord(self._step, with_outcomes(kept, self._outcomes)))
            raise
        if shaped and overlong.enable:
            outcomes = shape_overlong(
                outcomes,
                {rollout.id: rollout.response_length for rollout in rollouts},
                limit=self._run.rollout.response_length,
                buffer=overlong.len,
                factor=overlong.penalty_factor,
            )
        return with_outcomes(rollouts, outcomes)

    @property
    def hidden_fraction(self) -> float:
        """The fraction of the time of scoring that nothing waited for."""
        busy = covered(self._spans)
        return max(0.0, 1 - self._exposed / busy) if busy else 1.0

    def _collect(self, rollouts: Collection[Rollout]) -> Mapping[SampleId, Outcome]:
        """Wait for the outcomes of rollouts; those that failed on their way were not scored."""
        submitted = [each.id for each in rollouts if not isinstance(each.outcome, Failed)]
        failed = len(rollouts) - len(submitted)
        failed += sum(isinstance(each, Failed) for each in self._outcomes.values())
        allowed = self._run.rewards.api.max_failed_fraction * self._total
        outcomes = self._scorer.collect(submitted, max(0.0, allowed - failed))
        return with_environment(rollouts, outcomes, add=self._run.rewards.adds_environment)
