"""Output layers that compute logits, or one number, at selected positions only.

They replace megatron-core's output layer; `at` selects the positions before the forward pass. Under sequence
parallelism the hidden states are gathered first, since selected positions may lie on any process.

Suffixes: `_SBD` positions, rows, features; `_N` selected positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


@dataclass(frozen=True)
class Positions:
    """Rows and columns of the selected positions, both (N,)."""

    rows_N: Tensor
    columns_N: Tensor


class _PositionSelector:
    """Selects positions of the last hidden states."""

    gathers: bool
    positions: Positions | None = None

    @contextmanager
    def at(self, positions: Positions) -> Iterator[None]:
        """Select these positions in forward passes within the context."""
        self.positions = positions
        try:
            yield
        finally:
            self.positions = None

    def pick(self, hidden_SBD: Tensor) -> Tensor:
        """Return the hidden states at the positions, (N, 1, D)."""
        if self.positions is None:
            raise RuntimeError("no positions are selected")
        if self.gathers:
            # The backward pass gives every process the whole gradient; each keeps the part of its positions.
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
        return hidden_SBD[self.positions.columns_N, self.positions.rows_N][:, None]


class PolicyHead(_PositionSelector, ColumnParallelLinear):
    """Logits over this process's part of the vocabulary, (N, 1, V / tensor-parallel size)."""

    def __init__(self, config: TransformerConfig, made: ColumnParallelLinear) -> None:
        """Take the sizes and the weight of megatron-core's layer `made`; a tied one has no weight of its own."""
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

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the logits, and None for the bias."""
        return super().forward(self.pick(input_), *args, **kwargs)


class ValueHead(_PositionSelector, nn.Linear):
    """One number per position, at least in fp32, since bf16 has 8 bits. Replicated on every process."""

    def __init__(self, config: TransformerConfig, *, bias: bool) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        dtype = torch.promote_types(config.params_dtype, torch.float32)
        nn.Linear.__init__(self, config.hidden_size, 1, bias=bias, device=device, dtype=dtype)
        self.gathers = config.sequence_parallel

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the numbers, (N, 1, 1), and None for the bias."""
        return super().forward(self.pick(input).to(self.weight.dtype)), None
