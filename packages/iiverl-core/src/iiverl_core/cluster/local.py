"""The runtime without Ray: one worker in this process, where breakpoints work."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from iiverl_core import activity
from iiverl_core.cluster.store import LocalStore
from iiverl_core.cluster.worker import Worker
from iiverl_core.config import RunConfig
from iiverl_core.errors import ConfigError

T = TypeVar("T")


class LocalGroup:
    """One worker, called directly, whose exceptions are not wrapped. Implements `WorkerGroup`."""

    def __init__(self, run: RunConfig) -> None:
        """Build the worker.

        Raises:
            ConfigError: a CUDA device is asked for and there is none.
        """
        device = run.trainer.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("trainer.device: cuda, but torch sees no CUDA device here; use auto or cpu")
        self.store = LocalStore()
        self._folder = TemporaryDirectory(prefix="iiverl-")
        init_method = (Path(self._folder.name) / "rendezvous").as_uri()
        try:
            self._worker = Worker(run, 0, 1, device, self.store, init_method)
        except BaseException:
            self._folder.cleanup()
            raise
        self.infos = [self._worker.info]

    def run(self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """See `WorkerGroup.run`."""
        return [self.run_on(0, method, *each) for each in arguments]

    def run_on(self, rank: int, method: Callable[..., T], *arguments: Any) -> T:
        """See `WorkerGroup.run_on`."""
        with activity.call(method.__name__):
            return getattr(self._worker, method.__name__)(*arguments)

    def stream(
        self, method: Callable[..., Iterator[tuple[Any, Any]]], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[Any, Any]]:
        """See `WorkerGroup.stream`."""
        for each in arguments:
            for stored, passed_on in self.run_on(0, method, *each):
                yield self.store.put(stored), passed_on

    def close(self) -> None:
        """See `WorkerGroup.close`."""
        self._worker.close()
        self._folder.cleanup()
