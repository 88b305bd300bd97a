"""The seam between the algorithm and parallelism.

Core owns the algorithm: it makes micro-batches, computes losses and plans which process works on what. A backend owns
parallelism: it builds a model from a Hugging Face path, runs it forward and backward over the micro-batches it is
given, steps an optimizer, and gives the weights by Hugging Face name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from iiverl_core.algorithms.segments import Segments
from iiverl_core.config import FSDPConfig, MegatronConfig, ModelConfig, OptimConfig
from iiverl_core.config.roles import Role


@dataclass(frozen=True)
class Offload:
    """What lies in CPU memory while it is not used."""

    parameters: bool = False
    gradients: bool = False
    optimizer: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """Everything a backend needs to build one model on its share of the devices.

    `optim` is None for a model that is only run forward. `default_dtype` is that of the master weights where the
    configuration names none.
    """

    role: Role
    model: ModelConfig
    parallel: FSDPConfig | MegatronConfig
    device: torch.device
    default_dtype: str = "fp32"
    optim: OptimConfig | None = None
    grad_clip: float | None = None
    offload: Offload = Offload()


@dataclass(frozen=True)
class Place:
    """Where one process stands in its backend's layout.

    Processes of the same `data_rank` work on the same samples (tensor, pipeline and context parallel ranks). `reports`
    is true on the one of them whose results are to be kept.
    """

    data_rank: int
    data_size: int
    reports: bool = True


@dataclass
class MicroBatch:
    """A few sequences that go through the model together.

    `prompts` and `responses` hold token ids, one array a sequence, of their true lengths. `arrays_T` holds what is
    known of each response token (old log-probs, advantages, …), flat, and `weights_T` each token's share in the loss
    of the whole batch; `token_share` is one over the batch's number of tokens, for metrics that are means over tokens.
    A filler, which keeps processes in step where one has nothing to do, has zero in both.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    segments: Segments
    weights_T: Tensor
    token_share: float = 0.0
    temperature: float = 1.0
    arrays_T: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Outputs:
    """What a model says of the responses of a micro-batch, fp32.

    Empty on a process that does not have the model's end. A policy gives `log_probs_T` of each response token at the micro-batch's temperature and, where asked, `entropy_T`,
    in nats. A critic gives `values_T`, of the state before each response token: its head's output at the position that
    predicts the token. A reward model gives `scores_B`, its head's output at the last token of each sequence.
    """

    log_probs_T: Tensor | None = None
    entropy_T: Tensor | None = None
    values_T: Tensor | None = None
    scores_B: Tensor | None = None


Loss: TypeAlias = Callable[[Outputs, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
"""Gives a micro-batch's share of the batch's loss, and metrics whose sum over all micro-batches and processes is the
batch's value, or whose maximum is where the name ends in `/max` (`training.metrics.merge`)."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: the gradient's norm before clipping, and whether the step was taken.

    A step whose gradient is not finite is not taken.
    """

    grad_norm: float
    taken: bool


class TrainingBackend(Protocol):
    """One model, spread over the processes of a worker group; every process makes the same calls in the same order."""

    place: Place

    def __init__(self, spec: ModelSpec) -> None:
        """Build the model. `torch.distributed` is up, with one process a device."""
        ...

    def forward(self, micro_batches: Sequence[MicroBatch], *, entropy: bool = False) -> list[Outputs]:
        """Run the model without gradients. All processes pass the same number of micro-batches."""
        ...

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], loss: Loss, *, entropy: bool = False
    ) -> dict[str, float]:
        """Add the gradient of the losses' sum, over all micro-batches and processes, and return this process's metrics.

        `entropy` asks for `Outputs.entropy_T`, with gradient.
        """
        ...

    def step(self, lr: float) -> StepResult:
        """Clip the gradient, step the optimizer with learning rate `lr`, and clear the gradient."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by the names that Hugging Face checkpoints use, one at a time, the same on every process."""
        ...

    def parameter_count(self) -> int:
        """Parameters of the whole model."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and random states into `folder`, each process its part."""
        ...

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, by however many processes, in whatever layout.

        Raises:
            CheckpointError: it is not whole, or of another model.
        """
        ...
