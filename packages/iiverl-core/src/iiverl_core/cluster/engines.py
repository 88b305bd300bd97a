"""The protocol between the training loop and the rollout engines, wherever those run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

from iiverl_core.cluster.messages import ReceivedWeights, WeightSync
from iiverl_core.cluster.runtime import TrainerWorker, WorkerGroup
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.samples import Handle, Rollout


class Engines(Protocol):
    """The rollout engines of a run."""

    def generate(
        self, requests: Mapping[int, Sequence[RolloutRequest]], sampling: Sampling
    ) -> Iterator[list[Rollout]]:
        """Let each engine, given by its number, make the rollouts of its requests; yield them as they finish, each once.

        An engine that dies is left out from then on; its unfinished rollouts are missing. Those that are interrupted are
        missing too, and go on in the next call with the same `sampling` that gives their requests to the same engine.

        Raises:
            WorkerError: an engine raised, or none is left.
        """
        ...

    def interrupt(self) -> None:
        """Let `generate`, which runs in another thread, end soon, with what is finished by then.

        Raises:
            RuntimeError: the engines cannot be interrupted (`RunConfig.interrupts_rollouts`).
        """
        ...

    def update_weights(self, version: int, *, verify: bool) -> list[ReceivedWeights]:
        """Give every engine the actor's weights; those that died are started again, or retired if that is in vain.

        With `verify`, each checks that it computes with what it was given. Returns what each process was given.

        Raises:
            WeightMismatchError: an engine has other weights.
            WorkerError: as `generate`.
        """
        ...

    def sleep(self, *, discard_weights: bool) -> None:
        """Release the memory that only generating needs, if training needs it.

        With `discard_weights`, the weights' too: `update_weights` must come before anything else is generated.
        """
        ...

    def release_cache(self) -> None:
        """Release the memory of keys and values alone, if a model that works between two generations needs it."""
        ...

    @property
    def numbers(self) -> Sequence[int]:
        """The numbers of the engines that are in use. One that cannot be started again is retired; others keep theirs."""
        ...


def attach_handles(rollouts: Sequence[Rollout], reference: Any) -> list[Rollout]:
    """Point rollouts to their sequences, which lie in the store under `reference`, in the same order."""
    index = count()
    return [
        replace(
            rollout,
            sequences=tuple(
                sequence.stored_at(Handle(reference, next(index))) for sequence in rollout.sequences
            ),
        )
        for rollout in rollouts
    ]


class NoEngines:
    """The engines of a run whose responses are recorded. Implements `Engines`."""

    def generate(
        self, requests: Mapping[int, Sequence[RolloutRequest]], sampling: Sampling
    ) -> Iterator[list[Rollout]]:
        """Raise RuntimeError."""
        raise RuntimeError("this run has no engine")

    def interrupt(self) -> None:
        """Raise RuntimeError."""
        raise RuntimeError("this run has no engine")

    def update_weights(self, version: int, *, verify: bool) -> list[ReceivedWeights]:
        """Give nobody the weights."""
        return []

    def sleep(self, *, discard_weights: bool) -> None:
        """Do nothing."""

    def release_cache(self) -> None:
        """Do nothing."""

    @property
    def numbers(self) -> Sequence[int]:
        """There are none."""
        return ()


class ColocatedEngines:
    """Engines in the processes that train, on the same devices: they take turns with the memory.

    Each is spread over `size` consecutive processes, the first of which yields its rollouts. If one of them dies, the
    trainer worker in it has died too. Implements `Engines`.
    """

    def __init__(self, group: WorkerGroup, size: int, *, keep_base: bool = False) -> None:
        """With `keep_base`, engines keep the weights of the base model, and get LoRA adapters only from then on."""
        self._group, self._size = group, size
        self._keep_base, self._have_base = keep_base, False
        self._ranks = range(len(group.infos))

    def generate(
        self, requests: Mapping[int, Sequence[RolloutRequest]], sampling: Sampling
    ) -> Iterator[list[Rollout]]:
        """See `Engines.generate`."""
        arguments = [(requests[rank // self._size], sampling) for rank in self._ranks]
        for reference, rollouts in self._group.stream(TrainerWorker.generate, arguments):
            yield attach_handles(rollouts, reference)

    def interrupt(self) -> None:
        """Raise RuntimeError: no one is there to interrupt engines that live in the processes that train."""
        raise RuntimeError("engines in the processes that train cannot be interrupted")

    def update_weights(self, version: int, *, verify: bool) -> list[ReceivedWeights]:
        """See `Engines.update_weights`."""
        sync = WeightSync(version, verify, base=not self._have_base)
        self._have_base = self._keep_base
        return self._group.run(TrainerWorker.update_rollout_weights, [(sync,) for _ in self._ranks])

    def sleep(self, *, discard_weights: bool) -> None:
        """See `Engines.sleep`. Weights of the base model that engines keep are not discarded."""
        discard = discard_weights and not self._have_base
        self._group.run(TrainerWorker.sleep, [(discard,) for _ in self._ranks])

    def release_cache(self) -> None:
        """See `Engines.release_cache`."""
        self._group.run(TrainerWorker.release_cache, [() for _ in self._ranks])

    @property
    def numbers(self) -> Sequence[int]:
        """See `Engines.numbers`; none is ever retired."""
        return range(len(self._ranks) // self._size)
