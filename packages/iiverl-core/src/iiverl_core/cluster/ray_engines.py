"""Engines on devices of their own, in processes that may die and be started again."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from iiverl_core.cluster.engines import attach_handles
from iiverl_core.cluster.ray_group import (
    GRACE_SECONDS,
    RayStore,
    WorkerActor,
    device_of,
    next_pair,
    plain,
    reserve,
)
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
from iiverl_core.errors import IIVerlError
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.samples import Rollout

MEGABYTE = 2**20
DEATHS = 5  # of one engine without a sample in between, after which the run ends


def transport_factory(device: str) -> WeightTransportFactory:
    """Choose how weights are transferred: by broadcast on `cuda`; on `cpu` through the store, which is shared memory."""
    return BroadcastRendezvous(ray.util.get_node_ip_address()) if device == "cuda" else StoreTransport()


class RayEngines:
    """Engines under Ray on `trainer.rollout_devices` processes that only generate. Implements `Engines`.

    An engine is spread over `RunConfig.engine_devices` consecutive processes, which have no use without each other: when
    one dies the others are ended. The engine is started again at the next `update_weights`. Weights come from the
    processes of `group`, a bucket at a time, by the transport of `transport_factory`.
    """

    def __init__(self, run: RunConfig, group: WorkerGroup, log: Callable[[str], None]) -> None:
        """Reserve devices and build the engines, still without weights.

        Raises:
            ConfigError: the cluster does not have the devices, or the engine cannot run the model.
            WorkerError: an engine could not be built.
        """
        self._run, self._group, self._log = run, group, log
        self._size = run.engine_devices
        count = (run.trainer.rollout_devices or 0) // self._size
        self._device = device_of(run)
        self._transports = transport_factory(self._device)
        self._engines: list[list[Any]] = [[] for _ in range(count)]
        """The processes of each engine; none where it is dead."""
        self.infos: list[RolloutWorkerInfo | None] = [None] * (count * self._size)
        self._deaths = [0] * count
        self._placement: PlacementGroup | None = reserve([self._size] * count, self._device, strategy="PACK")
        try:
            self._start(range(count))
        except BaseException:
            self.close()
            raise

    def generate(
        self, requests: Sequence[Sequence[RolloutRequest]], sampling: Sampling
    ) -> Iterator[list[Rollout]]:
        """See `Engines.generate`."""
        waiting: dict[Any, int] = {
            actor.stream.options(num_returns="streaming").remote("generate", (each, sampling)): rank
            for each, actors in zip(requests, self._by_rank(), strict=True)
            if each
            for rank, actor in actors.items()
        }
        while waiting:
            ready: list[Any] = ray.wait(list(waiting), num_returns=1, fetch_local=False)[0]
            for stream in ready:
                try:
                    reference, rollouts = next_pair(stream)
                except StopIteration:
                    del waiting[stream]
                    continue
                except (RayActorError, RayTaskError) as error:
                    engine = self._failed(waiting[stream], "generate", error)
                    waiting = {s: rank for s, rank in waiting.items() if rank // self._size != engine}
                    continue
                self._deaths[waiting[stream] // self._size] = 0
                yield attach_handles(rollouts, reference)

    def update_weights(self, version: int) -> None:
        """See `Engines.update_weights`. An engine that dies meanwhile is started again, and all get the weights anew."""
        failures = 0  # in a row, of which no engine has died
        while True:
            deaths = sum(self._deaths)
            self._start([engine for engine, actors in enumerate(self._engines) if not actors])
            reason = self._sync(version)
            if reason is None:
                return
            self._transports.abort(reason)
            failures = failures + 1 if sum(self._deaths) == deaths else 0
            if failures == DEATHS:
                raise WorkerError(f"the engines did not get their weights, {DEATHS} times in a row: {reason}")

    def _sync(self, version: int) -> str | None:
        """Give all engines the weights; returns the reason if one did not get them all."""
        transport = self._transports.transport(len(self.infos))
        self._group.run(Worker.begin_weight_sync, [(transport,)] * len(self._group.infos))
        reason = self._all("begin_weight_sync", version, transport)
        while reason is None and (bucket := self._next_bucket()) is not None:
            reason = self._all("load_bucket", bucket)
        return self._all("finish_weight_sync") if reason is None else reason

    def sleep(self, *, discard_weights: bool) -> None:
        """Do nothing: no one else needs these devices' memory."""

    def __len__(self) -> int:
        return len(self._engines)

    def close(self) -> None:
        """End all engines and free what they held. May be called twice."""
        for engine in range(len(self)):
            self._end(engine)
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    def _by_rank(self) -> list[dict[int, Any]]:
        return [dict(enumerate(actors, i * self._size)) for i, actors in enumerate(self._engines)]

    def _next_bucket(self) -> BucketMetadata | None:
        size = self._run.rollout.update_weights_bucket_megabytes * MEGABYTE
        buckets = self._group.run(Worker.next_bucket, [(size,)] * len(self._group.infos))
        return next((bucket for bucket in buckets if bucket is not None), None)

    def _start(self, engines: Sequence[int]) -> None:
        """Start these engines, side by side."""
        if self._placement is None:
            raise RuntimeError("the engines have been closed")
        for engine in engines:
            actor = ray.remote(WorkerActor).options(
                num_cpus=1,
                num_gpus=1 if self._device == "cuda" else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=engine
                ),
            )
            self._engines[engine] += [actor.remote(RolloutWorker, str(Path.cwd())) for _ in range(self._size)]
        calls: dict[Any, int] = {}
        for engine in engines:
            init_method = self._init_method(engine)
            calls |= {
                actor.build.remote((self._run, rank, self._device, RayStore(), init_method)): rank
                for rank, actor in self._by_rank()[engine].items()
            }
        while calls:
            for call in ray.wait(list(calls), num_returns=1)[0]:
                rank = calls.pop(call)
                try:
                    self.infos[rank] = ray.get(call)
                except (RayActorError, RayTaskError) as error:
                    raise self._failure(rank, "its start", error) from None

    def _init_method(self, engine: int) -> str:
        """Give an address on the machine of an engine's first process, where the others find it."""
        try:
            return ray.get(self._engines[engine][0].address.remote())
        except (RayActorError, RayTaskError) as error:
            raise self._failure(engine * self._size, "its start", error) from None

    def _all(self, method: str, *arguments: Any) -> str | None:
        """Call a method on every process that is alive, side by side, and say why, where one could not do as it should.

        An engine that dies is left out from there on.
        """
        calls = {
            actor.call.remote(method, arguments): rank
            for actors in self._by_rank()
            for rank, actor in actors.items()
        }
        reason: str | None = None
        while calls:
            for call in ray.wait(list(calls), num_returns=1)[0]:
                rank = calls.pop(call)
                try:
                    failed = ray.get(call)
                    reason = reason or failed
                except (RayActorError, RayTaskError) as error:
                    engine = self._failed(rank, method, error)
                    reason = f"{self._where(rank)} died"
                    calls = {c: other for c, other in calls.items() if other // self._size != engine}
        return reason

    def _failed(self, rank: int, doing: str, error: Exception) -> int:
        """End an engine of which a process died, leave it out until it is started again, and give its number.

        The weight transport, which led to it, is aborted, so that nobody waits for this process.

        Raises:
            WorkerError: none died, but one raised; or the engine has died too often.
        """
        engine = rank // self._size
        death = (rank, error) if isinstance(error, RayActorError) else self._death(engine)
        if death is None:
            raise self._failure(rank, doing, error) from None
        self._end(engine)
        self._transports.abort(f"{self._where(death[0])} died")
        self._deaths[engine] += 1
        if self._deaths[engine] >= DEATHS:
            raise self._failure(death[0], doing, death[1]) from None
        self._log(
            f"warning: {self._where(death[0])} died; it is started again, and its unfinished responses are regenerated"
        )
        return engine

    def _death(self, engine: int) -> tuple[int, RayActorError] | None:
        """Find the process of an engine that died: the others raise for want of it, maybe before the news is here."""
        calls = {actor.address.remote(): rank for rank, actor in self._by_rank()[engine].items()}
        for call in ray.wait(list(calls), num_returns=len(calls), timeout=GRACE_SECONDS)[0]:
            try:
                ray.get(call)
            except RayActorError as error:
                return calls[call], error
        return None

    def _end(self, engine: int) -> None:
        for actor in self._engines[engine]:
            ray.kill(actor)
        self._engines[engine] = []

    def _where(self, rank: int) -> str:
        info = self.infos[rank]
        return f"rollout engine {rank // self._size}" + (
            f" (process {info.pid} on {info.host})" if info else ""
        )

    def _failure(self, rank: int, doing: str, error: Exception) -> IIVerlError:
        if isinstance(error, RayTaskError) and isinstance(error.cause, IIVerlError):
            return error.cause
        where = self._where(rank)
        if isinstance(error, RayTaskError):
            return WorkerError(f"{where} raised in {doing}:\n{plain(error)}")
        return WorkerError(
            f"{where} died {self._deaths[rank // self._size]} times in a row in {doing}. If the machine killed it, it "
            f"ran out of memory: lower {ROLLOUT}.gpu_memory_utilization or max_num_seqs.\n"
            f"{error}"
        )
