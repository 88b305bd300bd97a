"""Report a run: progress, timings, metrics, rollouts. Makes no decisions."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from iiverl_core.cluster.messages import Advantages, WorkerInfo
from iiverl_core.config import Role, RunConfig
from iiverl_core.controller.folders import Dumps
from iiverl_core.samples import Rollout, SampleId, SequenceRef, Split
from iiverl_core.telemetry import (
    Phase,
    Progress,
    SampleNumbers,
    Timers,
    Tracker,
    batch_metrics,
    mfu,
    perf_metrics,
    pick,
    seqlen_metrics,
    shared_fractions,
    token_timings,
    training_flops,
    validation_metrics,
    write_samples,
    write_scored,
)
from iiverl_core.training.planning import Work


@dataclass(frozen=True)
class ModelShape:
    """The sizes from which a model's FLOPs are counted."""

    parameters: int
    layers: int
    heads: int
    head_dim: int


@dataclass
class StepRecord:
    """Everything that is reported about one training step.

    `rollouts` are all generated rollouts, `batch` those trained on. `log_prob_sums` has the log-prob of each rollout of
    the batch by policy (`old`, `ref`); `baselines` the greedy score of each group; `staleness` is that of each version of the weights among them; `sequences` are those of the batch, with
    the arrays that losses read. `work` is what each rank computed
    to update a model, in all epochs. `memory` is in bytes, by metric name.
    """

    step: int
    rollouts: Sequence[Rollout]
    batch: Sequence[Rollout] = ()
    advantages: Advantages | None = None
    log_prob_sums: dict[str, Mapping[SampleId, float]] = field(default_factory=dict)
    baselines: Mapping[int, float] = field(default_factory=dict)
    staleness: Mapping[int, int] = field(default_factory=dict)
    sequences: Sequence[SequenceRef] = ()
    work: dict[Role, Sequence[Work]] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def add(self, batch: Sequence[Rollout], sequences: Sequence[SequenceRef], advantages: Advantages) -> None:
        """Add rollouts that are trained on, their sequences and advantages, to those that are there."""
        if self.advantages is not None:
            tokens = [sum(sequence.trained for sequence in each) for each in (self.sequences, sequences)]
            batch, sequences = [*self.batch, *batch], [*self.sequences, *sequences]
            rollouts = sorted(range(len(batch)), key=lambda i: batch[i].id)
            order = sorted(range(len(sequences)), key=lambda i: sequences[i].id)
            batch, sequences = [batch[i] for i in rollouts], [sequences[i] for i in order]
            advantages = self.advantages.joined(advantages, tokens).reordered(rollouts, order)
        self.batch, self.sequences, self.advantages = batch, sequences, advantages

    def add_log_probs(self, policy: str, sums: Mapping[SampleId, float]) -> None:
        """Add the log-probs of rollouts under a policy."""
        self.log_prob_sums[policy] = {**self.log_prob_sums.get(policy, {}), **sums}


