"""Processes under Ray: their start and calls, and what happens when one of them dies."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from iiverl_core import activity
from iiverl_core.cluster.heartbeats import HeartbeatAddress, Heartbeats
from iiverl_core.cluster.ray_actor import WorkerActor
from iiverl_core.cluster.ray_placement import (
    PLACEMENT_TIMEOUT_S,
    REPORT_S,
    Machines,
    find_machines,
    reserve,
)
from iiverl_core.cluster.runtime import WorkerDiedError, WorkerError
from iiverl_core.errors import IIVerlError
from iiverl_core.stopping import undisturbed

T = TypeVar("T")
POLL_S = 0.5  # between looks for a machine
GRACE_S = 3  # how long to wait for news of a death after an exception that may be its consequence
START = "its start"


class RayStore:
    """Ray's object store, as a `Store`."""

    def put(self, value: Any) -> Any:
        """See `Store.put`."""
        return ray.put(value)

    def get(self, references: Sequence[Any]) -> list[Any]:
        """See `Store.get`."""
        return ray.get(list(references))


@dataclass(frozen=True)
class PoolSpec:
    """The processes of a pool, and what happens when one dies.

    Consecutive ranks form replicas of `replica_size` processes, which are of no use without each other: when one dies,
    so does its replica. Up to `max_restarts` deaths of a replica in a row, with nothing streamed in between, leave it
    out until `RayPool.start` starts it again; with one more it is retired, if `min_replicas` others are left, and else
    that raises. So it is if the machine of a replica is gone.
    """

    worker: Callable[..., Any]
    arguments: Callable[[int, str], tuple[Any, ...]]
    """The worker's arguments for a rank and the `init_method` of its replica."""
    device: str
    bundles: Sequence[int]
    """Numbers of consecutive ranks that are placed on one machine."""
    strategy: str
    """`SPREAD` bundles over machines, or `PACK` them on few."""
    replica_size: int
    label: Callable[[int], str]
    """The name of a rank in messages."""
    death_hint: str
    """What to do about deaths, for the last message."""
    max_restarts: int = 0
    min_replicas: int | None = None
    """Replicas without which the pool is of no use; null for all."""
    placement_timeout_s: float = PLACEMENT_TIMEOUT_S
    """Seconds to wait for the devices."""


