"""The interface between the algorithm and parallelism.

Core owns the algorithm: it builds micro-batches, computes losses and distributes the work over processes. A backend
owns parallelism: it builds a model from a Hugging Face path, runs it forward and backward over given micro-batches,
steps an optimizer, and exports weights and gradients by Hugging Face name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from iiverl_core.config import FSDPConfig, MegatronConfig, ModelConfig, Offload, OptimConfig
from iiverl_core.config.roles import Role
from iiverl_core.samples import TokenSequence

if TYPE_CHECKING:  # the controller uses these types and runs without torch
    import torch
    from torch import Tensor

    from iiverl_core.algorithms.segments import Segments


LayoutKind: TypeAlias = Literal["padded", "packed", "shared"]
"""How the sequences of a micro-batch are arranged: in a padded row each, packed into one row, or packed with one copy of
what the sequences of a group have in common (`training.layout`)."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything a backend needs to build one model on its share of the devices.

    With `model.lora_rank`, only LoRA adapters and a critic's head are trained.

    `optim` is None for a model that is only run forward. `default_dtype` is that of the master weights if the
    configuration sets none. Each sequence is split over `sequence_split` devices, if the backend can. Weights are read from
    `weights`, or from `model.path` if it is None.
    """

    role: Role
    model: ModelConfig
    parallel: FSDPConfig | MegatronConfig
    device: torch.device
    default_dtype: str = "fp32"
    optim: OptimConfig | None = None
    grad_clip: float | None = None
    offload: Offload = field(default_factory=Offload)
    sequence_split: int = 1
    weights: Path | None = None
    freeze_vision_tower: bool = False


@dataclass(frozen=True)
class ParallelRank:
    """Position of one process in its backend's parallel layout.

    Processes of the same `data_rank` work on the same sequences (tensor, pipeline and context parallel ranks, or Ulysses').
    `is_output_rank` is true on the one of them whose results are kept.
    """

    data_rank: int
    data_size: int
    is_output_rank: bool = True


@dataclass
class MicroBatch:
    """A few sequences that go through the model together; `groups`, if known, has the group of each.

    `arrays_T` has values per trained token (old log-probs, advantages, …), flat over sequences, and `weights_T` the
    weight of each trained token in the loss of the whole batch. `inv_num_tokens` is one over the batch's number of
    trained tokens, for metrics that are means over tokens. Both are zero in a dummy micro-batch, which keeps
    processes in step if one has no work. With `tokens_by_staleness`, which counts the batch's trained tokens by the steps that
    their weights are older than in turn, the array `staleness` has these steps.
    """

    sequences: list[TokenSequence]
    weights_T: Tensor
    inv_num_tokens: float = 0.0
    temperature: float = 1.0
    groups: Sequence[Hashable] = ()
    arrays_T: Mapping[str, Tensor] = field(default_factory=dict)
    tokens_by_staleness: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def segments(self) -> Segments:
        """Segments of the trained tokens of each sequence.

        Raises:
            ValueError: a sequence has none.
        """
        from iiverl_core.algorithms.segments import Segments

        return Segments.of([sequence.trained for sequence in self.sequences], self.weights_T.device)


@dataclass(frozen=True)
class Outputs:
    """Model outputs for a micro-batch, fp32.

    Empty on a process without the model's last layer. A policy returns `log_probs_T` of each trained token at the
    micro-batch's temperature and, if requested, `entropy_T`, in nats. A critic returns `values_T`, of the state before
    each trained token: its head's output at the position that predicts the token. A reward model returns `scores_B`,
    its head's output at the last token of each sequence.
    """

    log_probs_T: Tensor | None = None
    entropy_T: Tensor | None = None
    values_T: Tensor | None = None
    scores_B: Tensor | None = None


Loss: TypeAlias = Callable[[Outputs, MicroBatch], "tuple[Tensor, dict[str, Tensor]]"]
"""Returns a micro-batch's contribution to the batch's loss, and metrics whose sum over all micro-batches and processes
is the batch's value, or whose maximum is, if the name ends in `/max` (`training.metrics.merge`)."""


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step: the gradient's norm before clipping, and whether the step was taken.

    A step is not taken if its gradient is not finite.
    """

    grad_norm: float
    taken: bool


AdapterWeights: TypeAlias = Literal["merged", "omitted", "only"]


class TrainingBackend(Protocol):
    """One model, spread over the processes of a worker group; every process makes the same calls in the same order."""

    parallel_rank: ParallelRank
    layout: LayoutKind

    def __init__(self, spec: ModelSpec) -> None:
        """Build the model, and choose its layout. `torch.distributed` is initialized, with one process per device.

        Raises:
            ConfigError: the model cannot be read, or not packed although `spec.model.use_remove_padding` is true.
        """
        ...

    def forward(
        self, micro_batches: Sequence[MicroBatch], *, entropy: bool = False, adapter: bool = True
    ) -> list[Outputs]:
        """Run the model without gradients. All processes pass the same number of micro-batches.

        Without `adapter`, the model computes what it did before its LoRA adapters were added.
        """
        ...

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Loss,
        *,
        entropy: bool = False,
        entropy_gradient: bool = True,
    ) -> dict[str, float]:
        """Add the gradient of the losses' sum, over all micro-batches and processes, and return this process's metrics.

        `entropy` requests `Outputs.entropy_T`. If it is only reported, set `entropy_gradient` to false to save its
        backward pass and the memory for it.
        """
        ...

    def step(self, lr: float) -> StepResult:
        """Clip the gradient, step the optimizer with learning rate `lr`, and clear the gradient."""
        ...

    def named_weights(
        self, dtype: torch.dtype | None = None, *, adapters: AdapterWeights = "merged"
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield full tensors by the names of Hugging Face checkpoints, one at a time, the same on every process.

        LoRA adapters are merged into the weights of their layers or omitted, or only they are given, by the names of PEFT.
        Parameters are converted to `dtype`, if given, before they are gathered.
        """
        ...

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the full gradient of what is trained under the names of `named_weights`, without buffers, and clear it.

        With LoRA adapters, that is their weights, by the names of PEFT, and those of a critic's head.
        It is the gradient of the losses' sum over all processes, before clipping, and the same on every process.
        """
        ...

    def parameter_count(self, *, trained: bool = False) -> int:
        """Count the parameters of the whole model; with `trained`, those that an optimizer updates."""
        ...

    def save(self, folder: Path, *, optimizer: bool = True) -> Callable[[], None]:
        """Copy weights, optimizer and random states, and write them to `folder` in the background, from all processes.

        Without `optimizer`, the optimizer's state is omitted, and the result cannot be loaded by `load`. Training may
        continue at once. At most one save per model may be in progress.

        Returns:
            A function that waits for the files of all processes. All processes call it in the same order among their
            other calls, and it raises CheckpointError if a process could not write.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        ...

    @staticmethod
    def saved_weights(
        spec: ModelSpec, folder: Path, *, adapter: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what `save` wrote as full tensors by the names of Hugging Face checkpoints, one at a time, on the CPU.

        With `adapter`, only what was trained is yielded, LoRA adapters by the names of PEFT; otherwise these are merged into
        the weights that the run started from. Nothing else of the model is in memory. This process is a group of its own;
        the layout in `spec` is ignored.

        Raises:
            CheckpointError: the files are incomplete, or belong to another model.
        """
        ...

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, with any number of processes and any parallel layout.

        Raises:
            CheckpointError: the files are incomplete, or belong to another model.
        """
        ...
