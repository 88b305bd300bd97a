"""A pool of processes under Ray, without models: who failed first, and what is started again."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from iiverl_core.cluster.runtime import WorkerDiedError, WorkerError
from iiverl_core.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("sent_by_value", "ray_is_up")]


@dataclass(frozen=True)
class Info:
    pid: int
    host: str


class Echo:
    """A worker that does as it is told."""

    def __init__(self, rank: int, init_method: str) -> None:
        self.rank, self.info = rank, Info(os.getpid(), init_method)

    def double(self, value: int) -> int:
        return 2 * value

    def hang(self, rank: int) -> int:
        """Wait as in a collective call, except on one rank, which dies."""
        if self.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        return rank

    def refuse(self, rank: int, after: float) -> None:
        """Fail as a process whose peer died, on all ranks but one, which dies later."""
        if self.rank == rank:
            time.sleep(after)
            os.kill(os.getpid(), signal.SIGKILL)
        raise ConnectionError("closed by peer")

    def misconfigured(self) -> None:
        raise ConfigError("trainer.device: wrong")

    def count(self, to: int, dies: bool) -> Iterator[tuple[list[int], str]]:
        for i in range(to):
            yield [self.rank, i], str(i)
        if dies:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def sent_by_value() -> Iterator[None]:
    """Send the classes of this file whole: tests are on no path of the workers."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def make() -> Iterator[Callable]:
    from iiverl_core.cluster.ray_pool import PoolSpec, RayPool

    pools: list[RayPool] = []

    def make(
        replicas: int, size: int, max_restarts: int = 0, min_replicas: int | None = None, **options
    ) -> RayPool:
        spec = PoolSpec(
            Echo,
            lambda rank, init_method: (rank, init_method),
            "cpu",
            bundles=[size] * replicas,
            strategy="PACK",
            replica_size=size,
            label=lambda rank: f"echo {rank}",
            death_hint="Speak up.",
            max_restarts=max_restarts,
            min_replicas=min_replicas,
        )
        pools.append(RayPool(spec, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_a_death_counts_before_exceptions_that_follow_from_it(make) -> None:
    pool = make(1, 3)
    assert len({info.host for info in pool.infos}) == 1  # one init_method
    assert pool.call(Echo.double, {0: (1,), 2: (3,)}) == {0: 2, 2: 6}
    with pytest.raises(WorkerError, match=r"echo 2 \(process .*\) died in refuse\. Speak up\."):
        pool.call(Echo.refuse, dict.fromkeys(pool.running, (2, 0.5)))


def test_exceptions_keep_their_traceback_and_those_for_users_their_type(make) -> None:
    pool = make(2, 1)
    with pytest.raises(
        WorkerError, match=r"(?s)echo 1 \(process .*raised in refuse:.*ConnectionError: closed"
    ):
        pool.call(Echo.refuse, {1: (0, 0.0)})
    with pytest.raises(ConfigError, match=r"^trainer\.device: wrong$"):
        pool.call(Echo.misconfigured, {0: ()})


def test_a_replica_that_died_is_left_out_and_started_again(make) -> None:
    deaths: list[str] = []
    pool = make(2, 2, max_restarts=1, on_death=lambda message, _: deaths.append(message))
    pids = [info.pid for info in pool.infos]
    started = time.monotonic()
    with_the_dead = dict.fromkeys((2, 3), (3,))
    assert pool.call(Echo.hang, with_the_dead) == {}
    assert time.monotonic() - started < 30
    assert pool.running == [0, 1] and pool.infos[2:] == [None, None]
    assert len(deaths) == 1 and deaths[0].startswith(f"echo 3 (process {pids[3]} on ")
    assert not psutil.wait_procs([psutil.Process(pid) for pid in pids[2:] if psutil.pid_exists(pid)], 30)[1]
    pool.start()
    assert pool.running == [0, 1, 2, 3]
    assert [info.pid for info in pool.infos[:2]] == pids[:2]
    assert not {info.pid for info in pool.infos[2:]} & {*pids}
    with pytest.raises(WorkerError, match=r"echo 3 .* died 2 times in a row in hang"):
        pool.call(Echo.hang, with_the_dead)


def test_what_cannot_be_started_again_is_retired_until_it_has_another_machine(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iiverl_core.cluster import ray_pool

    places: list[tuple[str] | None] = [("a",), ("b",)]
    monkeypatch.setattr(ray_pool, "find_machines", lambda *_: list(places))
    deaths: list[tuple[str, bool]] = []
    lines: list[str] = []
    options: Any = {"on_death": lambda *each: deaths.append(each), "log": lines.append}
    pool = make(2, 1, max_restarts=1, min_replicas=1, **options)
    pool.call(Echo.hang, {1: (1,)})
    places[1] = None
    pool.start()
    assert pool.replicas == pool.running == [0]
    assert [retired for _, retired in deaths] == [False, True] and deaths[1][
        0
    ] == "echo 1 has lost its machine"
    places[1] = ("c",)
    for _ in range(2):
        pool.start()
        assert pool.replicas == pool.running == [0, 1]
        pool.call(Echo.hang, {1: (1,)})
    assert lines == ["echo 1 is started again, on another machine"]
    assert [retired for _, retired in deaths[2:]] == [False, True]
    assert re.match(r"echo 1 \(process .*\) died 2 times in a row in hang$", deaths[3][0])
    pool.start()  # which leaves it out, since it would be the same machine
    assert pool.replicas == pool.running == [0]
    places[:] = None, None
    pool.call(Echo.hang, {0: (0,)})
    clock = iter(range(0, 10**6, 10))
    times = SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    monkeypatch.setattr(ray_pool, "time", times)
    with pytest.raises(WorkerDiedError, match=r"the machine of echo 0 was lost, and the Ray cluster has"):
        pool.start()
    assert lines[1] == "waiting for another machine for echo 0"


def test_a_stream_goes_on_without_those_that_died(make) -> None:
    import ray

    pool = make(2, 1, max_restarts=1)
    for _ in range(2):  # what was streamed in between makes the second death the first in a row again
        pairs = list(pool.stream(Echo.count, {0: (4, False), 1: (2, True)}))
        got = sorted((*ray.get(reference), text) for reference, text in pairs)
        assert got == [(0, i, str(i)) for i in range(4)] + [(1, i, str(i)) for i in range(2)]
        assert pool.running == [0]
        pool.start()
