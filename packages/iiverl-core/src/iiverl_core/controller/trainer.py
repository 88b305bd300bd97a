"""GRPO and its family, step by step.

A step is: answer a batch of prompts several times each, scoring answers while others are still being written; say how
much better each answer is than its group; make the better ones likelier; give the new weights to what generates.

What is left out where it changes nothing: old log-probs where a step makes a single update (the ratio is 1 by
definition), and the reference policy where no KL is used.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from iiverl_core.algorithms import AdaptiveKL, FixedKL, KLController
from iiverl_core.config import Config
from iiverl_core.controller.batch import (
    comparable,
    mini_batch_count,
    mini_batches,
    with_arrays,
    with_outcomes,
)
from iiverl_core.controller.observer import Observer
from iiverl_core.controller.workers import Workers
from iiverl_core.data import PromptOrder, PromptSet
from iiverl_core.errors import IIVerlError
from iiverl_core.rewards import Scorer, check_failures, settle
from iiverl_core.samples import Prompt, Sample
from iiverl_core.training.schedule import learning_rate
from iiverl_reward_client import Scored


@dataclass(frozen=True)
class Plan:
    """What the run goes through: prompts in their order, prompts to validate on, and the number of steps."""

    prompts: PromptSet
    order: PromptOrder
    val_prompts: PromptSet | None
    total_steps: int


class Trainer:
    """The loop over steps. Builds nothing: everything it works with is given."""

    def __init__(
        self, config: Config, plan: Plan, workers: Workers, scorer: Scorer, observer: Observer
    ) -> None:
        self.config, self.plan = config, plan
        self.workers, self.scorer, self.observer = workers, scorer, observer
        self.timers = observer.timers
        self.kl = _kl_controller(config)
        self.weights_version = 0

    def fit(self) -> None:
        """Train to the last step, validating when it is due."""
        trainer = self.config.trainer
        self.workers.update_rollout_weights(self.weights_version)
        if trainer.val_before_train and self.plan.val_prompts:
            self.observer.log(self.validate(0), step=0)
        if trainer.val_only:
            return
        for step in range(1, self.plan.total_steps + 1):
            with self.timers("step"):
                metrics = self.step(step)
                last = step == self.plan.total_steps
                if (
                    self.plan.val_prompts
                    and trainer.test_freq > 0
                    and (last or step % trainer.test_freq == 0)
                ):
                    metrics |= self.validate(step)
            self.observer.step_done(step, metrics)

    def step(self, step: int) -> dict[str, float]:
        """One training step: generate, score, compare, update."""
        _, rows = self.plan.order.batch(step - 1)
        samples, metrics = self.rollout([self.plan.prompts[row] for row in rows], step)
        batch = comparable(samples)
        metrics["reward/dropped_samples"] = float(len(samples) - len(batch))
        sums: dict[str, Sequence[float]] = {}

        if batch and self.needs_old_log_probs:
            with self.timers("old_log_prob"), self.observer.phase("old log-probs"):
                handles, sums["old"] = self.workers.log_probs("actor", batch)
                batch = with_arrays(batch, "old_log_probs", handles)
        if batch and self.config.needs_reference:
            with self.timers("ref"), self.observer.phase("reference log-probs"):
                handles, sums["ref"] = self.workers.log_probs("reference", batch)
                batch = with_arrays(batch, "ref_log_probs", handles)

        advantages = None
        if batch:
            with self.timers("adv"), self.observer.phase("advantages"):
                scores = [sample.outcome.score for sample in batch if isinstance(sample.outcome, Scored)]
                advantages = self.workers.advantages(batch, scores, self.kl.coef)
                batch = with_arrays(batch, "advantages", advantages.handles)
            if self.kl.coef:
                metrics |= {"critic/kl": advantages.kl, "critic/kl_coeff": self.kl.coef}
                self.kl.update(advantages.kl, len(batch))
            with self.timers("update_actor"):
                metrics |= self.update_actor(batch, len(rows), step)
            with self.timers("update_weights"), self.observer.phase("weights to the engine"):
                self.weights_version = step
                self.workers.update_rollout_weights(self.weights_version)

        self.observer.samples(step, samples, batch, advantages, sums)
        return metrics | self.observer.describe(samples, batch, advantages, self.workers.memory())

    def rollout(self, prompts: Sequence[Prompt], step: int) -> tuple[list[Sample], dict[str, float]]:
        """Answer each prompt `n` times, and score the answers while others are still being written."""
        with self.timers("gen"):
            samples = self.generate(prompts, step, validate=False)
        with self.timers("reward"), self.observer.phase("scoring"):
            generated = time.perf_counter()
            outcomes = self.scorer.collect()
            exposed, busy = time.perf_counter() - generated, self.scorer.busy_seconds
        try:
            check_failures(outcomes, self.config.reward_api.max_failed_fraction)
            settled = settle(outcomes, self.config.reward_api)
        except IIVerlError:
            # The step is not trained on, but what was generated and what did score it is there to be looked at.
            self.observer.samples(step, with_outcomes(samples, outcomes), [], None, {})
            raise
        samples = with_outcomes(samples, settled)
        return samples, {"reward/hidden_fraction": max(0.0, 1 - exposed / busy) if busy else 1.0}

    def generate(self, prompts: Sequence[Prompt], step: int, *, validate: bool) -> list[Sample]:
        """Generate with the engines' current weights, and hand each sample to the scorer as it finishes."""
        rollout = self.config.actor_rollout_ref.rollout
        n = rollout.val_kwargs.n if validate else rollout.n
        requests = [
            (group, prompt, _seed(rollout.seed, step, validate, group))
            for group, prompt in enumerate(prompts)
        ]
        samples: list[Sample] = []
        with self.observer.phase("validating" if validate else "generating", len(prompts) * n) as phase:
            for finished in self.workers.generate(requests, validate=validate):
                for sample in finished:
                    self.scorer.submit(sample)
                samples += finished
                phase.advance(len(finished), tokens=sum(sample.response_length for sample in finished))
        _check_rollout(samples, len(prompts), n, self.weights_version)
        return samples

    def update_actor(self, batch: Sequence[Sample], groups: int, step: int) -> dict[str, float]:
        """Update the policy on a step's samples, one mini-batch after another; metrics are means over updates."""
        actor = self.config.actor_rollout_ref.actor
        lr = learning_rate(step - 1, self.plan.total_steps, actor.optim)
        arrays = tuple(name for name in ("advantages", "old_log_probs") if name in batch[0].arrays)
        arrays += ("ref_log_probs",) if actor.use_kl_loss else ()
        updates: list[Mapping[str, float]] = []
        total = actor.ppo_epochs * mini_batch_count(groups, actor.ppo_mini_batch_size)
        with self.observer.phase("updating", total) as phase:
            for epoch in range(actor.ppo_epochs):
                order = np.random.default_rng([self.config.data.seed, step, epoch]) if actor.shuffle else None
                for mini_batch in mini_batches(batch, groups, actor.ppo_mini_batch_size, order):
                    metrics, division = self.workers.update_actor(mini_batch, lr, arrays)
                    self.observer.divided(mini_batch, division)
                    updates.append(metrics)
                    phase.advance()
        means = {name: float(np.mean([metrics[name] for metrics in updates])) for name in updates[0]}
        if actor.use_kl_loss:
            means["actor/kl_coef"] = actor.kl_loss_coef
        return means | {"actor/lr": lr}

    def validate(self, step: int) -> dict[str, float]:
        """Answer the validation prompts, and return the mean score of each data source."""
        prompts = list(self.plan.val_prompts or ())
        size = self.config.data.val_batch_size or len(prompts)
        samples: list[Sample] = []
        with self.timers("testing"):
            for start in range(0, len(prompts), size):
                part = self.generate(prompts[start : start + size], step, validate=True)
                with self.observer.phase("scoring"):
                    outcomes = self.scorer.collect()
                check_failures(outcomes, self.config.reward_api.max_failed_fraction)
                samples += with_outcomes(part, settle(outcomes, self.config.reward_api))
        return self.observer.validation(step, samples)

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the policy changes between generation and the last update, or the reward holds a KL."""
        actor = self.config.actor_rollout_ref.actor
        batches = mini_batch_count(self.config.data.train_batch_size, actor.ppo_mini_batch_size)
        updates = actor.ppo_epochs * batches
        return updates > 1 or self.kl.coef != 0


def _kl_controller(config: Config) -> KLController:
    """The weight of the KL in the reward, 0 for none."""
    control = config.algorithm.kl_ctrl
    if not config.kl_in_reward:
        return FixedKL(0.0)
    if control.type == "adaptive" and control.target_kl and control.horizon:
        return AdaptiveKL(control.kl_coef, control.target_kl, control.horizon)
    return FixedKL(control.kl_coef)


def _seed(seed: int, step: int, validate: bool, group: int) -> int:
    """A seed for each prompt of each step, so that a sample can be drawn again by itself."""
    return int(
        np.random.SeedSequence([abs(seed), step, int(validate), group]).generate_state(1, np.uint64)[0]
    )


def _check_rollout(samples: Sequence[Sample], groups: int, n: int, version: int) -> None:
    """Make sure that every response is there once, written by the current weights."""
    keys = {(sample.group, sample.member) for sample in samples}
    if len(samples) != groups * n or len(keys) != len(samples):
        raise RuntimeError(
            f"the engines gave {len(samples)} responses ({len(keys)} distinct) for {groups} × {n}"
        )
    stale = {sample.weights_version for sample in samples} - {version}
    if stale:
        raise RuntimeError(f"responses were written by weights of version {sorted(stale)}, not {version}")
