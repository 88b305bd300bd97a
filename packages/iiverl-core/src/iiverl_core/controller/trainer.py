"""PPO, GRPO and their family, step by step.

A step generates responses to a batch of prompts, scores them while others are still being generated, computes
advantages, updates the critic, if there is one, and the actor, and syncs the new weights to the engines. With
`trainer.max_staleness`, responses of coming steps are generated meanwhile (`rollout_queue`).

Unnecessary work is skipped: old log-probs if a step makes a single update (the ratio is 1 by definition) or those of the
engine take their place, the reference policy without a KL, the critic if the estimator does not need one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from iiverl_core.cluster.messages import Advantages, StalenessRuns, Trained
from iiverl_core.config import RunConfig
from iiverl_core.controller.batch import (
    epoch_order,
    mini_batch_count,
    mini_batches,
    staleness_runs,
    sums_by_rollout,
    trained_sequences,
    with_arrays,
)
from iiverl_core.controller.checkpointing import Checkpointer
from iiverl_core.controller.collector import Plan, StepData
from iiverl_core.controller.observer import Observer, StepRecord
from iiverl_core.controller.state import AdaptiveKL, FixedKL, TrainState
from iiverl_core.controller.step_recorder import StepRecorder
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.errors import IIVerlError, NonFiniteError
from iiverl_core.registry.algorithms import estimator_info, policy_loss_info
from iiverl_core.samples import ROLLOUT_LOG_PROBS, Rollout, SequenceRef
from iiverl_core.stopping import Stop
from iiverl_core.training.metrics import over_updates
from iiverl_core.training.planning import Work
from iiverl_core.training.schedule import learning_rate
from iiverl_reward_client import Scored

MISMATCH = ("rollout/kl", "rollout/ratio/")  # metrics that compare engine and trainer


class StepRollouts(Protocol):
    """The rollouts of each step, wherever they come from: `RolloutQueue` and `RecordedRollouts`."""

    def start(self) -> None:
        """Get ready for the first step."""
        ...

    def stream(self, step: int) -> Iterator[StepData]:
        """Yield the rollouts of a step: all together, or each mini-batch of the first epoch on its own."""
        ...

    def trained(self, step: int) -> Mapping[str, float]:
        """Note that a step's updates are done; return metrics."""
        ...

    def validate(self, step: int) -> list[Rollout]:
        """Return scored responses to the validation prompts by the newest weights."""
        ...

    def checkpoint(self) -> tuple[TrainState, list[StepData]]:
        """Return the state to save after the last trained step, and rollouts of later steps that it includes."""
        ...


@dataclass
class Updates:
    """The updates of a step so far: the metrics of each, and the work of each rank, by model.

    `sequences` are those that the actor was updated on in the first epoch.
    """

    metrics: dict[Trained, list[Mapping[str, float]]] = field(default_factory=dict)
    work: dict[Trained, list[list[Work]]] = field(default_factory=dict)
    sequences: list[SequenceRef] = field(default_factory=list)

    def add(self, role: Trained, metrics: Mapping[str, float], work: list[Work]) -> None:
        """Add an update."""
        self.metrics.setdefault(role, []).append(metrics)
        self.work.setdefault(role, []).append(work)


