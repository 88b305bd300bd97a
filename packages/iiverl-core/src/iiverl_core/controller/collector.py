"""Collect rollouts and their scores, for a training step and for validation."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import numpy as np

from iiverl_core.config import RunConfig
from iiverl_core.controller.batch import drop_small_groups, groups_with_reward_variance, with_outcomes
from iiverl_core.controller.observer import Observer, StepRecord
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import PromptOrder, PromptSet
from iiverl_core.errors import IIVerlError
from iiverl_core.registry import ROLLOUTERS, EstimatorInfo
from iiverl_core.rewards import (
    Scorer,
    apply_failure_policy,
    check_failures,
    shape_overlong,
    with_environment,
)
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.samples import Prompt, Rollout, SampleId, Split
from iiverl_core.telemetry import Timers
from iiverl_reward_client import Failed, Outcome, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_ROUNDS = "train/num_gen_batches"
"""Metric of a run with dynamic sampling: the batches of prompts that a step took."""
MAX_FRUITLESS_CALLS = 10  # of the engines, without a result; more cannot be explained by a dead engine


@dataclass(frozen=True)
class Plan:
    """The prompts of a run in their order, the prompts to validate on, the number of steps, and the tokenizer."""

    prompts: PromptSet
    order: PromptOrder
    val_prompts: PromptSet | None
    total_steps: int
    tokenizer: "PreTrainedTokenizerBase | None" = None


@dataclass
class StepData:
    """The data of one training step.

    `rollouts` are all generated rollouts, ordered by group and member; `groups` the groups of the step's batch;
    `baselines` the score of the greedy response per group, if the estimator needs it. `timings` are the seconds that it
    took to collect them, by metric name.
    """

    step: int
    rollouts: list[Rollout] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    baselines: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def batch(self, estimator: EstimatorInfo) -> list[Rollout]:
        """List the rollouts for which the estimator can compute advantages."""
        groups = set(self.groups)
        if estimator.greedy_baseline:
            groups &= self.baselines.keys()
        return drop_small_groups(self.rollouts, groups, estimator.min_group_size)


class EngineWeights(Protocol):
    """The weights that the engines have."""

    version: int

    def restore(self) -> None:
        """Give weights to engines that died and were started again; `version` may be another one afterwards."""
        ...


@dataclass
class Generation:
    """Responses to be generated: `unfinished` are still to come, and `rollouts` have.

    `prompts` are given by group, and have `members` responses each. `versions` are those of the weights that the engines
    had.
    """

    label: str
    sampling: Sampling
    prompts: Mapping[int, Prompt]
    members: int
    unfinished: dict[SampleId, RolloutRequest]
    rollouts: list[Rollout] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    fruitless: int = (
        0  # calls of the engines in a row in which nothing finished, though their weights were the same
    )

    @property
    def ended(self) -> bool:
        """Whether all responses have come, or no more can be expected."""
        return not self.unfinished or self.fruitless == MAX_FRUITLESS_CALLS


T = TypeVar("T")
Collecting: TypeAlias = Generator[Generation, None, T]
"""Yields what is to be generated next, goes on when it has ended, and returns a result."""


class RolloutCollector:
    """Generates responses with the engines' current weights, and scores them while others are still being generated."""

    def __init__(
        self,
        run: RunConfig,
        plan: Plan,
        workers: WorkerClient,
        scorer: Scorer,
        observer: Observer,
        estimator: EstimatorInfo,
        weights: EngineWeights,
    ) -> None:
        self.run, self.plan = run, plan
        self._scored: dict[SampleId, Outcome] = {}  # of steps whose responses are not all there
        self.workers, self.scorer, self.observer = workers, scorer, observer
        self.estimator, self.weights = estimator, weights

    def finish(self, collecting: Collecting[T]) -> T:
        """Generate what is asked for, in turn, and return the result."""
        try:
            wanted = next(collecting)
            while True:
                for _ in self.generate([wanted]):
                    pass
                if wanted.ended:
                    wanted = next(collecting)
                else:
                    self.weights.restore()
        except StopIteration as end:
            return end.value

    def collect(self, step: int, state: TrainState) -> Collecting[tuple[StepData, TrainState]]:
        """Collect `n` responses to each prompt of a step, from the place in the data where `state` is.

        Returns them, and a copy of `state` that has moved on in the data.

        With dynamic sampling (DAPO, arXiv:2503.14476, section 3.2), groups whose responses all have the same
        score have no gradient and are replaced: more prompts are used until the batch is full, or the limit of batches
        is reached. The groups collected by then are trained on.
        """
        filtered, target = self.run.algorithm.filter_groups, self.run.data.train_batch_size
        # Without a configured limit, stop after an epoch: no prompt is used twice in a step.
        limit = (filtered.max_num_gen_batches or self.plan.order.steps_per_epoch) if filtered.enable else 1
        state = replace(state, response_lengths=dict(state.response_lengths))
        data, batches, timers = StepData(step), 0, Timers()
        overlaps: list[float] = []
        while batches < limit and len(data.groups) < target:
            batches += 1
            _, rows = self.plan.order.batch(state.batches_consumed)
            state.batches_consumed += 1
            first = data.rollouts[-1].id.group + 1 if data.rollouts else 0
            prompts = {first + i: self.plan.prompts[row] for i, row in enumerate(rows)}
            rollouts, baselines, overlap = yield from self._collect_scored(
                prompts, step, state.response_lengths, timers
            )
            data.rollouts += rollouts
            data.baselines |= baselines
            overlaps.append(overlap)
            data.groups += (
                groups_with_reward_variance(rollouts, filtered.metric or "score")
                if filtered.enable
                else list(prompts)
            )
        data.metrics["reward/hidden_fraction"] = sum(overlaps) / len(overlaps)
        if filtered.enable:
            generated = len({rollout.id.group for rollout in data.rollouts})
            data.metrics |= {
                GENERATION_ROUNDS: float(batches),
                "train/uniform_groups": float(generated - len(data.groups)),
                "train/missing_groups": float(max(target - len(data.groups), 0)),
            }
            data.groups = data.groups[:target]
        data.timings = timers.drain()
        return data, state

    def _collect_scored(
        self, prompts: Mapping[int, Prompt], step: int, lengths: dict[int, float], timers: Timers
    ) -> Collecting[tuple[list[Rollout], dict[int, float], float]]:
        """Collect scored rollouts of prompts, given by group, baselines, and the overlap of scoring with generation.

        `lengths` has the mean length of earlier responses by row, and gets those of the new ones.
        """
        with timers("gen"):
            rollouts = yield from self._generate(prompts, step, "train", lengths)
            _remember_lengths(lengths, rollouts)
            greedy: list[Rollout] = []
            if self.estimator.greedy_baseline:
                greedy = yield from self._generate(prompts, step, "baseline", lengths)
        with timers("reward"), self.observer.phase("scoring"):
            generated = time.perf_counter()
            outcomes = self._outcomes((*rollouts, *greedy))
            exposed, busy = time.perf_counter() - generated, self.scorer.busy_seconds
        try:
            outcomes = self._apply_failure_policy(outcomes)
        except IIVerlError:
            # The step is not trained on, but its rollouts and scores are kept for inspection.
            self.observer.write_rollouts(StepRecord(step, with_outcomes(rollouts, outcomes)))
            raise
        overlong = self.run.rewards.overlong
        if overlong.enable:
            outcomes = shape_overlong(
                outcomes,
                {rollout.id: rollout.response_length for rollout in (*rollouts, *greedy)},
                limit=self.run.rollout.response_length,
                buffer=overlong.len,
                factor=overlong.penalty_factor,
            )
        baselines = {
            rollout.id.group: rollout.outcome.score
            for rollout in with_outcomes(greedy, outcomes)
            if isinstance(rollout.outcome, Scored)
        }
        return with_outcomes(rollouts, outcomes), baselines, max(0.0, 1 - exposed / busy) if busy else 1.0

    def validate(self, step: int) -> Collecting[list[Rollout]]:
        """Collect scored responses to the validation prompts."""
        prompts = list(self.plan.val_prompts or ())
        size = self.run.data.val_batch_size or len(prompts)
        rollouts: list[Rollout] = []
        for start in range(0, len(prompts), size):
            part = dict(enumerate(prompts[start : start + size], start))
            generated = yield from self._generate(part, step, "validate", {})
            with self.observer.phase("scoring"):
                outcomes = self._outcomes(generated)
            rollouts += with_outcomes(generated, self._apply_failure_policy(outcomes))
        return rollouts

    def _outcomes(self, rollouts: Sequence[Rollout]) -> dict[SampleId, Outcome]:
        """Wait for the outcomes of rollouts; those that failed on their way were not scored."""
        self._scored |= self.scorer.collect()  # also of those steps that are collected at the same time
        scored = {each.id: self._scored.pop(each.id) for each in rollouts if each.id in self._scored}
        return with_environment(rollouts, scored, add=self.run.rewards.adds_environment)

    def _apply_failure_policy(self, outcomes: Mapping[SampleId, Outcome]) -> dict[SampleId, Outcome]:
        """Apply the configured failure policy; raises `IIVerlError` if there are too many failures."""
        check_failures(outcomes, self.run.rewards.api.max_failed_fraction)
        return apply_failure_policy(outcomes, self.run.rewards.api)

    def _generate(
        self, prompts: Mapping[int, Prompt], step: int, sampling: Sampling, lengths: Mapping[int, float]
    ) -> Collecting[list[Rollout]]:
        """Ask for responses; prompts whose earlier responses were long come first."""
        rollout = self.run.rollout
        members = {
            "train": range(rollout.n),
            "validate": range(rollout.val_kwargs.n),
            "baseline": range(rollout.n, rollout.n + 1),  # after the sampled responses to the same prompt
        }[sampling]
        label = {"train": "generating", "validate": "validating", "baseline": "greedy baselines"}[sampling]
        split: Split = "val" if sampling == "validate" else "train"
        whole = ROLLOUTERS[rollout.agent.default_agent_loop].reads_rows
        seeds = {group: _seed(rollout.seed, step, sampling == "validate", group) for group in prompts}
        requests = [
            RolloutRequest(SampleId(split, step, group, member), prompt, seeds[group])
            for group, prompt in [
                (group, each if whole else each.for_engine())
                for group, each in _longest_first(prompts, lengths)
            ]
            for member in members
        ]
        wanted = Generation(label, sampling, prompts, len(members), {each.id: each for each in requests})
        yield wanted
        _check(wanted)
        return wanted.rollouts

    def generate(self, wanted: Sequence[Generation]) -> Iterator[Generation]:
        """Let the engines generate, and submit each response to the scorer as it finishes; yield what has ended by that.

        All of `wanted` have the same sampling. Responses may be unfinished at the end, if an engine died or was
        interrupted. Then the engines are to be given weights, with which the same is asked for again. They are the same
        responses, unless the weights are other ones.
        """
        requests = {id: request for each in wanted for id, request in each.unfinished.items()}
        owner = {id: each for each in wanted for id in each.unfinished}
        for each in wanted:
            each.fruitless = each.fruitless + 1 if self.weights.version in each.versions else 0
            each.versions.add(self.weights.version)
        waiting, last = list(wanted), list[Generation]()
        with self.observer.phase(wanted[0].label, len(requests)) as phase:
            for batch in self.workers.generate(list(requests.values()), wanted[0].sampling):
                for each in batch:
                    generation = owner[each.id]
                    finished = replace(each, prompt=generation.prompts[each.id.group])
                    if not isinstance(finished.outcome, Failed):
                        self.scorer.submit(finished)
                    generation.rollouts.append(finished)
                    del generation.unfinished[each.id]
                    generation.fruitless = 0
                phase.advance(len(batch), tokens=sum(each.response_length for each in batch))
                ended, waiting = (
                    [each for each in waiting if each.ended],
                    [each for each in waiting if not each.ended],
                )
                if waiting:
                    yield from ended
                else:
                    last = ended  # nothing is generated any more
        yield from last or [each for each in waiting if each.ended]