class Observer:
    """Reports the progress of a run to trackers, terminal and files, with the metric names that dashboards use."""

    def __init__(
        self,
        run: RunConfig,
        infos: Sequence[WorkerInfo],
        shapes: Mapping[Role, ModelShape],
        progress: Progress,
        tracker: Tracker,
    ) -> None:
        self.timers = Timers()
        self._run, self._infos, self._shapes = run, infos, shapes
        self._progress, self._tracker = progress, tracker
        self._warned = False
        self._dumps = Dumps(progress.log)

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Phase]:
        """Show the current activity."""
        return self._progress.phase(name, total)

    def warn(self, message: str) -> None:
        """Log a non-fatal warning."""
        self._progress.log(f"warning: {message}")

    def warn_once(self, message: str) -> None:
        """Log a non-fatal warning once."""
        if not self._warned:
            self._warned = True
            self.warn(message)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics to the trackers."""
        self._tracker.log({**metrics, **self.timers.drain()}, step)

    def step_done(self, record: StepRecord) -> Mapping[str, float]:
        """Send a finished step's metrics and timings to the trackers and the progress display, and return them."""
        timings = self.timers.drain()
        metrics = {**self._metrics(record), **record.metrics, **timings, **self._speed(record, timings)}
        self._tracker.log(metrics, record.step)
        self._progress.step_done(record.step, metrics)
        return metrics

    def write_rollouts(self, record: StepRecord) -> None:
        """Write a step's rollouts to `trainer.rollout_data_dir` and `reward_api.save_dir`, if set."""
        if record.step % self._run.rewards.api.save_freq == 0:
            self._write_scored("train", record.step, record.rollouts)
        if folder := self._run.trainer.rollout_data_dir:
            self.dump("trainer.rollout_data_dir", lambda: self._write_samples(Path(folder), record))

    def dump(self, key: str, write: Callable[[], object]) -> None:
        """Write files that a key asks for, without which the run goes on; see `Dumps`."""
        self._dumps.write(key, write)

    def keep_rollouts(self, folder: Path, record: StepRecord) -> Path | None:
        """Write the rollouts of a step that cannot be trained on, and return the file; None if it cannot be written."""
        try:
            return self._write_samples(folder, record)
        except OSError as error:
            self.warn(f"the step's samples cannot be written to {folder}: {error}")
            return None

    def _write_samples(self, folder: Path, record: StepRecord) -> Path:
        numbers: dict[SampleId, SampleNumbers] = {rollout.id: {} for rollout in record.rollouts}
        if record.advantages:
            found = zip(record.batch, record.advantages.rewards, record.advantages.means, strict=True)
            for rollout, reward, advantage in found:
                numbers[rollout.id] |= {"reward": reward, "advantage": advantage}
        for id in numbers:  # also of a step that ended before its advantages were there
            if id in record.log_prob_sums.get("old", {}):
                numbers[id]["old_log_prob_sum"] = record.log_prob_sums["old"][id]
            if id in record.log_prob_sums.get("ref", {}):
                numbers[id]["ref_log_prob_sum"] = record.log_prob_sums["ref"][id]
            if id.group in record.baselines:
                numbers[id]["baseline"] = record.baselines[id.group]
        return write_samples(folder, record.step, record.rollouts, numbers)

    def validation(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Compute the metrics of a validation; write and log its rollouts if configured."""
        self._write_scored("val", step, rollouts)
        if folder := self._run.trainer.validation_data_dir:
            self.dump("trainer.validation_data_dir", lambda: write_samples(Path(folder), step, rollouts))
        if count := self._run.trainer.logged_generations:
            self._tracker.log_generations(pick(rollouts, count), step)
        return validation_metrics(rollouts)

    def _metrics(self, record: StepRecord) -> dict[str, float]:
        """Compute the metrics of a step's rollouts."""
        advantages, ids = record.advantages, [rollout.id for rollout in record.batch]
        metrics = batch_metrics(
            record.rollouts,
            max_prompt_length=self._run.data.max_prompt_length,
            rewards=dict(zip(ids, advantages.rewards, strict=True)) if advantages else {},
            token_stats=advantages.token_stats if advantages else {},
        )
        lengths = [rollout.length for rollout in record.rollouts]
        rank_tokens = {
            role: [work.tokens / self._run.training(role).epochs for work in of_ranks]
            for role, of_ranks in record.work.items()
        }
        last = list(rank_tokens.values())[-1] if rank_tokens else ()
        metrics |= seqlen_metrics(lengths, self._infos[0].parallel_ranks["actor"].data_size, last)
        in_batch = sum(sequence.length for rollout in record.batch for sequence in rollout.sequences)
        metrics |= shared_fractions(in_batch, {role: sum(tokens) for role, tokens in rank_tokens.items()})
        if advantages and advantages.explained_variance is not None:
            metrics["critic/vf_explained_var"] = advantages.explained_variance
        return metrics

    def _speed(self, record: StepRecord, timings: Mapping[str, float]) -> dict[str, float]:
        """Compute the metrics that depend on the time of the whole step."""
        devices, device = len(self._infos), self._infos[0].device
        total_tokens = sum(rollout.length for rollout in record.rollouts)
        flops = {
            role: training_flops(
                shape.parameters, shape.layers, shape.heads, shape.head_dim, record.work.get(role, ())
            )
            for role, shape in self._shapes.items()
        }
        return token_timings(
            timings,
            response_tokens=sum(rollout.response_length for rollout in record.rollouts),
            total_tokens=total_tokens,
        ) | perf_metrics(
            total_tokens=total_tokens,
            step_seconds=timings["timing_s/step"],
            devices=devices,
            mfu={
                role: mfu(each, timings.get(f"timing_s/update_{role}", 0.0), device, devices)
                for role, each in flops.items()
            },
            **record.memory,
        )

    def _write_scored(self, split: Split, step: int, rollouts: Sequence[Rollout]) -> None:
        """Write the requests to a reward server and their results."""
        server = self._run.rewards.api
        if server.enable and (folder := server.save_dir):
            column = server.verification_info_column
            self.dump(
                "reward_api.save_dir", lambda: write_scored(Path(folder), split, step, rollouts, column)
            )
