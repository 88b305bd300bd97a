"""Store token arrays and other values, and name them by handles that can be sent to other workers."""

from collections.abc import Sequence
from typing import Any, Protocol

from iiverl_core.samples import Handle, Handles


class Store(Protocol):
    """Keeps objects under references that can be sent to other processes; an object lives as long as a reference."""

    def put(self, value: Any) -> Any:
        """Keep `value` and return a reference to it."""
        ...

    def get(self, references: Sequence[Any]) -> list[Any]:
        """Fetch the objects behind several references."""
        ...


class LocalStore:
    """For one process: an object is its own reference."""

    def put(self, value: Any) -> Any:
        """Return `value`."""
        return value

    def get(self, references: Sequence[Any]) -> list[Any]:
        """Return the objects."""
        return list(references)


def put_all(store: Store, values: Sequence[Any]) -> list[Handle]:
    """Put several values as one object, and return a handle to each."""
    reference = store.put(list(values))
    return Handles(Handle(reference, index) for index in range(len(values)))


def open_all(store: Store, handles: Sequence[Handle]) -> list[Any]:
    """Fetch what handles name; an object that several share is fetched once."""
    unique = {id(handle.ref): handle.ref for handle in handles}
    fetched = dict(zip(unique, store.get(list(unique.values())), strict=True))
    return [fetched[id(handle.ref)][handle.index] for handle in handles]
