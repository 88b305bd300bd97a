"""A trainer worker: one device's part of every model and, unless engines have devices of their own, a rollout engine.

All workers of a group get the same calls in the same order, each with its own arguments. Arguments and results are
small; token arrays stay in the store and are named by handles.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from iiverl_core.algorithms import find_estimator, find_policy_loss
from iiverl_core.checkpoints import files_in
from iiverl_core.cluster.advantages import compute_advantages, select_tokens
from iiverl_core.cluster.generation import Generator
from iiverl_core.cluster.messages import (
    Advantages,
    RankBatch,
    ReceivedWeights,
    TokenArrays,
    Trained,
    Updated,
    WeightSync,
    WorkerInfo,
)
from iiverl_core.cluster.model_runner import ModelRunner
from iiverl_core.cluster.process_settings import configure_allocator, make_deterministic, use_idle_cores
from iiverl_core.cluster.profiling import StepProfiler
from iiverl_core.cluster.rendezvous import join_process_group
from iiverl_core.cluster.runtime import TrainerWorker
from iiverl_core.cluster.store import Store, open_all
from iiverl_core.cluster.weight_sync import WeightSender
from iiverl_core.cluster.weight_transport import BucketMetadata, WeightTransport
from iiverl_core.config import RunConfig
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.rollout.weights import digest
from iiverl_core.samples import Handle, Rollout, SequenceRef, TokenSequence
from iiverl_core.sequence_files import read_sequences, write_sequences
from iiverl_core.training import Role


class Worker(TrainerWorker):
    """One process of a group, on one device.

    `device_type` is `cpu` or `cuda`; on a CUDA machine the process sees only its own device.
    """

    def __init__(
        self, run: RunConfig, rank: int, size: int, device_type: str, store: Store, init_method: str
    ) -> None:
        """Join the other processes at `init_method`, and build the models and the engine.

        Raises:
            ConfigError: the backend is not installed, or a model, tokenizer or algorithm cannot be read.
        """
        disable_progress_bar()  # the run shows its own, and every worker's would be one too many
        if device_type == "cuda":
            configure_allocator()
            use_idle_cores(run)
        make_deterministic(device_type, asked=run.trainer.deterministic)
        self._run, self._store = run, store
        self._device = torch.device(device_type)
        self._generator: Generator | None = None
        self._profiler = StepProfiler(run.profile, rank)
        join_process_group(init_method, rank, size, device_type)
        try:
            self._estimator = find_estimator(run.algorithm.adv_estimator)
            self._policy_loss = find_policy_loss(run.loss.policy_loss)
            self._runner = ModelRunner(run, self._device, store, self._policy_loss)
            if run.generates and not run.trainer.rollout_devices:
                self._generator = Generator(run, self._device, rank)
        except BaseException:
            self.close()  # a group that stays would be in the way of the next one in this process
            raise
        positions = self._runner.parallel_ranks()
        position = positions["actor"]
        first_output_rank = position.is_output_rank and position.data_rank == 0
        self._weight_sender = WeightSender(store, self._device, sends=first_output_rank)
        self.info = WorkerInfo(
            rank=rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=torch.cuda.get_device_name() if device_type == "cuda" else "cpu",
            parallel_ranks=positions,
            parameters=self._runner.parameter_counts(),
            trained_parameters=self._runner.trained_parameter_counts(),
            layouts=self._runner.layouts(),
        )

    def evaluate(self, role: Role, batch: RankBatch) -> TokenArrays:
        """See `ModelRunner.evaluate`."""
        with self._profiler.span(f"evaluate {role}"):
            return self._runner.evaluate(role, batch)

    def score(self, batch: RankBatch) -> list[float]:
        """See `ModelRunner.score`."""
        with self._profiler.span("score"):
            return self._runner.score(batch)

    def update(self, role: Trained, batch: RankBatch, lr: float) -> Updated:
        """See `ModelRunner.update`."""
        with self._profiler.span(f"update {role}"):
            return self._runner.update(role, batch, lr)

    def advantages(
        self,
        sequences: list[SequenceRef],
        scores: list[float],
        baselines: list[float] | None,
        kl_coef: float,
    ) -> Advantages:
        """See `compute_advantages`."""
        return compute_advantages(
            self._run, self._store, self._estimator, sequences, scores, baselines, kl_coef
        )

    def select_tokens(self, sequences: list[SequenceRef]) -> list[Handle]:
        """See `iiverl_core.cluster.advantages.select_tokens`."""
        return select_tokens(self._run, self._store, self._policy_loss, sequences)

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling
    ) -> Iterator[tuple[list[TokenSequence], list[Rollout]]]:
        """Make rollouts with the engine that lives here; yield as `Generator.generate` does.

        If the engine spans several workers, all of them get the same requests, and the first yields the rollouts.
        """
        with self._profiler.span("generate"):
            yield from self._generating().generate(requests, sampling)

    def sleep(self, discard_weights: bool) -> None:
        """Let the engine that lives here release the memory that only generating needs; see `Generator.sleep`."""
        self._generating().sleep(discard_weights)

    def release_cache(self) -> None:
        """Let the engine that lives here release the memory of keys and values alone."""
        self._generating().release_cache()

    def update_rollout_weights(self, sync: WeightSync) -> ReceivedWeights:
        """Give the engine that lives here the actor's weights; see `Generator.update_weights`."""
        with self._profiler.span("update rollout weights"):
            return self._generating().update_weights(self._runner.rollout_weights(base=sync.base), sync)

    def weight_digests(self, base: bool) -> dict[str, int]:
        """Compute the digest of each of the actor's weights, as engines should have them. All workers take part."""
        return {name: digest(value) for name, value in self._runner.rollout_weights(base=base)}

    def begin_weight_sync(self, sync: WeightSync, transport: WeightTransport) -> None:
        """Begin to send the actor's weights to engines elsewhere; the first output rank sends them."""
        self._weight_sender.begin(self._runner.rollout_weights(base=sync.base), transport)

    def next_bucket(self, size: int) -> BucketMetadata | None:
        """See `WeightSender.next_bucket`. All workers take part."""
        return self._weight_sender.next_bucket(size)

    def begin_save(self, folder: Path) -> None:
        """See `ModelRunner.begin_save`."""
        self._runner.begin_save(folder)

    def finish_save(self) -> None:
        """See `ModelRunner.finish_save`."""
        self._runner.finish_save()

    def saved_files(self, folder: Path) -> dict[str, int]:
        """Return the size of each file in `folder`, as seen by this machine, by its path in the folder."""
        return files_in(folder)

    def load(self, folder: Path) -> None:
        """See `ModelRunner.load`."""
        self._runner.load(folder)

    def write_sequences(
        self, path: Path, sequences: list[SequenceRef], positions: list[int], computed: list[SequenceRef]
    ) -> None:
        """See `TrainerWorker.write_sequences`."""
        tokens = open_all(self._store, [each.tokens for each in sequences])
        arrays = {
            name: open_all(self._store, [each.arrays[name] for each in computed])
            for name in (computed[0].arrays if computed else ())
        }
        numbers = {name: dict(zip(positions, values, strict=True)) for name, values in arrays.items()}
        write_sequences(path, tokens, [each.id for each in sequences], numbers)

    def read_sequences(self, path: Path | None) -> Iterator[tuple[list[TokenSequence], int]]:
        """See `TrainerWorker.read_sequences`."""
        if path is not None:
            sequences = read_sequences(path)
            yield sequences, len(sequences)

    def begin_profile(self, step: int) -> None:
        """See `StepProfiler.begin`."""
        self._profiler.begin(step)

    def end_profile(self) -> Path | None:
        """See `StepProfiler.end`."""
        return self._profiler.end()

    def memory(self) -> dict[str, int]:
        """Return memory in bytes: in use on this host, and the peak on this device since the start."""
        used = {"cpu_memory_used": psutil.virtual_memory().used}
        if self._device.type == "cuda":
            used["max_memory_allocated"] = torch.cuda.max_memory_allocated()
            used["max_memory_reserved"] = torch.cuda.max_memory_reserved()
        return used

    def close(self) -> None:
        """End the engine that lives here, which has groups of its own within the group, and leave the group."""
        if self._generator is not None:
            self._generator.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _generating(self) -> Generator:
        if self._generator is None:
            raise RuntimeError("the engines of this run live in other processes")
        return self._generator
