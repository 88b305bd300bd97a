"""Answers to prompts, and their scores: for a step to learn from, and for validation."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from iiverl_core.algorithms import Estimator
from iiverl_core.cluster.generation import Question
from iiverl_core.config import Config
from iiverl_core.controller.batch import comparable, informative, with_outcomes
from iiverl_core.controller.observer import Observer
from iiverl_core.controller.workers import Workers
from iiverl_core.data import PromptOrder, PromptSet
from iiverl_core.errors import IIVerlError
from iiverl_core.rewards import Key, Scorer, check_failures, settle, shape_overlong
from iiverl_core.rollout import Sampling
from iiverl_core.samples import Prompt, Sample
from iiverl_reward_client import Outcome, Scored

ROUNDS = 10  # of asking engines that give nothing, after which something else is wrong than a death


@dataclass(frozen=True)
class Plan:
    """What the run goes through: prompts in their order, prompts to validate on, and the number of steps."""

    prompts: PromptSet
    order: PromptOrder
    val_prompts: PromptSet | None
    total_steps: int


@dataclass
class Experience:
    """What a step has to learn from.

    `samples` is all that was generated, in the order of groups and members; `groups` those that make the step's batch;
    `baselines` the score of the greedy response to a group's prompt, where the estimator asks for one.
    """

    samples: list[Sample] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    baselines: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def comparable(self, estimator: Estimator) -> list[Sample]:
        """Keep the samples that the estimator can say something of."""
        groups = set(self.groups)
        if estimator.greedy_baseline:
            groups &= self.baselines.keys()
        return comparable(self.samples, groups, estimator.min_group_size)


class Explorer:
    """Lets the engines answer prompts, and scores the answers while others are still being written.

    `drawn` counts the batches of prompts that were taken from the data so far.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        workers: Workers,
        scorer: Scorer,
        observer: Observer,
        estimator: Estimator,
    ) -> None:
        self.config, self.plan = config, plan
        self.workers, self.scorer, self.observer = workers, scorer, observer
        self.estimator = estimator
        self.drawn = 0
        self._lengths: dict[int, float] = {}

    def experience(self, step: int, version: int) -> Experience:
        """Answer a step's prompts `n` times each, with weights of this version.

        With dynamic sampling (DAPO, arXiv:2503.14476, section 3.2), groups that teach nothing, because all of their
        answers score the same, are replaced: further prompts are answered until the batch is full, or as many batches
        as allowed have been. What is full by then is trained on.
        """
        filtered, wanted = self.config.algorithm.filter_groups, self.config.data.train_batch_size
        # Without a limit, no prompt of a step is asked twice: where nothing differs any more, there is an end.
        limit = (filtered.max_num_gen_batches or self.plan.order.steps_per_epoch) if filtered.enable else 1
        experience, batches = Experience(), 0
        hidden: list[float] = []
        while batches < limit and len(experience.groups) < wanted:
            batches += 1
            _, rows = self.plan.order.batch(self.drawn)
            self.drawn += 1
            first = experience.samples[-1].group + 1 if experience.samples else 0
            prompts = {first + i: self.plan.prompts[row] for i, row in enumerate(rows)}
            samples, baselines, share = self._answer(prompts, step, version)
            experience.samples += samples
            experience.baselines |= baselines
            hidden.append(share)
            experience.groups += (
                informative(samples, filtered.metric or "score") if filtered.enable else list(prompts)
            )
        experience.metrics["reward/hidden_fraction"] = sum(hidden) / len(hidden)
        if filtered.enable:
            asked = len({sample.group for sample in experience.samples})
            experience.metrics |= {
                "train/num_gen_batches": float(batches),
                "train/uniform_groups": float(asked - len(experience.groups)),
                "train/missing_groups": float(max(wanted - len(experience.groups), 0)),
            }
            experience.groups = experience.groups[:wanted]
        return experience

    def _answer(
        self, prompts: Mapping[int, Prompt], step: int, version: int
    ) -> tuple[list[Sample], dict[int, float], float]:
        """Answer prompts, given by group: scored samples, baselines, and the share of scoring that generation hid."""
        rollout = self.config.actor_rollout_ref.rollout
        with self.observer.timers("gen"):
            samples = self._generate(prompts, step, version, "train")
            greedy: list[Sample] = []
            if self.estimator.greedy_baseline:
                greedy = self._generate(prompts, step, version, "baseline")
        with self.observer.timers("reward"), self.observer.phase("scoring"):
            generated = time.perf_counter()
            outcomes = self.scorer.collect()
            exposed, busy = time.perf_counter() - generated, self.scorer.busy_seconds
        try:
            settled = self._settled(outcomes)
        except IIVerlError:
            # The step is not trained on, but what was generated and what did score it is there to be looked at.
            self.observer.samples(step, with_outcomes(samples, outcomes), [], None, {}, {})
            raise
        overlong = self.config.reward_model.overlong_buffer
        if overlong.enable:
            lengths = {(s.group, s.member): s.response_length for s in (*samples, *greedy)}
            settled = shape_overlong(
                settled,
                lengths,
                limit=rollout.response_length,
                buffer=overlong.len,
                factor=overlong.penalty_factor,
            )
        baselines = {
            sample.group: sample.outcome.score
            for sample in with_outcomes(greedy, settled)
            if isinstance(sample.outcome, Scored)
        }
        return with_outcomes(samples, settled), baselines, max(0.0, 1 - exposed / busy) if busy else 1.0

    def validate(self, step: int, version: int) -> list[Sample]:
        """Answer the validation prompts, and score the answers."""
        prompts = list(self.plan.val_prompts or ())
        size = self.config.data.val_batch_size or len(prompts)
        samples: list[Sample] = []
        for start in range(0, len(prompts), size):
            part = dict(enumerate(prompts[start : start + size], start))
            answers = self._generate(part, step, version, "validate")
            with self.observer.phase("scoring"):
                outcomes = self.scorer.collect()
            samples += with_outcomes(answers, self._settled(outcomes))
        return samples

    def _settled(self, outcomes: Mapping[Key, Outcome]) -> dict[Key, Outcome]:
        """Do with failures what the configuration says; raises `IIVerlError` where they are too many."""
        check_failures(outcomes, self.config.reward_api.max_failed_fraction)
        return settle(outcomes, self.config.reward_api)

    def _generate(
        self, prompts: Mapping[int, Prompt], step: int, version: int, sampling: Sampling
    ) -> list[Sample]:
        """Generate with the engines' current weights, and hand each sample to the scorer as it finishes.

        What an engine owes that dies is generated again, by the same weights and with the same random numbers, once
        the engine is back.
        """
        rollout = self.config.actor_rollout_ref.rollout
        n = {"train": rollout.n, "validate": rollout.val_kwargs.n, "baseline": 1}[sampling]
        said = {"train": "generating", "validate": "validating", "baseline": "greedy baselines"}[sampling]
        questions = [
            Question(group, prompt, _seed(rollout.seed, step, sampling == "validate", group))
            for group, prompt in self._longest_first(prompts)
        ]
        samples: list[Sample] = []
        owed = {group: set(range(n)) for group in prompts}
        fruitless = 0
        with self.observer.phase(said, len(prompts) * n) as phase:
            while questions and fruitless < ROUNDS:
                before = len(samples)
                for finished in self.workers.generate(questions, sampling):
                    for sample in finished:
                        owed[sample.group].discard(sample.member)
                    if sampling == "baseline":  # counted behind the responses to the same prompt
                        finished = [replace(sample, member=rollout.n) for sample in finished]
                    for sample in finished:
                        self.scorer.submit(sample)
                    samples += finished
                    phase.advance(len(finished), tokens=sum(sample.response_length for sample in finished))
                questions = [
                    replace(question, members=tuple(sorted(owed[question.group])))
                    for question in questions
                    if owed[question.group]
                ]
                fruitless = 0 if len(samples) > before else fruitless + 1
                if questions:
                    self.workers.update_rollout_weights(version)
        _check(samples, len(prompts), n, version)
        if sampling == "train":
            self._remember(samples)
        return samples

    def _longest_first(self, prompts: Mapping[int, Prompt]) -> list[tuple[int, Prompt]]:
        """Put the prompts first whose answers were long in earlier epochs: what is started last should be done soon."""
        known = self._lengths
        usual = sum(known.values()) / len(known) if known else 0.0
        return sorted(prompts.items(), key=lambda item: -known.get(item[1].row, usual))

    def _remember(self, samples: Sequence[Sample]) -> None:
        lengths: dict[int, list[int]] = {}
        for sample in samples:
            lengths.setdefault(sample.prompt.row, []).append(sample.response_length)
        self._lengths |= {row: sum(each) / len(each) for row, each in lengths.items()}


def _seed(seed: int, step: int, validate: bool, group: int) -> int:
    """A seed for each prompt of each step, so that a sample can be drawn again by itself."""
    return int(
        np.random.SeedSequence([abs(seed), step, int(validate), group]).generate_state(1, np.uint64)[0]
    )


def _check(samples: Sequence[Sample], groups: int, n: int, version: int) -> None:
    """Make sure that every response is there once, written by the current weights."""
    keys = {(sample.group, sample.member) for sample in samples}
    if len(samples) != groups * n or len(keys) != len(samples):
        raise RuntimeError(
            f"the engines gave {len(samples)} responses ({len(keys)} distinct) for {groups} × {n}"
        )
    stale = {sample.weights_version for sample in samples} - {version}
    if stale:
        raise RuntimeError(f"responses were written by weights of version {sorted(stale)}, not {version}")
