"""The process on a device that only generates: an engine, or a part of one, with weights from the processes that train."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers.utils.logging import disable_progress_bar

from iiverl_core.cluster.generation import Generator
from iiverl_core.cluster.rendezvous import join_process_group
from iiverl_core.cluster.store import Store
from iiverl_core.cluster.weight_sync import WeightReceiver
from iiverl_core.cluster.weight_transport import BucketMetadata, WeightTransport
from iiverl_core.config import RunConfig
from iiverl_core.registry import ENGINES
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.samples import Rollout, TokenSequence

PAUSE_SECONDS = 0.5  # between two looks at a device's memory


@dataclass(frozen=True)
class RolloutWorkerInfo:
    """What the controller needs to know of a process that generates."""

    rank: int
    host: str
    pid: int
    device: str


class RolloutWorker:
    """One process that generates, on one device; consecutive ranks have an engine together.

    `device_type` is `cpu` or `cuda`.
    """

    def __init__(self, run: RunConfig, rank: int, device_type: str, store: Store, init_method: str) -> None:
        """Join the engine's other processes at `init_method`, and build it, still without weights.

        Raises:
            ConfigError: the engine cannot run the model, or there is no tokenizer.
        """
        disable_progress_bar()
        size = run.engine_devices
        if size > 1:
            join_process_group(init_method, rank % size, size, device_type)
        if device_type == "cuda" and ENGINES[run.rollout.name].memory == "pool":
            await_memory(run.rollout.gpu_memory_utilization)
        self._generator = Generator(run, torch.device(device_type), rank)
        self._weight_receiver = WeightReceiver(
            rank, store, torch.device(device_type), self._generator.update_weights
        )
        device = torch.cuda.get_device_name() if device_type == "cuda" else "cpu"
        self.info = RolloutWorkerInfo(rank, socket.gethostname(), os.getpid(), device)

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling
    ) -> Iterator[tuple[list[TokenSequence], list[Rollout]]]:
        """Make rollouts; yield as `Generator.generate` does.

        Of the processes of an engine, which get the same requests, the first yields, and the others nothing.
        """
        return self._generator.generate(requests, sampling)

    def begin_weight_sync(self, version: int, transport: WeightTransport) -> None:
        """See `WeightReceiver.begin`."""
        self._weight_receiver.begin(version, transport)

    def load_bucket(self, bucket: BucketMetadata) -> str | None:
        """See `WeightReceiver.load`."""
        return self._weight_receiver.load(bucket)

    def finish_weight_sync(self) -> None:
        """See `WeightReceiver.finish`."""
        self._weight_receiver.finish()


def await_memory(share: float, seconds: float = 30.0) -> None:
    """Wait until this `share` of the GPU's memory is free and no more becomes so, or at most so many seconds.

    An engine that takes the place of one that was killed would else count the memory that the driver is still freeing.
    """
    free = -1
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before, (free, total) = free, torch.cuda.mem_get_info()
        if free == before and free >= share * total:
            return
        time.sleep(PAUSE_SECONDS)