def _longest_first(prompts: Mapping[int, Prompt], known: Mapping[int, float]) -> list[tuple[int, Prompt]]:
    """Sort prompts by the length of their responses in earlier epochs, so that the longest start first."""
    mean_length = sum(known.values()) / len(known) if known else 0.0
    return sorted(prompts.items(), key=lambda item: -known.get(item[1].row, mean_length))


def advance(state: TrainState, data: StepData) -> None:
    """Let a state, in place, go on by the data of a step that was collected earlier."""
    state.batches_consumed += int(data.metrics.get(GENERATION_ROUNDS, 1))
    _remember_lengths(state.response_lengths, data.rollouts)


def _remember_lengths(known: dict[int, float], rollouts: Sequence[Rollout]) -> None:
    lengths: dict[int, list[int]] = {}
    for rollout in rollouts:
        lengths.setdefault(rollout.prompt.row, []).append(rollout.response_length)
    known |= {row: sum(each) / len(each) for row, each in lengths.items()}


def _seed(seed: int, step: int, validate: bool, group: int) -> int:
    """Derive a seed per prompt and step, so that a single rollout can be reproduced."""
    return int(
        np.random.SeedSequence([abs(seed), step, int(validate), group]).generate_state(1, np.uint64)[0]
    )


def _check(wanted: Generation) -> None:
    """Check that every response exists exactly once, generated by weights that the engines were given for it."""
    rollouts, groups, n = wanted.rollouts, len(wanted.prompts), wanted.members
    ids = {rollout.id for rollout in rollouts}
    if len(rollouts) != groups * n or len(ids) != len(rollouts):
        raise RuntimeError(
            f"the engines gave {len(rollouts)} responses ({len(ids)} distinct) for {groups} × {n}"
        )
    unknown = {version for each in rollouts for version in each.versions} - wanted.versions
    if unknown:
        raise RuntimeError(
            f"responses were written by weights of version {sorted(unknown)}, not {sorted(wanted.versions)}"
        )
