"""Causal attention within the segments of a packed row, without a mask over the whole row.

A packed row has the tokens of several sequences one after the other (`training.layout`). On CUDA, half precision is
computed by torch's variable-length kernels. Everything else takes `scaled_dot_product_attention` over blocks, segments of
similar length in one padded batch, or on CPUs, if long segments make it faster, parts that are merged
(`training.merged_attention`). The plan is made once per micro-batch, from lengths, on the host.

Suffixes: `_THD` tokens of the row, heads, features of a head; `_BHLD` segments of a block, heads, tokens, features.
"""

from collections.abc import Sequence
from functools import cached_property
from inspect import signature
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iiverl_core.training import merged_attention
from iiverl_core.training.host_memory import to_device
from iiverl_core.training.merged_attention import (
    CALL,
    CHUNK,
    GATHER,
    KERNEL_BLOCK,
    Parts,
    divide,
    length_class,
)
from iiverl_core.training.spans import Segment, Spans

NEVER = 2**40  # position of padding among the keys, behind every query
LARGEST_KERNEL_HEAD = 256  # features of a head in the kernels for variable lengths


class PackedAttention:
    """Attention over a packed row that consists of `segments`, in order and without gaps."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._segments, self._device = tuple(segments), device
        self._longest = max(segment.prefix_length + segment.length for segment in segments)

    def attend(
        self,
        query_THD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Attend to the tokens before each token in its segment and in the segment's prefix, and to itself.

        Args:
            query_THD: queries, of a multiple of the heads of keys and values.
            key_THD: keys.
            value_THD: values, perhaps of another number of features.
            scale: factor of the scores; by default one over the square root of the features.
            window: number of tokens that a token attends to at most, including itself (sliding window).

        Returns:
            The attended values, with the heads of `query_THD` and the features of `value_THD`.
        """
        if has_kernel(query_THD, value_THD):
            return self.kernel.attend(query_THD, key_THD, value_THD, scale=scale, window=window)
        unlimited = window is None or window >= self._longest
        if unlimited and merged_attention.can_compute(query_THD, key_THD, value_THD) and self._parts:
            return merged_attention.attend(query_THD, key_THD, value_THD, self._parts, scale)
        attended = [block.attend(query_THD, key_THD, value_THD, scale, window) for block in self._blocks]
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    @cached_property
    def kernel(self) -> "KernelAttention":
        """The same by torch's kernel, for states that it computes (`has_kernel`)."""
        return KernelAttention(self._segments, self._device)

    @property
    def compiled(self) -> "KernelAttention":
        """`kernel` for compiled code."""
        return KernelAttention(self._segments, self._device, gathers=True)

    @cached_property
    def _parts(self) -> Parts | None:
        """Parts that are computed in less time than blocks, if there are any.

        Rows of short segments gain little; they stay in blocks, so that no rounding depends on what shares a micro-batch.
        """
        if max(segment.length for segment in self._segments) <= CHUNK:
            return None
        parts = divide(self._segments)
        return parts if parts.cost < sum(block.cost for block in self._blocks) else None

    @cached_property
    def _blocks(self) -> list["_Block"]:
        return [_Block(list(run), self._device) for _, run in groupby(self._segments, key=_size_class)]


