"""Run functions on several processes that form a torch.distributed group, and return what each returns."""

import importlib
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any


class Ranks:
    """`size` processes joined over gloo, for one call after the other.

    They start with the first call, and again with the first after one that failed. The first process imports the module
    of the function to call, and `modules`, then forks the others: imports take longer than most calls. What most groups
    need is imported once, in the process that all groups are forked from.
    """

    def __init__(self, size: int, folder: Path, modules: tuple[str, ...] = ()) -> None:
        self._size, self._folder, self._modules = size, folder, modules
        self._first: Any = None
        self._starts = count()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on all; results by rank. If one raises, all are killed."""
        if self._first is None:
            self._start(function.__module__)
        for calls in self._calls:
            calls.put((function, arguments))
        results: dict[int, Any] = {}
        try:
            while len(results) < self._size:
                rank, result, error = self._results.get(timeout=240)
                if error:
                    raise RuntimeError(f"rank {rank}:\n{error}")
                results[rank] = pickle.loads(result)
        except BaseException:
            self.close()
            raise
        return [results[rank] for rank in range(self._size)]

    def close(self) -> None:
        """Kill the processes."""
        if self._first is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._first.pid, signal.SIGKILL)
            self._first.join()
            self._first = None

    def _start(self, module: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["iiverl_fsdp.backend"])
        self._results = context.Queue()
        self._calls = [context.Queue() for _ in range(self._size)]
        init_method = (self._folder / f"rendezvous-{next(self._starts)}").as_uri()
        arguments = ((*self._modules, module), init_method, self._calls, self._results)
        self._first = context.Process(target=_first, args=arguments)
        self._first.start()


_joined: dict[str, Any] = {}  # in a process of `Ranks`: how it joined the others, and how often


def rejoin() -> None:
    """Leave all groups and join the others again, on each of the processes: groups that are left behind keep threads."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    _joined["times"] += 1
    dist.init_process_group(
        "gloo",
        init_method=f"{_joined['init_method']}-{_joined['times']}",
        rank=_joined["rank"],
        world_size=_joined["size"],
    )


def _first(modules: tuple[str, ...], init_method: str, calls: list[Any], results: Any) -> None:
    os.setpgrp()  # `close` kills the group
    try:
        for module in modules:
            importlib.import_module(module)
    except BaseException:
        results.put((0, None, traceback.format_exc()))
        return
    rank = next((rank for rank in range(1, len(calls)) if os.fork() == 0), 0)
    _serve(rank, len(calls), init_method, calls[rank], results)


def _serve(rank: int, size: int, init_method: str, calls: Any, results: Any) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        _joined.update(init_method=init_method, rank=rank, size=size, times=0)
        rejoin()
        while True:
            function, arguments = calls.get()
            # Pickled here, tensors are copied; the queue would send them as shared memory that ends with this process.
            results.put((rank, pickle.dumps(function(*arguments)), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
