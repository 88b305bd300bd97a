"""Run functions on several processes that form a torch.distributed group, and give back what each returns."""

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any


def run_on_ranks(function: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on `size` new processes joined over gloo; results by rank."""
    with Ranks(size, folder) as ranks:
        return ranks.run(function, *arguments)


class Ranks:
    """`size` processes joined over gloo, for one call after the other. They take their time to start."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._results = context.Queue()
        self._calls = [context.Queue() for _ in range(size)]
        meeting = (folder / "meeting").as_uri()
        self._processes = [
            context.Process(target=_enter, args=(rank, size, meeting, self._calls[rank], self._results))
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on all; results by rank. After one that raises the others are of no use."""
        if not all(process.is_alive() for process in self._processes):
            raise RuntimeError("a process has ended: an earlier call failed")
        for calls in self._calls:
            calls.put((function, arguments))
        results: dict[int, Any] = {}
        for _ in self._processes:
            rank, result, error = self._results.get(timeout=240)
            if error:
                for process in self._processes:
                    process.kill()
                raise RuntimeError(f"rank {rank}:\n{error}")
            results[rank] = pickle.loads(result)
        return [results[rank] for rank in range(len(self._processes))]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for calls in self._calls:
            calls.put(None)
        for process in self._processes:
            if kind is None:
                process.join(timeout=10)
            process.kill()


_joined: dict[str, Any] = {}  # in a process of `Ranks`: how it joined the others, and how often


def rejoin() -> None:
    """Leave all groups and join the others anew, on each of the processes: groups that are left behind keep threads."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    _joined["times"] += 1
    dist.init_process_group(
        "gloo",
        init_method=f"{_joined['meeting']}-{_joined['times']}",
        rank=_joined["rank"],
        world_size=_joined["size"],
    )


def _enter(rank: int, size: int, meeting: str, calls: Any, results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        _joined.update(meeting=meeting, rank=rank, size=size, times=0)
        rejoin()
        while (call := calls.get()) is not None:
            function, arguments = call
            # Pickled here, tensors are copied; the queue would send them as shared memory that ends with this process.
            results.put((rank, pickle.dumps(function(*arguments)), None))
        if dist.is_initialized():  # a vLLM that is no longer referred to has ended it
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
