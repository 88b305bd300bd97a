"""PPO, GRPO and their family, step by step.

A step is: answer a batch of prompts, scoring answers while others are still being written; say of each token of each
answer how much better it was than expected; teach the critic, where there is one, what to expect; make the better
tokens likelier; give the new weights to what generates.

What is left out where it changes nothing: old log-probs where a step makes a single update (the ratio is 1 by
definition), the reference policy where no KL is used, the critic where the estimator needs none.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from iiverl_core.algorithms import AdaptiveKL, FixedKL, KLController, find_estimator, find_policy_loss
from iiverl_core.cluster.worker import Advantages, Trained
from iiverl_core.config import Config
from iiverl_core.controller.batch import mini_batch_count, mini_batches, with_arrays
from iiverl_core.controller.experience import Experience, Explorer, Plan
from iiverl_core.controller.observer import Observer
from iiverl_core.controller.workers import Workers
from iiverl_core.errors import IIVerlError
from iiverl_core.rewards import Scorer
from iiverl_core.samples import Sample
from iiverl_core.training.batching import ROLLOUT_LOG_PROBS
from iiverl_core.training.metrics import over_updates
from iiverl_core.training.schedule import learning_rate
from iiverl_reward_client import Scored


class Trainer:
    """The loop over steps. Builds nothing that is heavy: everything it works with is given."""

    def __init__(
        self, config: Config, plan: Plan, workers: Workers, scorer: Scorer, observer: Observer
    ) -> None:
        self.config, self.plan = config, plan
        self.workers, self.observer = workers, observer
        self.timers = observer.timers
        self.estimator = find_estimator(config.algorithm.adv_estimator)
        self.policy_loss = find_policy_loss(config.actor_rollout_ref.actor.policy_loss.loss_mode)
        self.explorer = Explorer(config, plan, workers, scorer, observer, self.estimator)
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
        experience = self.explorer.experience(step, self.weights_version)
        metrics = experience.metrics
        batch = experience.comparable(self.estimator)
        trains_actor = step >= self.config.trainer.critic_warmup or not self.config.uses_critic
        self.workers.rest(forget=bool(batch) and trains_actor)  # new weights are to come
        in_batch = sum(sample.group in experience.groups for sample in experience.samples)
        metrics["reward/dropped_samples"] = float(in_batch - len(batch))
        sums: dict[str, Sequence[float]] = {}
        advantages = None

        if batch:
            batch, sums = self.evaluate(batch)
            with self.timers("adv"), self.observer.phase("advantages"):
                advantages = self.estimate(batch, experience)
                batch = with_arrays(batch, "advantages", advantages.advantages)
                batch = with_arrays(batch, "returns", advantages.returns)
            if self.kl.coef:
                metrics |= {"critic/kl": advantages.kl, "critic/kl_coeff": self.kl.coef}
                self.kl.update(advantages.kl, len(batch))
            if self.config.uses_critic:
                with self.timers("update_critic"):
                    metrics |= self.update("critic", batch, experience.groups, step)
            if trains_actor:
                with self.timers("update_actor"):
                    metrics |= self.update("actor", batch, experience.groups, step)
                with self.timers("update_weights"), self.observer.phase("weights to the engine"):
                    self.weights_version = step
                    self.workers.update_rollout_weights(self.weights_version)

        self.observer.samples(step, experience.samples, batch, advantages, sums, experience.baselines)
        metrics |= self.observer.describe(experience.samples, batch, advantages, self.workers.memory())
        self.check_mismatch(metrics)
        return metrics

    def evaluate(self, batch: list[Sample]) -> tuple[list[Sample], dict[str, Sequence[float]]]:
        """Compute what the models say of each token before the update, as far as something reads it."""
        sums: dict[str, Sequence[float]] = {}
        if self.needs_old_log_probs:
            with self.timers("old_log_prob"), self.observer.phase("old log-probs"):
                handles, sums["old"] = self.workers.evaluate("actor", batch)
                batch = with_arrays(batch, "old_log_probs", handles)
        if self.config.needs_reference:
            with self.timers("ref"), self.observer.phase("reference log-probs"):
                handles, sums["ref"] = self.workers.evaluate("reference", batch)
                batch = with_arrays(batch, "ref_log_probs", handles)
        if self.config.uses_critic:
            with self.timers("values"), self.observer.phase("values"):
                handles, _ = self.workers.evaluate("critic", batch)
                batch = with_arrays(batch, "values", handles)
        return batch, sums

    def estimate(self, batch: list[Sample], experience: Experience) -> Advantages:
        """Advantages and returns of a step's samples."""
        scores = [sample.outcome.score for sample in batch if isinstance(sample.outcome, Scored)]
        baselines = None
        if self.estimator.greedy_baseline:
            baselines = [experience.baselines[sample.group] for sample in batch]
        return self.workers.advantages(batch, scores, baselines, self.kl.coef)

    def update(
        self, role: Trained, batch: Sequence[Sample], groups: Sequence[int], step: int
    ) -> dict[str, float]:
        """Update a model on a step's samples, one mini-batch after another; metrics are means over updates."""
        section = self.config.actor_rollout_ref.actor if role == "actor" else self.config.critic
        lr = learning_rate(step - 1, self.plan.total_steps, section.optim)
        updates: list[Mapping[str, float]] = []
        total = section.ppo_epochs * mini_batch_count(len(groups), section.ppo_mini_batch_size)
        with self.observer.phase(f"updating the {role}", total) as phase:
            for epoch in range(section.ppo_epochs):
                seeds = [self.config.data.seed, step, epoch]
                order = np.random.default_rng(seeds) if section.shuffle else None
                for mini_batch in mini_batches(batch, groups, section.ppo_mini_batch_size, order):
                    if role == "actor" and self.policy_loss.select_tokens is not None:
                        mini_batch = self.choose(mini_batch, unchanged=not updates)
                    metrics, division = self.workers.update(
                        role, mini_batch, lr, self.arrays(role, mini_batch)
                    )
                    if role == "actor":
                        self.observer.divided(mini_batch, division)
                    updates.append(metrics)
                    phase.advance()
        means = over_updates(updates) | {f"{role}/lr": lr}
        if role == "actor" and self.config.actor_rollout_ref.actor.use_kl_loss:
            means["actor/kl_coef"] = self.config.actor_rollout_ref.actor.kl_loss_coef
        return means

    def choose(self, mini_batch: list[Sample], *, unchanged: bool) -> list[Sample]:
        """Let the policy loss choose tokens of the whole mini-batch; `unchanged` weights still give the old log-probs."""
        if unchanged:
            handles = [sample.arrays["old_log_probs"] for sample in mini_batch]
        else:
            handles, _ = self.workers.evaluate("actor", mini_batch)
        mini_batch = with_arrays(mini_batch, "log_probs", handles)
        return with_arrays(mini_batch, "chosen", self.workers.choose(mini_batch))

    def arrays(self, role: Trained, mini_batch: Sequence[Sample]) -> tuple[str, ...]:
        """What a model's loss reads besides tokens."""
        if role == "critic":
            return "values", "returns"
        rollout = self.config.actor_rollout_ref.rollout
        known = mini_batch[0].arrays
        names = tuple(name for name in ("advantages", "old_log_probs", "chosen") if name in known)
        names += ("ref_log_probs",) if self.config.actor_rollout_ref.actor.use_kl_loss else ()
        # A greedy engine's log-probs are those of a choice without alternatives, and compare with nothing.
        return names + ((ROLLOUT_LOG_PROBS,) if rollout.do_sample else ())

    def validate(self, step: int) -> dict[str, float]:
        """Answer the validation prompts, and say how well."""
        with self.timers("testing"):
            samples = self.explorer.validate(step, self.weights_version)
        return self.observer.validation(step, samples)

    def check_mismatch(self, metrics: Mapping[str, float]) -> None:
        """See that the engine's log-probs are those of the policy that is trained.

        Raises:
            IIVerlError: `rollout/kl` is above `algorithm.rollout_correction.mismatch_kl_limit`.
        """
        config, kl = self.config.algorithm.rollout_correction, metrics.get("rollout/kl", 0.0)
        if config.mismatch_kl_limit is not None and kl > config.mismatch_kl_limit:
            raise IIVerlError(
                f"The engine generates from another distribution than the one that is trained: rollout/kl is {kl:.3g} "
                "nats a token, above algorithm.rollout_correction.mismatch_kl_limit "
                f"({config.mismatch_kl_limit:g}).\nSee that rollout.dtype is the trainer's, and that the engine "
                "supports the model; with top_k or top_p the engine's distribution is cut off, the trainer's is not."
            )
        if config.mismatch_kl_warning is not None and kl > config.mismatch_kl_warning:
            self.observer.warn_once(
                f"The engine's log-probs differ from the trainer's: rollout/kl is {kl:.3g} nats a token "
                f"(algorithm.rollout_correction.mismatch_kl_warning: {config.mismatch_kl_warning:g}). "
                "algorithm.rollout_correction.rollout_is: token makes up for it."
            )

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the policy changes between generation and the last update, or something else reads them."""
        actor = self.config.actor_rollout_ref.actor
        batches = mini_batch_count(self.config.data.train_batch_size, actor.ppo_mini_batch_size)
        updates = actor.ppo_epochs * batches
        return updates > 1 or self.kl.coef != 0 or self.policy_loss.select_tokens is not None


def _kl_controller(config: Config) -> KLController:
    """The weight of the KL in the reward, 0 for none."""
    control = config.algorithm.kl_ctrl
    if not config.kl_in_reward:
        return FixedKL(0.0)
    if control.type == "adaptive" and control.target_kl and control.horizon:
        return AdaptiveKL(control.kl_coef, control.target_kl, control.horizon)
    return FixedKL(control.kl_coef)
