"""Engines on devices of their own, in processes that are started again when they die."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import ray

from iiverl_core.cluster.engines import attach_handles
from iiverl_core.cluster.heartbeats import Heartbeats
from iiverl_core.cluster.interruption import Interrupter
from iiverl_core.cluster.messages import ReceivedWeights, WeightSync
from iiverl_core.cluster.ray_group import device_of
from iiverl_core.cluster.ray_placement import PLACEMENT_TIMEOUT_S
from iiverl_core.cluster.ray_pool import PoolSpec, RayPool, RayStore
from iiverl_core.cluster.rollout_worker import RolloutWorker, RolloutWorkerInfo
from iiverl_core.cluster.runtime import WorkerError, WorkerGroup
from iiverl_core.cluster.weight_transport import (
    BroadcastRendezvous,
    BucketMetadata,
    StoreTransport,
    WeightTransportFactory,
)
from iiverl_core.cluster.worker import Worker
from iiverl_core.config import ROLLOUT, RunConfig
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.samples import Rollout

MEGABYTE = 2**20
MAX_RESTARTS = 4  # of one engine without a sample in between; the next death ends the run
MAX_FAILED_SYNCS = 5  # in a row, in which no engine died


def transport_factory(device: str) -> WeightTransportFactory:
    """Choose how weights are transferred: by broadcast on `cuda`; on `cpu` through the store, which is shared memory."""
    return BroadcastRendezvous(ray.util.get_node_ip_address()) if device == "cuda" else StoreTransport()


class RayEngines:
    """Engines under Ray on `trainer.rollout_devices` processes that only generate. Implements `Engines`.

    An engine is spread over `RunConfig.engine_devices` consecutive processes. One that dies is left out, and started
    again at the next `update_weights`. If that is in vain, it is retired, as long as `rollout.min_engines` are left. Weights come from the processes of `group` in buckets, by the transport of
    `transport_factory`.
    """

    def __init__(
        self,
        run: RunConfig,
        group: WorkerGroup,
        log: Callable[[str], None],
        heartbeats: Heartbeats | None = None,
    ) -> None:
        """Reserve devices and build the engines, still without weights. Their processes report to `heartbeats`.

        Raises:
            ConfigError: the cluster does not have the devices, or the engine cannot run the model.
            WorkerError: an engine could not be built.
        """
        self._run, self._group, self._log = run, group, log
        self._size = size = run.engine_devices
        self._death: str | None = None  # in the current weight sync
        self._have_base = set[int]()  # the processes that keep weights of the base model
        self._calls = 0  # of `generate`
        self._interrupter = Interrupter(ray.util.get_node_ip_address()) if run.interrupts_rollouts else None
        address = self._interrupter.address if self._interrupter else None
        device = device_of(run)
        self._transports = transport_factory(device)
        self._pool = RayPool(
            PoolSpec(
                RolloutWorker,
                lambda rank, init_method: (run, rank, device, RayStore(), init_method, address),
                device,
                bundles=[size] * ((run.trainer.rollout_devices or 0) // size),
                strategy="PACK",
                replica_size=size,
                label=lambda rank: f"rollout engine {rank // size}",
                death_hint=(
                    "If the machine killed it, it ran out of memory: lower "
                    f"{ROLLOUT}.gpu_memory_utilization or max_num_seqs."
                ),
                max_restarts=MAX_RESTARTS,
                min_replicas=run.rollout.min_engines,
                placement_timeout_s=run.trainer.placement_timeout or PLACEMENT_TIMEOUT_S,
            ),
            on_death=self._on_death,
            heartbeats=heartbeats,
            log=log,
        )

    @property
    def infos(self) -> Sequence[RolloutWorkerInfo | None]:
        """What each process is, by rank; None while it is not running."""
        return self._pool.infos

    def generate(
        self, requests: Mapping[int, Sequence[RolloutRequest]], sampling: Sampling
    ) -> Iterator[list[Rollout]]:
        """See `Engines.generate`."""
        by_rank = {rank: requests.get(rank // self._size, ()) for rank in self._pool.running}
        self._calls += 1
        arguments = {rank: (each, sampling, self._calls) for rank, each in by_rank.items() if each}
        for reference, rollouts in self._pool.stream(RolloutWorker.generate, arguments):
            yield attach_handles(rollouts, reference)

    def interrupt(self) -> None:
        """See `Engines.interrupt`."""
        if self._interrupter is None:
            raise RuntimeError("these engines were not built to be interrupted")
        self._interrupter.interrupt(self._calls)

    def update_weights(self, version: int, *, verify: bool) -> list[ReceivedWeights]:
        """See `Engines.update_weights`. If an engine dies meanwhile, it is started again and all get the weights again."""
        failed = 0
        while isinstance(reason := self._sync(version, verify), str):
            self._transports.abort(reason)
            failed = failed + 1 if self._death is None else 0
            if failed == MAX_FAILED_SYNCS:
                raise WorkerError(f"the engines did not get their weights, {failed} times in a row: {reason}")
        return reason

    def sleep(self, *, discard_weights: bool) -> None:
        """Do nothing: no one else needs these devices' memory."""

    def release_cache(self) -> None:
        """Do nothing, as in `sleep`."""

    @property
    def numbers(self) -> Sequence[int]:
        """See `Engines.numbers`."""
        return self._pool.replicas

    def close(self) -> None:
        """End all engines and free their devices. May be called twice."""
        self._pool.close()

    def _sync(self, version: int, verify: bool) -> list[ReceivedWeights] | str:
        """Give all engines the weights, and return what each process got, or the reason if one did not get them all."""
        self._pool.start()
        self._death = None
        running = {info.pid for info in self.infos if info is not None}
        sync = WeightSync(version, verify, base=not running <= self._have_base)
        transport = self._transports.transport(self._pool.running)
        self._group.run(Worker.begin_weight_sync, [(sync, transport)] * len(self._group.infos))
        reason = self._on_all(RolloutWorker.begin_weight_sync, sync, transport)
        while reason is None and (bucket := self._next_bucket()) is not None:
            reason = self._on_all(RolloutWorker.load_bucket, bucket)
        if reason is not None:
            return reason
        received = self._pool.call(RolloutWorker.finish_weight_sync, dict.fromkeys(self._pool.running, ()))
        if self._death is None and self._run.syncs_adapters:
            self._have_base = running
        return self._death or list(received.values())

    def _next_bucket(self) -> BucketMetadata | None:
        size = self._run.rollout.update_weights_bucket_megabytes * MEGABYTE
        buckets = self._group.run(Worker.next_bucket, [(size,)] * len(self._group.infos))
        return next((bucket for bucket in buckets if bucket is not None), None)

    def _on_all(self, method: Callable[..., str | None], *arguments: object) -> str | None:
        """Call a method on every process; returns the reason if one died or could not do it."""
        reasons = self._pool.call(method, dict.fromkeys(self._pool.running, arguments))
        return self._death or next(filter(None, reasons.values()), None)

    def _on_death(self, message: str, retired: bool) -> None:
        # The trainer and the other engines may be waiting for the dead one in a broadcast.
        self._transports.abort(message)
        self._death = message
        if not retired:
            self._log(
                f"warning: {message}; it is started again, and its unfinished responses are regenerated"
            )
            return
        count = len(self.numbers)
        self._log(
            f"warning: {message}; it is retired, and its unfinished responses are regenerated by the {count} "
            f"engine{'s' * (count != 1)} that {'are' if count != 1 else 'is'} left (rollout.min_engines: "
            f"{self._run.rollout.min_engines})"
        )