class Trainer:
    """The loop over steps. Its parts are passed in.

    `state` is the state after the step from which the run continues; it is updated during the run.
    """

    def __init__(
        self,
        run: RunConfig,
        plan: Plan,
        workers: WorkerClient,
        rollouts: StepRollouts,
        observer: Observer,
        checkpoints: Checkpointer,
        state: TrainState,
        stop: Stop,
    ) -> None:
        self.run, self.plan, self.state, self.stop = run, plan, state, stop
        self.workers, self.rollouts = workers, rollouts
        self.observer, self.checkpoints = observer, checkpoints
        self.recorder = StepRecorder(run, workers, observer, plan.prompts)
        self.timers = observer.timers
        self.skipped = 0  # consecutive skipped updates
        self.estimator = estimator_info(run.algorithm.adv_estimator)
        self.policy_loss = policy_loss_info(run.loss.policy_loss)
        self.kl = _kl_controller(run, state.kl_coef)

    def fit(self) -> None:
        """Train to the last step, or until the run is requested to stop; validate and save when due.

        Raises:
            CheckpointError: a checkpoint cannot be written.
        """
        trainer, state = self.run.trainer, self.state
        self.workers.sleep(
            discard_weights=True
        )  # a cache that is mapped would be in the way of the first update
        self.rollouts.start()
        if self.plan.val_prompts and (trainer.val_only or (trainer.val_before_train and state.step == 0)):
            self.observer.log(self.validate(state.step), state.step)
        if trainer.val_only:
            return
        with self.stop.heeded() if self.checkpoints.enabled else nullcontext():
            last = state.step == self.plan.total_steps
            while not last:
                last = self.next_step()
            self.checkpoints.finish()

    def next_step(self) -> bool:
        """Run the next step, validate and save if due, and report it; return whether it is the last."""
        trainer, step = self.run.trainer, self.state.step + 1
        final = step == self.plan.total_steps
        with self.timers("step"):
            with self.workers.profiled(step):
                record = self.step(step)
            if self.plan.val_prompts and trainer.test_freq > 0 and (final or step % trainer.test_freq == 0):
                record.metrics |= self.validate(step)
        self.state.step = step
        last = final or self.stop.requested  # asked once: a later request ends the next step
        saves = self.checkpoints.due(step, last=last)
        if saves:
            with self.timers("save_checkpoint"), self.observer.phase("checkpoint"):
                self.checkpoints.begin(*self.rollouts.checkpoint())
        metrics = self.observer.step_done(record)
        if saves:
            self.checkpoints.commit(metrics)
        return last

    def step(self, step: int) -> StepRecord:
        """Run one training step: generate, score, estimate advantages, update."""
        data, record, updates = StepData(step), StepRecord(step, []), Updates()
        trains_actor = step >= self.run.trainer.critic_warmup or not self.run.uses_critic
        for part in self.rollouts.stream(step):
            batch = part.batch(self.estimator)
            if not data.rollouts:
                self.checkpoints.advance()
                # New weights will follow.
                self.workers.sleep(discard_weights=bool(batch) and trains_actor)
            data.add(part)
            record.rollouts, record.baselines, record.staleness = (
                data.rollouts,
                data.baselines,
                data.staleness,
            )
            if batch:
                with self.recorder.keeping(data, record):
                    self.train_on(batch, part, record, updates, trains_actor=trains_actor)
        with self.recorder.keeping(data, record):
            self.finish_updates(data, record, updates)
        in_batch = sum(rollout.id.group in data.groups for rollout in data.rollouts)
        record.metrics["reward/dropped_samples"] = float(in_batch - len(record.batch))
        record.metrics |= data.metrics
        record.metrics |= self.rollouts.trained(step)

        record.memory = self.workers.memory()
        self.observer.write_rollouts(record)
        self.recorder.record(data, record)
        self.check_mismatch(record.metrics)
        return record

    def train_on(
        self,
        batch: Sequence[Rollout],
        part: StepData,
        record: StepRecord,
        updates: Updates,
        *,
        trains_actor: bool,
    ) -> None:
        """Compute the advantages of a step, or of a part of it, and update the models: on a part in the first epoch."""
        sequences = self.evaluate(batch, record)
        with self.timers("adv"), self.observer.phase("advantages"):
            found = self.estimate(sequences, batch, part)
            sequences = with_arrays(sequences, advantages=found.advantages, returns=found.returns)
        record.add(batch, sequences, found)
        if self.kl.coef:
            record.metrics |= {"critic/kl": found.kl, "critic/kl_coeff": self.kl.coef}
            self.kl.update(found.kl, len(batch))
            self.state.kl_coef = self.kl.coef
        if self.run.uses_critic:
            epochs = range(self.run.training("critic").epochs)
            with self.timers("update_critic"):
                self.update("critic", epochs, sequences, part.groups, record, updates)
        if trains_actor:
            updates.sequences += sequences
            epochs = range(1 if part.parts else self.run.training("actor").epochs)
            with self.timers("update_actor"):
                self.update("actor", epochs, sequences, part.groups, record, updates)

    def finish_updates(self, data: StepData, record: StepRecord, updates: Updates) -> None:
        """Update the actor in the epochs after the first, if parts have had theirs, and sum up all updates of the step."""
        trained = "actor" in updates.metrics
        if trained and data.parts and (later := range(1, self.run.training("actor").epochs)):
            sequences = sorted(updates.sequences, key=lambda sequence: sequence.id)
            with self.timers("update_actor"):
                self.update("actor", later, sequences, data.groups, record, updates)
        for role, metrics in updates.metrics.items():
            record.work[role] = [sum(of_rank, Work()) for of_rank in zip(*updates.work[role], strict=True)]
            record.metrics |= over_updates(metrics) | {f"{role}/lr": self.learning_rate(role, record.step)}
        if trained:
            self.state.weights_version = record.step
            if self.bypasses_old_log_probs:
                # In later updates they compare with a policy that has moved, which is not a mismatch.
                first = updates.metrics["actor"][0]
                record.metrics |= {name: x for name, x in first.items() if name.startswith(MISMATCH)}
            if self.run.loss.use_kl_loss:
                record.metrics["actor/kl_coef"] = self.run.loss.kl_loss_coef

    def evaluate(self, batch: Sequence[Rollout], record: StepRecord) -> list[SequenceRef]:
        """Compute the log-probs and values of each trained token before the update, if they are needed."""
        sequences = trained_sequences(batch)
        if self.needs_old_log_probs:
            with self.timers("old_log_prob"), self.observer.phase("old log-probs"):
                handles, sums = self.workers.evaluate("actor", sequences)
                record.add_log_probs("old", sums_by_rollout(sequences, sums))
                sequences = with_arrays(sequences, old_log_probs=handles)
        if self.run.needs_reference:
            with self.timers("ref"), self.observer.phase("reference log-probs"):
                handles, sums = self.workers.evaluate("reference", sequences)
                record.add_log_probs("ref", sums_by_rollout(sequences, sums))
                sequences = with_arrays(sequences, ref_log_probs=handles)
        if self.run.uses_critic:
            with self.timers("values"), self.observer.phase("values"):
                handles, _ = self.workers.evaluate("critic", sequences)
                sequences = with_arrays(sequences, values=handles)
        return sequences

    def estimate(self, sequences: list[SequenceRef], batch: Sequence[Rollout], part: StepData) -> Advantages:
        """Compute advantages and returns."""
        scores = [rollout.outcome.score for rollout in batch if isinstance(rollout.outcome, Scored)]
        baselines = None
        if self.estimator.greedy_baseline:
            baselines = [part.baselines[rollout.id.group] for rollout in batch]
        return self.workers.advantages(sequences, scores, baselines, self.kl.coef)

    def update(
        self,
        role: Trained,
        epochs: range,
        sequences: Sequence[SequenceRef],
        groups: Sequence[int],
        record: StepRecord,
        updates: Updates,
    ) -> None:
        """Update a model on sequences, mini-batch by mini-batch, in some of the epochs."""
        training, lr = self.run.training(role), self.learning_rate(role, record.step)
        in_step = len(groups) if len(epochs) == training.epochs else self.run.data.train_batch_size
        total = training.epochs * mini_batch_count(in_step, training.mini_batch_size)
        with self.observer.phase(f"updating the {role}", total) as phase:
            phase.advance(len(updates.metrics.get(role, ())))  # of the parts before
            for epoch in epochs:
                order = epoch_order(self.run, role, record.step, epoch)
                for mini_batch in mini_batches(sequences, groups, training.mini_batch_size, order):
                    unchanged = role not in updates.metrics
                    if role == "actor" and self.policy_loss.select_tokens is not None:
                        mini_batch = self.select_tokens(mini_batch, unchanged=unchanged)
                    keeps = role == "actor" and unchanged and self.keeps_log_probs(mini_batch)
                    arrays = self.arrays(role, mini_batch)
                    compares = ROLLOUT_LOG_PROBS in arrays and (unchanged or not self.bypasses_old_log_probs)
                    metrics, work, log_probs = self.workers.update(
                        *(role, mini_batch, lr, arrays),
                        keeps_log_probs=keeps,
                        staleness=self.staleness(mini_batch, record) if compares else (),
                    )
                    if keeps:
                        record.sequences = with_arrays(mini_batch, old_log_probs=log_probs)
                    if self.must_stop(role, metrics):
                        raise self.not_finite(role, record)
                    updates.add(role, metrics, work)
                    phase.advance()

    def staleness(self, mini_batch: Sequence[SequenceRef], record: StepRecord) -> list[StalenessRuns]:
        """List the age of the weights that sampled each sequence's tokens; nothing if all are the newest."""
        if not any(record.staleness.values()):
            return []
        ids = {sequence.id for sequence in mini_batch}
        runs = {each.id: staleness_runs(each, record.staleness) for each in record.batch if each.id in ids}
        if all(steps == 0 for of_rollout in runs.values() for own in of_rollout for steps, _ in own):
            return []
        return [runs[sequence.id].pop(0) for sequence in mini_batch]

    def learning_rate(self, role: Trained, step: int) -> float:
        """Compute the learning rate of a step."""
        return learning_rate(step - 1, self.plan.total_steps, self.run.training(role).optimizer)

    def keeps_log_probs(self, mini_batch: Sequence[SequenceRef]) -> bool:
        """Return whether the log-probs of a step's first update are to be recorded: no others are known of its sequences."""
        known = "old_log_probs" in mini_batch[0].arrays
        return self.recorder.enabled and not known and self.mini_batches == 1

    def must_stop(self, role: Trained, metrics: Mapping[str, float]) -> bool:
        """Count consecutive updates that were skipped because their gradient was not finite; say if they are too many."""
        self.skipped = self.skipped + 1 if metrics[f"{role}/skipped_updates"] else 0
        return bool(self.skipped) and self.skipped == self.run.trainer.max_nonfinite_updates

    def not_finite(self, role: Trained, record: StepRecord) -> NonFiniteError:
        """Make the error that ends the run after too many updates whose gradient is not finite."""
        extreme = ""
        if record.advantages:
            rewards = zip(record.advantages.rewards, record.batch, strict=True)
            reward, rollout = max(rewards, key=lambda pair: abs(pair[0]))
            extreme = f" The most extreme reward is {reward:g}, of {rollout.id}."
        return NonFiniteError(
            f"The gradient of the {role} was not finite in {self.skipped} updates in a row, the last at step "
            f"{record.step} (trainer.max_nonfinite_updates).{extreme}\n"
            "Lower the learning rate, compute in fp32, or look for an extreme reward among the samples."
        )

    def select_tokens(self, mini_batch: list[SequenceRef], *, unchanged: bool) -> list[SequenceRef]:
        """Let the policy loss select tokens of a mini-batch; with `unchanged` weights, reuse the old log-probs."""
        if unchanged and not self.bypasses_old_log_probs:
            handles = [sequence.arrays["old_log_probs"] for sequence in mini_batch]
        else:
            handles, _ = self.workers.evaluate("actor", mini_batch)
        mini_batch = with_arrays(mini_batch, log_probs=handles)
        return with_arrays(mini_batch, token_mask=self.workers.select_tokens(mini_batch))

    def arrays(self, role: Trained, mini_batch: Sequence[SequenceRef]) -> tuple[str, ...]:
        """Name the arrays that a model's loss reads."""
        if role == "critic":
            return "values", "returns"
        rollout = self.run.rollout
        known = mini_batch[0].arrays
        names = tuple(name for name in ("advantages", "old_log_probs", "token_mask") if name in known)
        names += ("ref_log_probs",) if self.run.loss.use_kl_loss else ()
        # The log-probs of a greedy engine are those of a one-token distribution and cannot be compared.
        return names + ((ROLLOUT_LOG_PROBS,) if rollout.do_sample else ())

    def validate(self, step: int) -> dict[str, float]:
        """Generate responses to the validation prompts, and compute their metrics."""
        with self.timers("testing"):
            rollouts = self.rollouts.validate(step)
        return self.observer.validation(step, rollouts)

    def check_mismatch(self, metrics: Mapping[str, float]) -> None:
        """Check that the engine's log-probs match those of the trained policy.

        Raises:
            IIVerlError: `rollout/kl` is above `algorithm.rollout_correction.mismatch_kl_limit`.
        """
        if metrics.get("staleness/max"):
            return  # it is also the distance between two versions of the policy
        config, kl = self.run.algorithm.rollout_correction, metrics.get("rollout/kl", 0.0)
        if config.mismatch_kl_limit is not None and kl > config.mismatch_kl_limit:
            raise IIVerlError(
                f"The engine generates from another distribution than the one that is trained: rollout/kl is {kl:.3g} "
                "nats a token, above algorithm.rollout_correction.mismatch_kl_limit "
                f"({config.mismatch_kl_limit:g}).\nSee that rollout.dtype is the trainer's, and that the engine "
                "supports the model; top_k or top_p cut off the distribution of an engine that does not return what it kept "
                "(warning C315)."
            )
        if config.mismatch_kl_warning is not None and kl > config.mismatch_kl_warning:
            corrected = self.bypasses_old_log_probs and self.policy_loss.uses_ratio
            self.observer.warn_once(
                f"The engine's log-probs differ from the trainer's: rollout/kl is {kl:.3g} nats a token "
                f"(algorithm.rollout_correction.mismatch_kl_warning: {config.mismatch_kl_warning:g})."
                + ("" if corrected else " algorithm.rollout_correction.rollout_is: token makes up for it.")
            )

    @property
    def bypasses_old_log_probs(self) -> bool:
        """Whether the engine's log-probs are the old ones."""
        return self.run.algorithm.rollout_correction.bypass_old_log_prob

    @property
    def mini_batches(self) -> int:
        """The most mini-batches that the actor is updated on in an epoch of a step."""
        return mini_batch_count(self.run.data.train_batch_size, self.run.training("actor").mini_batch_size)

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the policy changes between generation and the last update, or something else needs them."""
        if self.bypasses_old_log_probs:
            return False
        updates = self.run.training("actor").epochs * self.mini_batches
        return updates > 1 or self.kl.coef != 0 or self.policy_loss.select_tokens is not None


def _kl_controller(run: RunConfig, coef: float) -> FixedKL | AdaptiveKL:
    """Create the controller of the KL's weight in the reward, starting from `coef`."""
    control = run.algorithm.kl_ctrl
    if run.kl_in_reward and control.type == "adaptive" and control.target_kl and control.horizon:
        return AdaptiveKL(coef, control.target_kl, control.horizon)
    return FixedKL(coef)
