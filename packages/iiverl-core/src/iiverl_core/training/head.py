"""Log-probs and entropy of tokens from hidden states and the weight of the head, without the logits of all tokens.

The logits of a micro-batch would be its largest array by far: 16 k tokens of a vocabulary of 152 k are 5 GB in bf16, and the
softmax and its gradient need several more of that size in fp32. They are computed for a tile of tokens × vocabulary
entries at a time instead. The forward pass keeps three numbers per token, after Milakov and Gimelshein 2018, "Online
normalizer calculation for softmax"; the backward pass computes each tile again, since the gradient of a log-prob is only
known then. This costs a third more multiplications in the head.

Suffixes: `_T` tokens, `_D` features of hidden states, `_V` the vocabulary or this process's part of it, `_RC` the rows and
columns of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from iiverl_core.memory.head import tile_size
from iiverl_core.training.support import LOWEST, Support


@dataclass(frozen=True)
class LogitTransform:
    """What a model does with the head's output x: logits are  softcap · tanh(scale · x / softcap),  or  scale · x."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Transform a tensor in place, and return it."""
        if self.scale != 1.0:
            x.mul_(self.scale)
        if self.softcap is not None:
            x.div_(self.softcap).tanh_().mul_(self.softcap)
        return x


IDENTITY = LogitTransform()


@dataclass(frozen=True)
class VocabularyPart:
    """The entries `first` … `first + size - 1`, which this process's rows of the head compute; others of `group` have the rest.

    Rows past `size` are padding. Results are the same on all processes of the group; the gradient of hidden states is
    this part's, and has to be summed over the group.
    """

    first: int
    size: int
    group: dist.ProcessGroup


