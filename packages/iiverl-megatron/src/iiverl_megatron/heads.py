"""The last layer: logits, or one number, at the positions that are asked for and at no others.

Each takes the place of megatron-core's output layer and is told beforehand which positions count. Under sequence
parallelism the hidden states are gathered first, since the positions that count lie on any of the processes.

Suffixes: `_SBD` positions, rows, features; `_N` positions that are asked for.
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
    """Rows and columns of the positions that are asked for, both (N,)."""

    rows_N: Tensor
    columns_N: Tensor


class _Picking:
    """Takes the positions that are asked for out of the last hidden states."""

    gathers: bool
    positions: Positions | None = None

    @contextmanager
    def at(self, positions: Positions) -> Iterator[None]:
        """Ask for these positions in the forward pass within."""
        self.positions = positions
        try:
            yield
        finally:
            self.positions = None

    def pick(self, hidden_SBD: Tensor) -> Tensor:
        """Take the hidden states at the positions, (N, 1, D)."""
        if self.positions is None:
            raise RuntimeError("no positions are asked for")
        if self.gathers:
            # What follows gives every process the whole gradient, of which each keeps the part of its positions.
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
        return hidden_SBD[self.positions.columns_N, self.positions.rows_N][:, None]


class PolicyHead(_Picking, ColumnParallelLinear):
    """Logits over this process's part of the vocabulary, (N, 1, V / tensor-parallel size)."""

    def __init__(self, config: TransformerConfig, made: ColumnParallelLinear) -> None:
        """Take over the size and the weight of the layer that megatron-core made; a tied one has none of its own."""
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
        """Give the logits, and None: there is no bias."""
        return super().forward(self.pick(input_), *args, **kwargs)


class ValueHead(_Picking, nn.Linear):
    """One number a position, in fp32 at least: in bf16 it would be rounded to 8 bits. Whole on every process."""

    def __init__(self, config: TransformerConfig, *, bias: bool) -> None:
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        dtype = torch.promote_types(config.params_dtype, torch.float32)
        nn.Linear.__init__(self, config.hidden_size, 1, bias=bias, device=device, dtype=dtype)
        self.gathers = config.sequence_parallel

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Give the numbers, (N, 1, 1), and None, as an output layer of megatron-core does."""
        return super().forward(self.pick(input).to(self.weight.dtype)), None
