"""The calls that the loop makes to workers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from iiverl_core.cluster.engines import Engines
from iiverl_core.cluster.messages import Advantages, RankBatch, StalenessRuns, TokenArrays, Trained
from iiverl_core.cluster.runtime import TrainerWorker, WorkerGroup
from iiverl_core.cluster.store import put_all
from iiverl_core.config import RunConfig
from iiverl_core.controller.batch import Division, divide, divide_for_training
from iiverl_core.controller.weight_verification import WeightVerification
from iiverl_core.registry.algorithms import policy_loss_info
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.samples import Handle, Rollout, SampleId, SequenceRef, SequenceRefs, TokenSequence
from iiverl_core.training import Role
from iiverl_core.training.metrics import merge
from iiverl_core.training.planning import Packing, Work

T = TypeVar("T")


class WorkerClient:
    """Divides sequences over the ranks, calls the workers, and gathers their results."""

    def __init__(self, group: WorkerGroup, engines: Engines, run: RunConfig) -> None:
        self._group, self._engines = group, engines
        self._run = run
        self._verification = WeightVerification(always=run.rollout.verify_weights)
        self._placed: dict[tuple[int, int], int] = {}  # the engine of each group of an interruptible call
        self._ranks = {role: rank.data_size for role, rank in group.infos[0].parallel_ranks.items()}
        self._layouts = group.infos[0].layouts
        prescribed = policy_loss_info(run.loss.policy_loss).loss_agg_mode
        # How token losses are aggregated over a mini-batch; the critic's is a mean over tokens.
        self._aggregation: dict[Trained, str] = {
            "actor": prescribed or run.loss.loss_agg_mode,
            "critic": "token-mean",
        }

    def update_rollout_weights(self, version: int) -> int:
        """Sync the actor's weights to every engine, including restarted ones; return the bytes that each was given.

        Raises:
            WeightMismatchError: an engine has other weights than the actor.
        """
        verify = self._verification.due
        received = self._engines.update_weights(version, verify=verify)
        if verify:
            base = received[0].sync.base
            digests = self._group.run(TrainerWorker.weight_digests, [(base,)] * len(self._group.infos))[0]
            self._verification.check(version, digests, [each.digests for each in received])
        return max(each.nbytes for each in received)

    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Generate rollouts; yield them as they finish. Those unfinished when an engine died are missing.

        Each group goes as a whole to the engine with the fewest requests, since an engine computes a prompt once for all
        responses to it. One that was interrupted goes to the engine that has begun with it.
        """
        groups: dict[tuple[int, int], list[RolloutRequest]] = {}
        for request in requests:
            groups.setdefault((request.id.step, request.id.group), []).append(request)
        parts: dict[int, list[RolloutRequest]] = {number: [] for number in self._engines.numbers}
        placed = {key: self._placed[key] for key in groups if self._placed.get(key) in parts}
        for key, engine in placed.items():
            parts[engine] += groups[key]
        for key in [key for key in groups if key not in placed]:
            placed[key] = min(parts, key=lambda engine: len(parts[engine]))
            parts[placed[key]] += groups[key]
        if self._run.interrupts_rollouts and sampling != "validate":
            self._placed = placed
        return self._engines.generate(parts, sampling)

    @property
    def engines(self) -> int:
        """The number of engines that are in use; see `Engines.numbers`."""
        return len(self._engines.numbers)

    def interrupt(self) -> None:
        """Let `generate`, which runs in another thread, end soon; see `Engines.interrupt`."""
        self._engines.interrupt()

    def sleep(self, *, discard_weights: bool) -> None:
        """Let the engines release memory for training, including that of their weights with `discard_weights`."""
        self._engines.sleep(discard_weights=discard_weights)

    def evaluate(self, role: Role, sequences: Sequence[SequenceRef]) -> tuple[list[Handle], list[float]]:
        """Compute log-probs of each sequence's trained tokens under a policy, or their values: handles, and sums."""
        division = self._divide(role, sequences)
        results: list[TokenArrays] = self._on_ranks(
            role, TrainerWorker.evaluate, division, lambda batch: (role, batch)
        )
        return (
            division.restore([result.handles for result in results]),
            division.restore([result.sums for result in results]),
        )

    def score(self, sequences: Mapping[SampleId, SequenceRef | TokenSequence]) -> list[float]:
        """Score sequences with the reward model, in their order; put sequences into the store that are not there.

        Engines give it the memory of their cache first. They keep their weights, since more may have to be generated.
        """
        self._engines.release_cache()
        new = {id: each for id, each in sequences.items() if isinstance(each, TokenSequence)}
        handles = dict(zip(new, put_all(self._group.store, list(new.values())) if new else [], strict=True))
        references = [
            each
            if isinstance(each, SequenceRef)
            else SequenceRef(id, handles[id], len(each.token_ids), each.trained)
            for id, each in sequences.items()
        ]
        division = self._divide("reward", references)
        return division.restore(
            self._on_ranks("reward", TrainerWorker.score, division, lambda batch: (batch,))
        )

    def advantages(
        self,
        sequences: list[SequenceRef],
        scores: list[float],
        baselines: list[float] | None,
        kl_coef: float,
    ) -> Advantages:
        """Compute the advantages of a step on one worker; scores and baselines are per rollout."""
        sent = SequenceRefs(sequences)
        return self._group.run_on(0, TrainerWorker.advantages, sent, scores, baselines, kl_coef)

    def select_tokens(self, sequences: list[SequenceRef]) -> list[Handle]:
        """Let the policy loss select tokens of a mini-batch, on one worker."""
        return self._group.run_on(0, TrainerWorker.select_tokens, SequenceRefs(sequences))

    def update(
        self,
        role: Trained,
        sequences: Sequence[SequenceRef],
        lr: float,
        arrays: tuple[str, ...],
        *,
        keeps_log_probs: bool = False,
        staleness: Sequence[StalenessRuns] = (),
    ) -> tuple[dict[str, float], list[Work], list[Handle]]:
        """Run one optimizer step on a mini-batch; return its metrics, and the work of each rank.

        With `keeps_log_probs`, return the log-probs of each sequence before the step as well. With `staleness`, metrics
        have the mismatch of engine and trainer by it.
        """
        division = divide_for_training(
            sequences,
            self._ranks[role],
            self._packing(role, train=True),
            balanced=self._run.trainer.balance_batch,
            loss_agg_mode=self._aggregation[role],
            max_tokens_norm=self._run.loss.max_tokens_norm,
            arrays=arrays,
            keeps_log_probs=keeps_log_probs,
            staleness=staleness,
        )
        results = self._on_ranks(role, TrainerWorker.update, division, lambda batch: (role, batch, lr))
        metrics: dict[str, float] = {}
        for part in results:
            merge(metrics, part.metrics)
        step = results[0].step
        metrics |= {f"{role}/grad_norm": step.grad_norm, f"{role}/skipped_updates": float(not step.taken)}
        log_probs = division.restore([part.log_probs for part in results]) if keeps_log_probs else []
        return metrics, division.work, log_probs

    def write_sequences(
        self, path: Path, sequences: Sequence[SequenceRef], computed: Mapping[int, SequenceRef] | None = None
    ) -> None:
        """Write the token arrays of sequences to a file, in their order, on the first worker.

        `computed` has, by position, those for which arrays were computed, all under the same names; these are written too.

        Raises:
            CheckpointError: the file cannot be written.
        """
        computed = computed or {}
        self._group.run_on(
            0,
            TrainerWorker.write_sequences,
            path,
            SequenceRefs(sequences),
            list(computed),
            SequenceRefs(computed.values()),
        )

    def read_sequences(self, path: Path) -> list[Handle]:
        """Put the sequences that `write_sequences` wrote into the store.

        Raises:
            CheckpointError: the file cannot be read.
        """
        paths = [(path if rank == 0 else None,) for rank in range(len(self._group.infos))]
        (read,) = self._group.stream(TrainerWorker.read_sequences, paths)
        reference, count = read
        return [Handle(reference, index) for index in range(count)]

    def begin_save(self, folder: Path) -> None:
        """Copy the trained models, and start writing the copies to `folder`."""
        self._group.run(TrainerWorker.begin_save, [(folder,)] * len(self._group.infos))

    def finish_save(self, folder: Path) -> dict[str, int]:
        """Wait until all models are written; return the size of each file in `folder`, as seen by any machine.

        Files are counted when every process has written: before, others would see them under passing names and sizes.
        """
        ranks = len(self._group.infos)
        self._group.run(TrainerWorker.finish_save, [()] * ranks)
        found = self._group.run(TrainerWorker.saved_files, [(folder,)] * ranks)
        return {name: size for files in found for name, size in files.items()}

    def load(self, folder: Path) -> None:
        """Load the trained models of a checkpoint."""
        self._group.run(TrainerWorker.load, [(folder,)] * len(self._group.infos))

    @contextmanager
    def profiled(self, step: int) -> Iterator[None]:
        """Profile a step, if that is asked for."""
        if self._run.profile is None or step not in self._run.profile.steps:
            yield
            return
        ranks = len(self._group.infos)
        self._group.run(TrainerWorker.begin_profile, [(step,)] * ranks)
        yield
        self._group.run(TrainerWorker.end_profile, [()] * ranks)

    def memory(self) -> dict[str, int]:
        """Measure the memory of the fullest device and host, in bytes."""
        reports = self._group.run(TrainerWorker.memory, [()] * len(self._group.infos))
        return {name: max(report[name] for report in reports) for name in reports[0]}

    def _divide(self, role: Role, sequences: Sequence[SequenceRef]) -> Division:
        balanced = self._run.trainer.balance_batch
        return divide(sequences, self._ranks[role], self._packing(role, train=False), balanced=balanced)

    def _on_ranks(
        self,
        role: Role,
        method: Callable[..., T],
        division: Division,
        arguments: Callable[[RankBatch], tuple[Any, ...]],
    ) -> list[T]:
        """Call a method on every worker with its data rank's batch, and return one result per data rank of the model."""
        ranks = [info.parallel_ranks[role] for info in self._group.infos]
        results = self._group.run(method, [arguments(division.batches[rank.data_rank]) for rank in ranks])
        output = {r.data_rank: result for r, result in zip(ranks, results, strict=True) if r.is_output_rank}
        return [output[rank] for rank in range(self._ranks[role])]

    def _packing(self, role: Role, *, train: bool) -> Packing:
        """Read the size of a model's micro-batches, in training or in a forward pass.

        It is a number of sequences, if one is set and batches are not dynamic; otherwise a token budget.
        """
        config = self._run.roles[role]
        batching = config.training.micro_batching if train and config.training else config.forward
        if batching.sequences is not None:
            return Packing(sequences=batching.sequences, layout=self._layouts[role])
        return Packing(tokens=batching.tokens, layout=self._layouts[role])