def head_log_probs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    temperature: float,
    *,
    bias_V: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    part: VocabularyPart | None = None,
    support: Support | None = None,
    entropy: bool,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute the log-prob of each target under the softmax of logits / temperature, and that softmax's entropy.

    Logits are the transformed output of a linear layer for the hidden states that predict the targets. The entropy is
    computed only if requested; without `entropy_gradient` it has no gradient. Both are (T,), in nats, in fp32 or the dtype
    of the hidden states if that is more precise. Matrix products are in the dtype of the hidden states, sums over tiles at
    least in fp32. With a `support`, both are of the softmax over the tokens of the support alone, and the others have no
    gradient.
    """
    log_probs_T, entropy_T = _HeadLogProbs.apply(
        hidden_TD,
        weight_VD,
        bias_V,
        targets_T,
        temperature,
        transform,
        part,
        support,
        entropy,
        entropy_gradient,
    )
    return log_probs_T, entropy_T if entropy else None


class _Tiles:
    """The logits of a head, divided by the temperature, a tile at a time."""

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        transform: LogitTransform,
        part: VocabularyPart | None,
        support: Support | None,
    ) -> None:
        self._hidden_TD, self._weight_VD, self._bias_V = hidden_TD, weight_VD, bias_V
        self._temperature, self._transform = temperature, transform
        self._targets_T = targets_T - part.first if part else targets_T
        self._support, self._first = support, part.first if part else 0
        self._size = part.size if part else len(weight_VD)
        self._height, self._width = tile_size(len(hidden_TD), self._size, cpu=hidden_TD.device.type == "cpu")
        self.dtype = torch.promote_types(hidden_TD.dtype, torch.float32)

    @property
    def columns(self) -> Iterator[slice]:
        """The vocabulary entries of each tile in turn."""
        for first in range(0, self._size, self._width):
            yield slice(first, min(first + self._width, self._size))

    @property
    def rows(self) -> Iterator[slice]:
        """The tokens of each tile in turn."""
        for first in range(0, len(self._hidden_TD), self._height):
            yield slice(first, first + self._height)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """Compute the logits of a tile, divided by the temperature, in a new tensor."""
        bias_C = self._bias_V[columns] if self._bias_V is not None else None
        head_RC = F.linear(self._hidden_TD[rows], self._weight_VD[columns], bias_C)
        return self._transform(head_RC.to(self.dtype)).div_(self._temperature)

    def restrict(self, logits_RC: Tensor, rows: slice, columns: slice) -> Tensor:
        """Lower the logits of a tile that are left out, in place, to where they have no probability."""
        if self._support is None:
            return logits_RC
        first, width = self._first + columns.start, columns.stop - columns.start
        return logits_RC.masked_fill_(self._support.excluded(rows, first, width), LOWEST)

    def targets(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the column of each row's target, (R, 1), and whether it is in the tile, (R, 1)."""
        columns_R1 = (self._targets_T[rows] - columns.start)[:, None]
        inside_R1 = (columns_R1 >= 0) & (columns_R1 < columns.stop - columns.start)
        return columns_R1.where(inside_R1, 0), inside_R1

    def slope(self, logits_RC: Tensor) -> Tensor | float:
        """Compute the derivative of `logits` with respect to the head's output."""
        slope = self._transform.scale / self._temperature
        if self._transform.softcap is None:
            return slope
        # d c tanh(s x / c) / d x = s (1 - tanh(s x / c)^2)
        tanh_RC = logits_RC * (self._temperature / self._transform.softcap)
        return tanh_RC.square_().neg_().add_(1).mul_(slope)


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        transform: LogitTransform,
        part: VocabularyPart | None,
        support: Support | None,
        entropy: bool,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        tiles = _Tiles(hidden_TD, weight_VD, bias_V, targets_T, temperature, transform, part, support)
        # Of the tiles so far: the largest logit m, the target's logit, Σ exp(z - m), and Σ exp(z - m) (z - m).
        largest_T = hidden_TD.new_full(targets_T.shape, LOWEST, dtype=tiles.dtype)
        target_T, total_T, product_T = sums = hidden_TD.new_zeros((3, *targets_T.shape), dtype=tiles.dtype)
        for columns in tiles.columns:
            for rows in tiles.rows:
                logits_RC = tiles.restrict(tiles.logits(rows, columns), rows, columns)
                columns_R1, inside_R1 = tiles.targets(rows, columns)
                target_T[rows] += logits_RC.gather(-1, columns_R1).where(inside_R1, 0).squeeze(-1)
                larger_R = torch.maximum(largest_T[rows], logits_RC.amax(-1))
                _raise_maximum(larger_R, largest_T[rows], total_T[rows], product_T[rows])
                logits_RC -= larger_R[:, None]
                exp_RC = logits_RC.exp() if entropy else logits_RC.exp_()
                total_T[rows] += exp_RC.sum(-1)
                if entropy:
                    product_T[rows] += exp_RC.mul_(logits_RC).sum(-1)
                del logits_RC, exp_RC  # before the next tile is made
        if part is not None:
            larger_T = largest_T.clone()
            dist.all_reduce(larger_T, op=dist.ReduceOp.MAX, group=part.group)
            _raise_maximum(larger_T, largest_T, total_T, product_T)
            dist.all_reduce(sums, group=part.group)
        log_total_T = total_T.log() + largest_T
        # H = log Σ exp(z) - Σ p z, with m subtracted from both
        entropy_T = total_T.log() - product_T / total_T
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, log_total_T, entropy_T.clone())
        ctx.options = (temperature, transform, part, support)
        ctx.entropy = entropy and entropy_gradient
        if not ctx.entropy:
            ctx.mark_non_differentiable(entropy_T)
        return target_T - log_total_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_log_probs_T, grad_entropy_T = grad_outputs
        hidden_TD, weight_VD, bias_V, targets_T, log_total_T, entropy_T = ctx.saved_tensors
        tiles = _Tiles(hidden_TD, weight_VD, bias_V, targets_T, *ctx.options)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=tiles.dtype) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=tiles.dtype) if wants_bias else None
        for columns in tiles.columns:
            weight_CD = weight_VD[columns]
            grad_weight_CD = torch.zeros_like(weight_CD, dtype=tiles.dtype) if wants_weight else None
            for rows in tiles.rows:
                logits_RC = tiles.logits(rows, columns)
                slope = tiles.slope(logits_RC)
                tiles.restrict(logits_RC, rows, columns)
                # d log p(y) / d z_v = 1[v = y] - p_v,  d H / d z_v = -p_v (log p_v + H)
                factor = grad_log_probs_T[rows, None]
                if ctx.entropy:
                    factor = logits_RC - (log_total_T - entropy_T)[rows, None]
                    factor.mul_(grad_entropy_T[rows, None]).add_(grad_log_probs_T[rows, None])
                gradient_RC = logits_RC.sub_(log_total_T[rows, None]).exp_().mul_(factor).neg_()
                del logits_RC, factor
                columns_R1, inside_R1 = tiles.targets(rows, columns)
                gradient_RC.scatter_add_(-1, columns_R1, grad_log_probs_T[rows, None] * inside_R1)
                gradient_RC = gradient_RC.mul_(slope).to(hidden_TD.dtype)
                del slope
                if grad_hidden_TD is not None:
                    _add_product(grad_hidden_TD[rows], gradient_RC, weight_CD)
                if grad_weight_CD is not None:
                    _add_product(grad_weight_CD, gradient_RC.T, hidden_TD[rows])
                if grad_bias_V is not None:
                    grad_bias_V[columns] += gradient_RC.sum(0)
                del gradient_RC
            if grad_weight_VD is not None and grad_weight_CD is not None:
                grad_weight_VD[columns] = grad_weight_CD
        return (
            grad_hidden_TD.to(hidden_TD.dtype) if grad_hidden_TD is not None else None,
            grad_weight_VD,
            grad_bias_V.to(bias_V.dtype) if grad_bias_V is not None else None,
            *[None] * 7,
        )


def _raise_maximum(larger_R: Tensor, largest_R: Tensor, total_R: Tensor, product_R: Tensor) -> None:
    """Express sums of exponentials relative to a larger maximum, in place."""
    shift_R = largest_R - larger_R
    product_R.add_(shift_R * total_R).mul_(shift_R.exp())
    total_R.mul_(shift_R.exp())
    largest_R.copy_(larger_R)


def _add_product(sum_AB: Tensor, left_AN: Tensor, right_NB: Tensor) -> None:
    """Add a matrix product to a sum that may be more precise."""
    if sum_AB.dtype == left_AN.dtype:
        sum_AB.addmm_(left_AN, right_NB)
    else:
        sum_AB += left_AN @ right_NB
