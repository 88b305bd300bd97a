"""Output layers that compute log-probs, or one number, at selected positions only.

They replace megatron-core's output layer; `at` selects the positions before the forward pass. Under sequence
parallelism the hidden states are gathered first, since selected positions may lie on any process.

Suffixes: `_SBD` positions, rows, features; `_N` selected positions; `_V` this process's part of the vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from iiverl_core.training.head import VocabularyPart, head_log_probs
from iiverl_core.training.support import Support
from iiverl_megatron.parallel import tensor_group


@dataclass(frozen=True)
class Positions:
    """Rows and columns of the selected positions, both (N,)."""

    rows_N: Tensor
    columns_N: Tensor


@dataclass(frozen=True)
class Targets:
    """The token to predict at each selected position, (N,), and options of `head_log_probs`."""

    ids_N: Tensor
    temperature: float
    entropy: bool
    entropy_gradient: bool
    support: Support | None = None


class _PositionSelector:
    """Selects positions of the last hidden states."""

    gathers: bool
    positions: Positions | None = None
    targets: Targets | None = None

    @contextmanager
    def at(self, positions: Positions, targets: Targets) -> Iterator[None]:
        """Select these positions, where a policy predicts `targets`, in forward passes within the context."""
        self.positions, self.targets = positions, targets
        try:
            yield
        finally:
            self.positions = self.targets = None

    def pick(self, hidden_SBD: Tensor) -> Tensor:
        """Return the hidden states at the positions, (N, D)."""
        if self.positions is None:
            raise RuntimeError("no positions are selected")
        if self.gathers:
            # The backward pass gives every process the whole gradient; each keeps the part of its positions.
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
        return hidden_SBD[self.positions.columns_N, self.positions.rows_N]


class PolicyHead(_PositionSelector, ColumnParallelLinear):
    """The log-prob of each target and, if requested, the entropy, (N, 1, 1 or 2), over a vocabulary split over processes."""

    def __init__(self, config: TransformerConfig, made: ColumnParallelLinear, vocabulary: int) -> None:
        """Take the sizes and the weight of megatron-core's layer `made`; a tied one has no weight of its own.

        Rows of the weight past `vocabulary` are padding.
        """
        alone = copy(config)
        alone.sequence_parallel = False
        super().__init__(
            made.input_size,
            made.output_size,
            config=alone,
            init_method=config.init_method,  # type: ignore[arg-type]
            bias=False,
            skip_weight_param_allocation=True,
        )
        self.weight = made.weight
        self.gathers = config.sequence_parallel
        self._vocabulary = vocabulary

    def forward(self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Return the numbers, and None for the bias; `weight` is a tied one."""
        if self.targets is None:
            raise RuntimeError("no targets are selected")
        weight_VD = self.weight if weight is None else weight
        if weight_VD is None:
            raise RuntimeError("the head has no weight, and none was passed")
        group = tensor_group()
        first = group.rank() * len(weight_VD)
        size = min(max(self._vocabulary - first, 0), len(weight_VD))
        log_probs_N, entropy_N = head_log_probs(
            # Each process has the gradient of its part of the vocabulary; the backward pass of this copy sums them.
            copy_to_tensor_model_parallel_region(self.pick(input_)),
            weight_VD,
            self.targets.ids_N,
            self.targets.temperature,
            part=VocabularyPart(first, size, group),
            support=self.targets.support,
            entropy=self.targets.entropy,
            entropy_gradient=self.targets.entropy_gradient,
        )
        numbers = [log_probs_N] if entropy_N is None else [log_probs_N, entropy_N]
        return torch.stack(numbers, dim=-1)[:, None], None


class ValueHead(_PositionSelector, nn.Linear):
    """One number per position, at least in fp32, since bf16 has 8 bits. Replicated on every process."""

    def __init__(self, config: TransformerConfig, *, bias: bool) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        dtype = torch.promote_types(config.params_dtype, torch.float32)
        nn.Linear.__init__(self, config.hidden_size, 1, bias=bias, device=device, dtype=dtype)
        self.gathers = config.sequence_parallel

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the numbers, (N, 1, 1), and None for the bias."""
        return super().forward(self.pick(input).to(self.weight.dtype))[:, None], None
