"""A rollout worker: an engine, or one device's part of it, with weights from the trainer workers."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.utils.logging import disable_progress_bar

from iiverl_core.cluster.generation import Generator
from iiverl_core.cluster.interruption import InterruptionAddress, Interruptions
from iiverl_core.cluster.messages import ReceivedWeights, WeightSync
from iiverl_core.cluster.process_settings import make_deterministic
from iiverl_core.cluster.rendezvous import join_process_group
from iiverl_core.cluster.store import Store
from iiverl_core.cluster.weight_sync import WeightReceiver
from iiverl_core.cluster.weight_transport import BucketMetadata, WeightTransport
from iiverl_core.config import RunConfig
from iiverl_core.registry import ENGINES
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.samples import Rollout, TokenSequence

POLL_S = 0.5  # between two checks of a device's memory


@dataclass(frozen=True)
class RolloutWorkerInfo:
    """A rollout worker's process and device."""

    rank: int
    host: str
    pid: int
    device: str


class RolloutWorker:
    """One process that only generates, on one device; consecutive ranks share an engine.

    `device_type` is `cpu` or `cuda`.
    """

    def __init__(
        self,
        run: RunConfig,
        rank: int,
        device_type: str,
        store: Store,
        init_method: str,
        interruptions: InterruptionAddress | None = None,
    ) -> None:
        """Join the engine's other processes at `init_method`, and build it, still without weights.

        Calls of `generate` can be interrupted at `interruptions`.

        Raises:
            ConfigError: the engine cannot run the model, or there is no tokenizer.
        """
        disable_progress_bar()
        make_deterministic(device_type, asked=run.trainer.deterministic)
        size = run.engine_devices
        if size > 1:
            join_process_group(init_method, rank % size, size, device_type)
        if device_type == "cuda" and ENGINES[run.rollout.name].memory == "pool":
            await_memory(run.rollout.gpu_memory_utilization)
        self._interruptions = (
            Interruptions(interruptions, rank // size, rank % size, size) if interruptions else None
        )
        self._generator = Generator(run, torch.device(device_type), rank)
        self._weight_receiver = WeightReceiver(
            rank, store, torch.device(device_type), self._generator.update_weights
        )
        device = torch.cuda.get_device_name() if device_type == "cuda" else "cpu"
        self.info = RolloutWorkerInfo(rank, socket.gethostname(), os.getpid(), device)

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling, call: int
    ) -> Iterator[tuple[list[TokenSequence], list[Rollout]]]:
        """Make rollouts; yield as `Generator.generate` does. `call` is the number by which it can be interrupted.

        All processes of an engine get the same requests; the first yields the rollouts, the others nothing.
        """
        if self._interruptions is None:
            return self._generator.generate(requests, sampling)
        return self._generator.generate(requests, sampling, self._interruptions.of_call(call))

    def begin_weight_sync(self, sync: WeightSync, transport: WeightTransport) -> None:
        """See `WeightReceiver.begin`."""
        self._weight_receiver.begin(sync, transport)

    def load_bucket(self, bucket: BucketMetadata) -> str | None:
        """See `WeightReceiver.load`."""
        return self._weight_receiver.load(bucket)

    def finish_weight_sync(self) -> ReceivedWeights:
        """See `WeightReceiver.finish`."""
        return self._weight_receiver.finish()


def await_memory(fraction: float, seconds: float = 30.0) -> None:
    """Wait until this `fraction` of the GPU's memory is free and no more is being freed, or at most `seconds`.

    An engine that takes the place of one that was killed would otherwise count memory that the driver is still freeing.
    """
    free = -1
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before, (free, total) = free, torch.cuda.mem_get_info()
        if free == before and free >= fraction * total:
            return
        time.sleep(POLL_S)
