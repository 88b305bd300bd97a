"""The runtime on Ray: a process per device, on one machine or many."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from iiverl_core.cluster.heartbeats import Heartbeats
from iiverl_core.cluster.messages import WorkerInfo
from iiverl_core.cluster.ray_placement import PLACEMENT_TIMEOUT_S
from iiverl_core.cluster.ray_pool import PoolSpec, RayPool, RayStore
from iiverl_core.cluster.worker import Worker
from iiverl_core.config import RunConfig
from iiverl_core.errors import ConfigError
from iiverl_core.stopping import undisturbed

T = TypeVar("T")


class RayGroup:
    """`nnodes` × `n_gpus_per_node` workers under Ray; when one dies the group has failed. Implements `WorkerGroup`.

    Ray runs already (`ray_for`). On a machine without GPUs a "device" is a process on the CPU. Another group may be made
    once one is closed. Several threads may call; their calls take turns.
    """

    def __init__(
        self,
        run: RunConfig,
        heartbeats: Heartbeats | None = None,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Reserve devices, start the processes, and build their models and engines.

        The processes report what they do to `heartbeats`; `log` gets a line now and then while devices are waited for.

        Raises:
            ConfigError: the cluster does not have the devices.
            WorkerError: a worker could not be built.
        """
        self.store = RayStore()
        # Workers meet in collective calls, so all of them have to get the calls of several threads in one order.
        self._one_at_a_time = threading.RLock()
        nodes, per_node = run.trainer.nnodes, run.trainer.n_gpus_per_node
        device = device_of(run)
        self._pool = RayPool(
            PoolSpec(
                Worker,
                lambda rank, init_method: (run, rank, run.devices, device, self.store, init_method),
                device,
                bundles=[per_node] * nodes,
                strategy="SPREAD",
                replica_size=run.devices,
                label=lambda rank: f"worker {rank}",
                death_hint="If the machine killed it, it ran out of memory or was killed by hand.",
                placement_timeout_s=run.trainer.placement_timeout or PLACEMENT_TIMEOUT_S,
            ),
            heartbeats=heartbeats,
            log=log,
        )

    @property
    def infos(self) -> Sequence[WorkerInfo]:
        """See `WorkerGroup.infos`."""
        return self._running.infos

    def run(self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """See `WorkerGroup.run`."""
        with self._one_at_a_time:
            results = self._running.call(method, self._by_rank(arguments))
        return [results[rank] for rank in sorted(results)]

    def run_on(self, rank: int, method: Callable[..., T], *arguments: Any) -> T:
        """See `WorkerGroup.run_on`."""
        with self._one_at_a_time:
            return self._running.call(method, {rank: arguments})[rank]

    def stream(
        self, method: Callable[..., Iterator[tuple[Any, Any]]], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[Any, Any]]:
        """See `WorkerGroup.stream`."""
        return self._running.stream(method, self._by_rank(arguments))

    def close(self) -> None:
        """See `WorkerGroup.close`. A further Ctrl-C does not interrupt it: it takes seconds, and leaves nothing behind."""
        with undisturbed():
            if self._pool is not None:
                self._pool.close()
                self._pool = None

    @property
    def _running(self) -> RayPool:
        if self._pool is None:
            raise RuntimeError("the workers have been closed")
        return self._pool

    def _by_rank(self, arguments: Sequence[tuple[Any, ...]]) -> dict[int, tuple[Any, ...]]:
        return dict(zip(self._running.running, arguments, strict=True))


def driver_heartbeats(interval_s: float) -> Heartbeats:
    """Receive the reports of a run's processes, every `interval_s` each, on this machine."""
    return Heartbeats(ray.util.get_node_ip_address(), interval_s)


def device_of(run: RunConfig) -> str:
    """Choose `cpu` or `cuda`, by what is asked for and what the cluster has.

    Raises:
        ConfigError: the cluster has too few GPUs.
    """
    asked = run.trainer.device
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if asked == "cpu" or (asked == "auto" and gpus == 0):
        return "cpu"
    engines = run.trainer.rollout_devices or 0
    if gpus < run.devices + engines and run.trainer.placement_timeout is None:
        more = f" and trainer.rollout_devices for {engines} more" if engines else ""
        raise ConfigError(
            f"trainer.nnodes × trainer.n_gpus_per_node asks for {run.devices} GPUs{more}, and the Ray cluster has "
            f"{gpus}; ask for fewer, add machines, set trainer.placement_timeout if the cluster adds them itself, or set "
            "trainer.device: cpu"
        )
    return "cuda"
