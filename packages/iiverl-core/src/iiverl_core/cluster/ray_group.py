"""The runtime on Ray: a placement group with one process a device, on one machine or many."""

import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from iiverl_core.cluster.messages import WorkerInfo
from iiverl_core.cluster.ray_connection import start_ray, stop_ray
from iiverl_core.cluster.rendezvous import free_init_method
from iiverl_core.cluster.runtime import WorkerDiedError, WorkerError
from iiverl_core.cluster.worker import Worker
from iiverl_core.config import RunConfig
from iiverl_core.errors import ConfigError, IIVerlError

T = TypeVar("T")
PLACEMENT_SECONDS = 60  # how long resources of a shared cluster may take to come free before the run gives up
GRACE_SECONDS = 3  # how long to wait for a first cause after a failure that may be a consequence


class RayStore:
    """Ray's object store, as a `Store`."""

    def put(self, value: Any) -> Any:
        """See `Store.put`."""
        return ray.put(value)

    def get(self, references: Sequence[Any]) -> list[Any]:
        """See `Store.get`."""
        return ray.get(list(references))


class WorkerActor:
    """The actor around a worker: builds it, and calls its methods by name.

    The class `worker` is imported with the actor, so that little time passes between `address` and `build`. `folder` is where the
    run was started. Paths that a configuration gives are relative to it, so the process goes there; on a cluster it is
    a shared one.
    """

    def __init__(self, worker: Callable[..., Any], folder: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        if devices := ray.get_gpu_ids():  # Ray does so itself, unless the cluster is set up not to
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        self._class, self._worker = worker, None

    def address(self) -> str:
        """Give an `init_method` on this machine."""
        return free_init_method(ray.util.get_node_ip_address())

    def build(self, arguments: tuple[Any, ...]) -> Any:
        """Build the worker, and give its `info`."""
        worker = self._worker = self._class(*arguments)
        return worker.info

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method."""
        return getattr(self._worker, method)(*arguments)

    def stream(self, method: str, arguments: tuple[Any, ...]) -> Iterator[Any]:
        """Call a generator of pairs, and yield their parts in turn: `next_pair` puts them together again.

        So a pair's first part is an object of its own in Ray's store, which outlives this process. Ray loses objects
        that are only named within what a generator yields.
        """
        for stored, passed_on in getattr(self._worker, method)(*arguments):
            yield stored
            yield passed_on


class RayGroup:
    """`nnodes` × `n_gpus_per_node` workers under Ray. Implements `WorkerGroup`.

    Connects to the cluster that `RAY_ADDRESS` names, else starts Ray on this machine for the length of the run. On a
    machine without GPUs a "device" is a process on the CPU.
    """

    def __init__(self, run: RunConfig) -> None:
        """Reserve devices, start the processes, and build what they hold.

        Raises:
            ConfigError: there is no cluster where one is needed, it cannot be reached, or it does not have the devices.
            WorkerError: a worker could not be built.
        """
        self.store = RayStore()
        self.infos: list[WorkerInfo] = []
        self._actors: list[Any] = []
        self._placement: PlacementGroup | None = None
        nodes, per_node = run.trainer.nnodes, run.trainer.n_gpus_per_node
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            engines = run.trainer.rollout_devices or 0
            start_ray(cpus=max(os.cpu_count() or 1, nodes * per_node + engines), nodes=nodes)
        try:
            device = device_of(run)
            self._placement = reserve([per_node] * nodes, device, strategy="SPREAD")
            self._start(run, device, self._placement)
        except BaseException:
            self.close()
            raise

    def _start(self, run: RunConfig, device: str, placement: PlacementGroup) -> None:
        for rank in range(run.devices):
            strategy = PlacementGroupSchedulingStrategy(
                placement, placement_group_bundle_index=rank // run.trainer.n_gpus_per_node
            )
            actor = ray.remote(WorkerActor).options(
                num_cpus=1,
                num_gpus=1 if device == "cuda" else 0,
                max_restarts=0,
                scheduling_strategy=strategy,
            )
            self._actors.append(actor.remote(Worker, str(Path.cwd())))
        try:
            init_method = ray.get(self._actors[0].address.remote())
        except (RayActorError, RayTaskError) as error:
            raise self._failure("its start", 0, error, {}) from None
        size = run.devices
        builds = [
            actor.build.remote((run, rank, size, device, self.store, init_method))
            for rank, actor in enumerate(self._actors)
        ]
        self.infos = self._results("its start", builds)

    def run(self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """See `WorkerGroup.run`."""
        name = method.__name__
        calls = [actor.call.remote(name, each) for actor, each in zip(self._actors, arguments, strict=True)]
        return self._results(name, calls)

    def _results(self, doing: str, calls: Sequence[Any]) -> list[Any]:
        """Wait for the calls of all workers at once, and raise on the first failure."""
        waiting = {call: rank for rank, call in enumerate(calls)}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            for call in done:
                rank = waiting.pop(call)
                try:
                    ray.get(call)
                except (RayActorError, RayTaskError) as error:
                    raise self._failure(doing, rank, error, waiting) from None
        return ray.get(list(calls))

    def run_on(self, rank: int, method: Callable[..., T], *arguments: Any) -> T:
        """See `WorkerGroup.run_on`."""
        try:
            return ray.get(self._actors[rank].call.remote(method.__name__, arguments))
        except (RayActorError, RayTaskError) as error:
            raise self._failure(method.__name__, rank, error, {}) from None

    def stream(
        self, method: Callable[..., Iterator[tuple[Any, Any]]], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[Any, Any]]:
        """See `WorkerGroup.stream`."""
        name = method.__name__
        waiting: dict[Any, int] = {
            actor.stream.options(num_returns="streaming").remote(name, each): rank
            for rank, (actor, each) in enumerate(zip(self._actors, arguments, strict=True))
        }
        while waiting:
            ready: list[Any] = ray.wait(list(waiting), num_returns=1, fetch_local=False)[0]
            for generator in ready:
                try:
                    pair = next_pair(generator)
                except StopIteration:
                    del waiting[generator]
                    continue
                except (RayActorError, RayTaskError) as error:
                    rank = waiting.pop(generator)
                    raise self._failure(name, rank, error, {}) from None
                yield pair

    def close(self) -> None:
        """See `WorkerGroup.close`. A further Ctrl-C does not interrupt it: it takes seconds, and leaves nothing behind."""
        with _undisturbed():
            for actor in self._actors:
                ray.kill(actor)
            self._actors = []
            if self._placement is not None:
                remove_placement_group(self._placement)
                self._placement = None
            if self._started_ray:
                stop_ray()

    def _failure(self, doing: str, rank: int, error: Exception, others: dict[Any, int]) -> IIVerlError:
        """Name the worker that failed first.

        A worker that dies makes others fail at their next collective call, and their complaint may arrive before the
        news of the death. So others are waited for a moment, and a death counts before an exception.
        """
        failures = {rank: error}
        deadline = time.monotonic() + GRACE_SECONDS
        waiting = dict(others)
        while waiting and not isinstance(error, ActorDiedError) and time.monotonic() < deadline:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=deadline - time.monotonic())
            for call in done:
                other = waiting.pop(call)
                try:
                    ray.get(call)
                except (RayActorError, RayTaskError) as further:
                    failures[other] = further
        first = min(failures, key=lambda each: (not isinstance(failures[each], RayActorError), each != rank))
        cause = failures[first]
        if isinstance(cause, RayTaskError) and isinstance(cause.cause, IIVerlError):
            return cause.cause
        kind = WorkerError if isinstance(cause, RayTaskError) else WorkerDiedError
        return kind(_describe(first, self.infos, doing, cause))


def next_pair(generator: Any) -> tuple[Any, Any]:
    """Take a reference to what a generator yields next, unopened, and what it yields after that.

    Raises:
        StopIteration: there is nothing more.
        RayActorError, RayTaskError: it failed.
    """
    reference = next(generator)
    return reference, ray.get(next(generator, reference))  # a failure comes alone


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave Ctrl-C without effect for a while."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


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
    if gpus < run.devices + engines:
        more = f" and trainer.rollout_devices for {engines} more" if engines else ""
        raise ConfigError(
            f"trainer.nnodes × trainer.n_gpus_per_node asks for {run.devices} GPUs{more}, and the Ray cluster has "
            f"{gpus}; ask for fewer, add machines, or set trainer.device: cpu"
        )
    return "cuda"


def reserve(bundles: Sequence[int], device: str, *, strategy: str) -> PlacementGroup:
    """Reserve bundles of so many devices each, spread over machines or packed on few.

    Raises:
        ConfigError: they do not come free in time.
    """
    wanted = [{"CPU": float(n)} | ({"GPU": float(n)} if device == "cuda" else {}) for n in bundles]
    group = placement_group(wanted, strategy=strategy)
    if not group.wait(PLACEMENT_SECONDS):
        remove_placement_group(group)
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise ConfigError(
            f"the Ray cluster could not place {len(wanted)} × {wanted[0]} within {PLACEMENT_SECONDS} s; free now: "
            f"{free}. Wait for other jobs, or ask for less in trainer.nnodes, trainer.n_gpus_per_node and "
            "trainer.rollout_devices"
        )
    return group


def plain(error: Exception) -> str:
    """Write an error without the colours that Ray puts into its traceback."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))


def _describe(rank: int, infos: Sequence[WorkerInfo], doing: str, error: Exception) -> str:
    where = f"worker {rank}"
    if rank < len(infos):
        where += f" (process {infos[rank].pid} on {infos[rank].host})"
    if isinstance(error, RayTaskError):
        return f"{where} raised in {doing}:\n{plain(error)}"
    reason = "".join(traceback.format_exception_only(error)).strip()
    return f"{where} died in {doing}. If the machine killed it, it ran out of memory or was killed by hand.\n{reason}"
