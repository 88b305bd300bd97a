"""The protocol between the training loop and the processes that it calls."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from iiverl_core.cluster.messages import (
    Advantages,
    RankBatch,
    ReceivedWeights,
    TokenArrays,
    Trained,
    Updated,
    WeightSync,
    WorkerInfo,
)
from iiverl_core.cluster.store import Store
from iiverl_core.errors import IIVerlError
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.samples import Handle, Rollout, SequenceRef, TokenSequence
from iiverl_core.training import Role

T = TypeVar("T")


class WorkerError(IIVerlError):
    """A worker raised or died; the message names it and holds its traceback."""


class WorkerDiedError(WorkerError):
    """The process of a worker has ended, by no fault of the code that it ran: another one may fare better."""


@dataclass(frozen=True)
class ProcessReport:
    """What a process was doing `age_s` seconds ago: in `call` (None: waiting for one) since `call_s` seconds.

    `count` grows as it makes progress (`iiverl_core.activity`). `age_s` is None if nothing was ever heard of it.
    """

    label: str
    process: str = ""
    call: str | None = None
    call_s: float = 0.0
    count: int = 0
    stacks: str = ""
    age_s: float | None = None


class TrainerWorker(Protocol):
    """The calls that the loop makes to a process that trains. Each takes and returns small things."""

    def evaluate(self, role: Role, batch: RankBatch) -> TokenArrays:
        """Compute log-probs under a policy, or values of the critic, for the trained tokens of each sequence."""
        ...

    def score(self, batch: RankBatch) -> list[float]:
        """Score each sequence with the reward model."""
        ...

    def update(self, role: Trained, batch: RankBatch, lr: float) -> Updated:
        """Make one optimizer step on a mini-batch."""
        ...

    def advantages(
        self,
        sequences: list[SequenceRef],
        scores: list[float],
        baselines: list[float] | None,
        kl_coef: float,
    ) -> Advantages:
        """Compute the advantages of a step; `kl_coef` 0 means no KL in the reward."""
        ...

    def select_tokens(self, sequences: list[SequenceRef]) -> list[Handle]:
        """Let the policy loss select tokens of a whole mini-batch."""
        ...

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: Sampling
    ) -> Iterator[tuple[list[TokenSequence], list[Rollout]]]:
        """Make rollouts with the engine that lives here; yield as `Generator.generate` does.

        If the engine spans several workers, all of them get the same requests, and the first yields the rollouts.
        """
        ...

    def sleep(self, discard_weights: bool) -> None:
        """Let the engine that lives here release the memory that only generating needs; see `Generator.sleep`."""
        ...

    def release_cache(self) -> None:
        """Let the engine that lives here release the memory of keys and values alone."""
        ...

    def update_rollout_weights(self, sync: WeightSync) -> ReceivedWeights:
        """Give the engine that lives here the actor's weights."""
        ...

    def weight_digests(self, base: bool) -> dict[str, int]:
        """Compute the digest of each weight that engines are given in a sync, with that of the base or without."""
        ...

    def begin_save(self, folder: Path) -> None:
        """Copy the trained models, and write the copies into `folder`, one folder per model, in the background."""
        ...

    def finish_save(self) -> None:
        """Wait until this process has written its part of what `begin_save` writes."""
        ...

    def saved_files(self, folder: Path) -> dict[str, int]:
        """Return the size of each file in `folder`, as seen by this machine; whole only when all have written."""
        ...

    def load(self, folder: Path) -> None:
        """Take over the trained models that `begin_save` wrote."""
        ...

    def write_sequences(
        self, path: Path, sequences: list[SequenceRef], positions: list[int], computed: list[SequenceRef]
    ) -> None:
        """Write the token arrays of sequences to a file, in their order, and the arrays of `computed`.

        `computed` are those of the sequences, at `positions`, for which arrays were computed, all under the same names.
        """
        ...

    def read_sequences(self, path: Path | None) -> Iterator[tuple[list[TokenSequence], int]]:
        """Yield the sequences that `write_sequences` wrote, and their number; nothing without a path."""
        ...

    def begin_profile(self, step: int) -> None:
        """Start the trace of a step, if this process is profiled."""
        ...

    def end_profile(self) -> Path | None:
        """Write the trace; return its file, or None if this process is not profiled."""
        ...

    def memory(self) -> dict[str, int]:
        """Give memory in bytes: what is used on this host, and on this device the most since the start."""
        ...


class WorkerGroup(Protocol):
    """The workers of a run, one per device. Methods are named by the function: `group.run(TrainerWorker.evaluate, …)`."""

    @property
    def store(self) -> Store:
        """The store of the workers, as the caller reaches it."""
        ...

    @property
    def infos(self) -> Sequence[WorkerInfo]:
        """Position, process and device of each worker, by rank."""
        ...

    def run(self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
        """Call a method on every worker at the same time, each with its own arguments, and return all results by rank.

        Raises:
            WorkerError: a worker raised or died; the group is of no further use.
        """
        ...

    def run_on(self, rank: int, method: Callable[..., T], *arguments: Any) -> T:
        """Call a method on one worker only. Raises as `run` does."""
        ...

    def stream(
        self, method: Callable[..., Iterator[tuple[Any, Any]]], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[Any, Any]]:
        """Call a generator on every worker, which yields pairs of a value for the store and one for the caller.

        Yields pairs of a reference to the stored value and the other value, as they come. Raises as `run` does.
        """
        ...

    def close(self) -> None:
        """End all workers and free what they held. May be called twice."""
        ...
