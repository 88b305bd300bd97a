"""The seam between the loop and the processes it commands."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from iiverl_core.cluster.messages import WorkerInfo
from iiverl_core.cluster.store import Store
from iiverl_core.errors import IIVerlError

T = TypeVar("T")


class WorkerError(IIVerlError):
    """A worker raised or died; the message names it and holds its traceback."""


class WorkerGroup(Protocol):
    """The workers of a run, one a device. Methods are named by the function: `group.run(Worker.evaluate, …)`."""

    @property
    def store(self) -> Store:
        """The store of the workers, as the caller reaches it."""
        ...

    @property
    def infos(self) -> Sequence[WorkerInfo]:
        """What each worker is, by rank."""
        ...

    def run(self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """Call a method on every worker at the same time, each with its own arguments, and give all results by rank.

        Raises:
            WorkerError: a worker raised or died; the group is of no further use.
        """
        ...

    def run_on(self, rank: int, method: Callable[..., T], *arguments: Any) -> T:
        """Call a method that works alone on one worker. Raises as `run` does."""
        ...

    def stream(
        self, method: Callable[..., Iterator[tuple[Any, Any]]], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[Any, Any]]:
        """Call a generator on every worker, which yields pairs: a value for the store and one for the caller.

        Yields pairs as they come: a reference to the stored value, and the other. Raises as `run` does.
        """
        ...

    def close(self) -> None:
        """End all workers and free what they held. May be called twice."""
        ...