class KernelAttention:
    """`PackedAttention` by torch's kernel for variable lengths.

    Its methods depend on lengths only by tensors and integers. With `gathers`, keys and values are gathered whether a
    segment has a prefix or not, so that the same compiled code serves all rows.

    Attributes:
        bounds: the row's first token of each segment, and the row's length, int32.
        longest: tokens of the longest segment.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device, *, gathers: bool = False) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self._function = varlen_attn
        grouped = (
            "enable_gqa" in signature(varlen_attn).parameters
        )  # announced or not, depending on torch's version
        self._options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
        starts, lengths, prefix_starts, prefixes = np.array(segments).T
        self.bounds, self.longest = _ends(lengths, device), int(lengths.max())
        # The tokens that each segment attends to, prefix first, segment by segment; None if no segment has a prefix.
        self._keys: Tensor | None = None
        self._key_bounds, self._longest_keys = self.bounds, self.longest
        if gathers or prefixes.any():
            pieces = np.stack([prefix_starts, starts], 1).ravel(), np.stack([prefixes, lengths], 1).ravel()
            parts = [np.arange(start, start + length) for start, length in zip(*pieces, strict=True)]
            self._keys = to_device(np.concatenate(parts), device)
            self._key_bounds = _ends(prefixes + lengths, device)
            self._longest_keys = int((prefixes + lengths).max())

    def attend(
        self,
        query_THD: Tensor,
        key_THD: Tensor,
        value_THD: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """See `PackedAttention.attend`."""
        if self._keys is not None:
            key_THD, value_THD = (x.index_select(0, self._keys) for x in (key_THD, value_THD))
        attended: Any = self._function(
            query_THD,
            key_THD,
            value_THD,
            self.bounds,
            self._key_bounds,
            self.longest,
            self._longest_keys,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            **self._options,
        )
        return attended


def _ends(lengths: np.ndarray, device: torch.device) -> Tensor:
    return to_device(np.cumsum([0, *lengths], dtype=np.int32), device)


class _Block:
    """Consecutive segments of similar length, attended to in one call; prefixes and segments are padded on the right."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        _, _, prefix_starts, prefixes = np.array(segments).T
        self._spans = Spans([(segment.start, segment.length) for segment in segments], device)
        self._prefix, self._device = int(prefixes.max()), device
        self._keys: Tensor | None = None
        if self._prefix:  # the token of the row at each place of the padded prefixes and segments
            before = np.minimum(np.arange(self._prefix), prefixes[:, None] - 1)
            tokens = np.concatenate([prefix_starts[:, None] + before, self._spans.tokens_BL], 1)
            self._keys = to_device(tokens.ravel(), device)
        # One mask serves all segments if their prefixes have one length.
        lengths = prefixes[:1] if prefixes.min() == self._prefix else prefixes
        self._prefixes = to_device(np.ascontiguousarray(lengths), device)[:, None]
        self._masks: dict[int | None, Tensor] = {}

    @property
    def cost(self) -> int:
        """How long it takes on a CPU, in scores, without a window."""
        count, own = self._spans.count, self._spans.width
        if not self._prefix:  # without a mask, the kernel leaves out most later keys of long segments
            return CALL + count * own * min(own, own // 2 + KERNEL_BLOCK // 3)
        return CALL + count * (own + GATHER) * (self._prefix + own)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        heads = query.shape[1]
        if key.is_cuda and heads != key.shape[1]:  # the kernel for fp32 has no groups of heads
            key, value = (x.repeat_interleave(heads // key.shape[1], 1) for x in (key, value))
        query_BHLD, key_BHLD, value_BHLD = self._spans.batch(query), self._batch(key), self._batch(value)
        mask = self._mask(window)
        attended_BHLD = F.scaled_dot_product_attention(
            query_BHLD,
            key_BHLD,
            value_BHLD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=heads != key.shape[1],
        )
        return self._spans.tokens(attended_BHLD)

    def _batch(self, row_THD: Tensor) -> Tensor:
        """Give each prefix and the segment behind it a row of its own."""
        if self._keys is None:
            return self._spans.batch(row_THD)
        return row_THD.index_select(0, self._keys).unflatten(0, (self._spans.count, -1)).transpose(1, 2)

    def _mask(self, window: int | None) -> Tensor | None:
        """Return which places attend to which; None if that is plain causal attention."""
        if not self._prefix and (window is None or window >= self._spans.width):
            return None
        if window not in self._masks:
            position_BQ = self._prefixes + torch.arange(self._spans.width, device=self._device)
            before = torch.arange(self._prefix, device=self._device)
            before_BP = torch.where(before < self._prefixes, before, NEVER)
            position_BK = torch.cat([before_BP, position_BQ], 1)
            distance_BQK = position_BQ[:, :, None] - position_BK[:, None]
            visible_BQK = distance_BQK >= 0
            if window is not None:
                visible_BQK &= distance_BQK < window
            self._masks[window] = visible_BQK[:, None]
        return self._masks[window]


def _size_class(segment: Segment) -> tuple[bool, int, int]:
    prefix, own = segment.prefix_length, segment.length
    return prefix > 0, length_class(prefix), length_class(own)


def has_kernel(query: Tensor, value: Tensor) -> bool:
    """Return whether torch's kernels for variable lengths compute this: half precision on CUDA, from Ampere on."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    width = query.shape[-1]
    return (
        width == value.shape[-1]
        and width <= LARGEST_KERNEL_HEAD
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
