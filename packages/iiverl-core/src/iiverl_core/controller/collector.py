"""Collect rollouts and their scores, for a training step and for validation."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import numpy as np

from iiverl_core.config import RunConfig
from iiverl_core.controller.batch import drop_small_groups, groups_with_reward_variance
from iiverl_core.controller.observer import Observer
from iiverl_core.controller.scoring import Scoring
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import PromptOrder, PromptSet
from iiverl_core.registry import ROLLOUTERS, EstimatorInfo
from iiverl_core.rewards import Scorer
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.samples import Prompt, Rollout, SampleId, Split
from iiverl_core.telemetry import Timers
from iiverl_reward_client import Failed, Scored

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
    took to collect them, by metric name. If they come in several parts, `parts` are the groups of each, as they came.
    `staleness` says by how many steps the weights of each version among them are older than in turn; it is empty in turn.
    """

    step: int
    rollouts: list[Rollout] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    baselines: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    parts: list[list[int]] = field(default_factory=list)
    staleness: dict[int, int] = field(default_factory=dict)

    def cut(self) -> "Iterator[StepData]":
        """Yield the step's parts as they came; the last has what belongs to no group. Without `parts`, yield the step."""
        if not self.parts:
            yield self
            return
        for groups in self.parts:
            whole = replace(self, baselines={}, metrics={}, timings={}) if groups != self.parts[-1] else self
            rollouts = [each for each in self.rollouts if each.id.group in groups]
            yield replace(whole, rollouts=rollouts, groups=groups, parts=[groups])

    def add(self, part: "StepData") -> None:
        """Add a part, whose groups may belong anywhere among those that are there."""
        self.rollouts = sorted([*self.rollouts, *part.rollouts], key=lambda rollout: rollout.id)
        self.groups = sorted([*self.groups, *part.groups])
        self.baselines |= part.baselines
        self.metrics |= part.metrics
        self.timings |= part.timings
        self.parts += part.parts
        self.staleness |= part.staleness

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


@dataclass(eq=False)
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
    finished: set[int] = field(default_factory=set)
    """The groups of which all responses have come."""

    def __post_init__(self) -> None:
        self._missing = dict.fromkeys(self.prompts, self.members)

    def add(self, rollout: Rollout) -> None:
        """Add a finished response."""
        group = rollout.id.group
        del self.unfinished[rollout.id]
        self.rollouts.append(rollout)
        self.fruitless = 0
        self._missing[group] -= 1
        if not self._missing[group]:
            self.finished.add(group)

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
            prompts = self._next_prompts(state, data.rollouts[-1].id.group + 1 if data.rollouts else 0)
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

    def answer(self, step: int, state: TrainState) -> Collecting[tuple[StepData, TrainState]]:
        """Collect what `collect` does without replacing groups or baselines, but leave it unscored."""
        state, timers = replace(state, response_lengths=dict(state.response_lengths)), Timers()
        prompts = self._next_prompts(state, 0)
        with timers("gen"):
            rollouts = yield from self._generate(prompts, step, "train", state.response_lengths)
        _remember_lengths(state.response_lengths, rollouts)
        return StepData(step, rollouts, list(prompts), timings=timers.drain()), state

    def _next_prompts(self, state: TrainState, first: int) -> dict[int, Prompt]:
        """Take the next batch of prompts, by group from `first` on."""
        _, rows = self.plan.order.batch(state.batches_consumed)
        state.batches_consumed += 1
        return {first + i: self.plan.prompts[row] for i, row in enumerate(rows)}

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
        scoring = self.scoring(step, len(rollouts) + len(greedy))
        with timers("reward"), self.observer.phase("scoring"):
            scored = scoring.score((*rollouts, *greedy))
        members = self.run.rollout.n
        baselines = {
            rollout.id.group: rollout.outcome.score
            for rollout in scored
            if rollout.id.member >= members and isinstance(rollout.outcome, Scored)
        }
        return [each for each in scored if each.id.member < members], baselines, scoring.hidden_fraction

    def scoring(self, step: int, total: int) -> Scoring:
        """Start to score `total` rollouts."""
        return Scoring(self.run, self.scorer, self.observer, step, total)

    def validate(self, step: int) -> Collecting[list[Rollout]]:
        """Collect scored responses to the validation prompts."""
        prompts = list(self.plan.val_prompts or ())
        size = self.run.data.val_batch_size or len(prompts)
        rollouts: list[Rollout] = []
        for start in range(0, len(prompts), size):
            part = dict(enumerate(prompts[start : start + size], start))
            generated = yield from self._generate(part, step, "validate", {})
            with self.observer.phase("scoring"):
                rollouts += self.scoring(step, len(generated)).score(generated, shaped=False)
        return rollouts

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
        """Let the engines generate, and submit each response to the scorer as it finishes.

        Yields which of `wanted` got responses, more than once if they come one after the other; those that ended with the
        last response, when nothing is generated any more.

        All of `wanted` have the same sampling. Responses may be unfinished at the end, if an engine died or was
        interrupted. Then the engines are to be given weights, with which the same is asked for again. They are the same
        responses, unless the weights are other ones.
        """
        requests = {id: request for each in wanted for id, request in each.unfinished.items()}
        owner = {id: each for each in wanted for id in each.unfinished}
        for each in wanted:
            each.fruitless = each.fruitless + 1 if self.weights.version in each.versions else 0
            each.versions.add(self.weights.version)
        waiting = list(wanted)  # to be yielded as ended
        with self.observer.phase(wanted[0].label, len(requests)) as phase:
            for batch in self.workers.generate(list(requests.values()), wanted[0].sampling):
                for each in batch:
                    generation = owner[each.id]
                    finished = replace(each, prompt=generation.prompts[each.id.group])
                    if not isinstance(finished.outcome, Failed):
                        self.scorer.submit(finished)
                    generation.add(finished)
                phase.advance(len(batch), tokens=sum(each.response_length for each in batch))
                got = {owner[each.id] for each in batch}
                if unfinished := [each for each in waiting if not each.ended]:
                    yield from [each for each in waiting if each.ended or each in got]
                    waiting = unfinished
        yield from [each for each in waiting if each.ended]


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