class RayPool:
    """Processes under Ray, each an actor around a worker on one device.

    A failed call raises an `IIVerlError` of the worker as it is, and else a `WorkerError` that names the process which
    failed first. A death counts before an exception: a process that dies makes others fail in their next collective
    call, and their exceptions may arrive before the news of the death.
    """

    def __init__(
        self,
        spec: PoolSpec,
        on_death: Callable[[str, bool], None] = lambda message, retired: None,
        heartbeats: Heartbeats | None = None,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Reserve devices, start the processes, and build the workers.

        `on_death` is called with a message as soon as a replica died that can be started again, or is retired, and with
        which of both it is. The processes report what they do to `heartbeats`. `log` gets a line now and then while
        devices are waited for.

        Raises:
            ConfigError: the cluster does not have the devices.
            WorkerError: a worker could not be built.
        """
        self._spec, self._on_death, self._heartbeats, self._log = spec, on_death, heartbeats, log
        self._bundle = [bundle for bundle, size in enumerate(spec.bundles) for _ in range(size)]
        self._actors: dict[int, Any] = {}
        self._addresses: dict[int, HeartbeatAddress] = {}
        self._deaths = [0] * (len(self._bundle) // spec.replica_size)  # of each replica, in a row
        self._retired: dict[int, Machines | None] = {}  # where each replica was that is retired
        self._started = False
        self._placement: PlacementGroup | None = None
        self.infos: list[Any] = [None] * len(self._bundle)
        """What each worker is, by rank; None while it is not running."""
        try:
            self._placement = reserve(
                spec.bundles, spec.device, strategy=spec.strategy, timeout_s=spec.placement_timeout_s, log=log
            )
            self.start()
            self._started = True
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> list[int]:
        """The ranks of the processes that are running."""
        return sorted(self._actors)

    @property
    def replicas(self) -> list[int]:
        """The replicas that are not retired."""
        return [replica for replica in range(len(self._deaths)) if replica not in self._retired]

    def start(self) -> None:
        """Start the processes that are not running, side by side.

        A replica whose machine is gone is retired if `min_replicas` others are left, and else waited for. It comes back
        when Ray has found another machine for it.

        Raises:
            WorkerError: a worker could not be built, or a replica died too often, or has no machine.
        """
        size = self._spec.replica_size
        while missing := self._find_missing():
            self._actors |= {rank: self._make_actor(rank) for rank in missing}
            first = {self._actors[rank].init_method.remote(): rank for rank in missing if rank % size == 0}
            init_methods = self._gather(first, START)
            builds: dict[Any, int] = {}
            for rank in missing:
                if rank in self._actors:
                    arguments = self._spec.arguments(rank, init_methods[rank // size * size])
                    builds[self._actors[rank].build.remote(arguments)] = rank
            for rank, info in self._gather(builds, START).items():
                if rank in self._actors:
                    self.infos[rank] = info

    def call(self, method: Callable[..., T], arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, T]:
        """Call a method on several ranks at the same time, and return the results by rank.

        All calls are awaited at once, so a failure is noticed while others still hang in a collective call. Results of
        a replica that died are missing.
        """
        calls = {
            self._actors[rank].call.remote(method.__name__, each): rank for rank, each in arguments.items()
        }
        return self._gather(calls, method.__name__)

    def stream(
        self, method: Callable[..., Iterator[tuple[Any, Any]]], arguments: Mapping[int, tuple[Any, ...]]
    ) -> Iterator[tuple[Any, Any]]:
        """Call a generator of pairs on several ranks, and yield pairs as they come.

        A pair is a reference to its first value, in Ray's store, and the other value. Those that a replica had not
        yielded when it died are missing.
        """
        streams: dict[Any, int] = {
            self._actors[rank].stream.options(num_returns="streaming").remote(method.__name__, each): rank
            for rank, each in arguments.items()
        }
        while streams:
            ready: list[Any] = ray.wait(list(streams), num_returns=1, fetch_local=False)[0]
            stream = ready[0]
            rank = streams[stream]
            try:
                reference = next(stream)
                value = ray.get(next(stream, reference))  # a failure comes alone
            except StopIteration:
                del streams[stream]
                continue
            except (RayActorError, RayTaskError) as error:
                self._fail(rank, method.__name__, error)
                streams = {each: rank for each, rank in streams.items() if rank in self._actors}
                continue
            self._deaths[rank // self._spec.replica_size] = 0
            activity.advance()
            yield reference, value

    def close(self) -> None:
        """End all processes and free their devices. May be called twice."""
        with undisturbed():
            for replica in range(len(self._deaths)):
                self._end(replica)
            if self._placement is not None:
                remove_placement_group(self._placement)
                self._placement = None

    def _make_actor(self, rank: int) -> Any:
        if self._placement is None:
            raise RuntimeError("the pool has been closed")
        if self._heartbeats is not None:
            self._addresses[rank] = self._heartbeats.expect(self._spec.label(rank))
        actor = ray.remote(WorkerActor).options(
            num_cpus=1,
            num_gpus=1 if self._spec.device == "cuda" else 0,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._placement, placement_group_bundle_index=self._bundle[rank]
            ),
        )
        worker = cloudpickle.dumps(self._spec.worker)  # pyright: ignore[reportPrivateImportUsage]
        return actor.remote(worker, str(Path.cwd()), self._addresses.get(rank))

    def _gather(self, calls: dict[Any, int], doing: str) -> dict[int, Any]:
        results: dict[int, Any] = {}
        while calls:
            (call,) = ray.wait(list(calls), num_returns=1)[0]
            rank = calls.pop(call)
            try:
                results[rank] = ray.get(call)
                activity.advance()
            except (RayActorError, RayTaskError) as error:
                self._fail(rank, doing, error)
                calls = {call: rank for call, rank in calls.items() if rank in self._actors}
        return results

    def _fail(self, rank: int, doing: str, error: Exception) -> None:
        """Raise the first cause of a failure, unless that is a death of a replica that can be started again."""
        replica = rank // self._spec.replica_size
        death = (rank, error) if isinstance(error, RayActorError) else self._find_death(replica)
        ours = isinstance(error, RayTaskError) and isinstance(error.cause, IIVerlError)
        verb = "died"
        if death is None and self._started and doing == START and not ours:
            death, verb = (rank, error), "raised"  # where it once could be built: the device may be broken
        if death is None:
            if isinstance(error, RayTaskError) and isinstance(error.cause, IIVerlError):
                raise error.cause from None
            raise WorkerError(f"{self._describe(rank)} raised in {doing}:\n{_plain(error)}") from None
        who = self._describe(death[0])
        self._deaths[replica] += 1
        if self._started and self._deaths[replica] <= self._spec.max_restarts:
            self._end(replica)
            self._on_death(f"{who} {verb}", False)
            return
        times = f" {self._deaths[replica]} times in a row" if self._deaths[replica] > 1 else ""
        what = f"{who} {verb}{times} in {doing}"
        if not self._started or not self._may_retire():
            raise WorkerDiedError(f"{what}. {self._spec.death_hint}\n{_plain(death[1])}") from None
        self._retire(replica, what, self._find_machines()[replica])

    def _may_retire(self) -> bool:
        """Whether the pool can do without one more replica."""
        needed = len(self._deaths) if self._spec.min_replicas is None else self._spec.min_replicas
        return len(self.replicas) > needed

    def _retire(self, replica: int, what: str, machines: Machines | None) -> None:
        self._end(replica)
        self._retired[replica] = machines
        self._on_death(what, True)

    def _find_missing(self) -> list[int]:
        """Find the ranks to start, after what is to be done about replicas whose machine is gone or another one."""
        began = reported = time.monotonic()
        while self._started and len(self._actors) < len(self.infos) and (gone := self._review_machines()):
            names = ", ".join(map(self._label, gone))
            waited = time.monotonic() - began
            if waited > self._spec.placement_timeout_s:
                raise WorkerDiedError(
                    f"the machine of {names} was lost, and the Ray cluster has had no other one for {waited:.0f} s"
                )
            if time.monotonic() - reported > REPORT_S:
                reported = time.monotonic()
                self._log(f"waiting for another machine for {names}")
            activity.advance()
            time.sleep(POLL_S)
        size = self._spec.replica_size
        return [
            rank
            for each in self.replicas
            for rank in range(each * size, (each + 1) * size)
            if rank not in self._actors
        ]

    def _review_machines(self) -> list[int]:
        """Take back the replicas that have another machine, and retire those that have none; returns the indispensable ones."""
        machines = self._find_machines()
        for replica, before in list(self._retired.items()):
            if machines[replica] not in (None, before):
                del self._retired[replica]
                self._deaths[replica] = 0
                self._log(f"{self._label(replica)} is started again, on another machine")
        gone = [each for each in self.replicas if machines[each] is None and not self._ranks(each)]
        while gone and self._may_retire():
            replica = gone.pop()
            self._retire(replica, f"{self._label(replica)} has lost its machine", None)
        return gone

    def _find_machines(self) -> list[Machines | None]:
        """Find the machines of each replica; None if one of them is gone."""
        if self._placement is None:
            raise RuntimeError("the pool has been closed")
        size = self._spec.replica_size
        bundles = [self._bundle[rank : rank + size] for rank in range(0, len(self._bundle), size)]
        return find_machines(self._placement, bundles)

    def _find_death(self, replica: int) -> tuple[int, RayActorError] | None:
        """Find a process of a replica that died, or of which the news arrives within `GRACE_S`."""
        pings = {self._actors[rank].ping.remote(): rank for rank in self._ranks(replica)}
        deadline = time.monotonic() + GRACE_S
        while pings and (left := deadline - time.monotonic()) > 0:
            for ping in ray.wait(list(pings), num_returns=1, timeout=left)[0]:
                rank = pings.pop(ping)
                try:
                    ray.get(ping)
                except RayActorError as error:
                    return rank, error
        return None

    def _end(self, replica: int) -> None:
        for rank in self._ranks(replica):
            ray.kill(self._actors.pop(rank))
            self.infos[rank] = None
            if self._heartbeats is not None:
                self._heartbeats.forget(self._addresses.pop(rank))

    def _ranks(self, replica: int) -> list[int]:
        size = self._spec.replica_size
        return [rank for rank in range(replica * size, (replica + 1) * size) if rank in self._actors]

    def _label(self, replica: int) -> str:
        return self._spec.label(replica * self._spec.replica_size)

    def _describe(self, rank: int) -> str:
        info = self.infos[rank]
        return self._spec.label(rank) + (f" (process {info.pid} on {info.host})" if info else "")


def _plain(error: Exception) -> str:
    """Remove the colours that Ray puts into its tracebacks."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))
