"""Attention over a packed row against softmax over all pairs of tokens with a mask, written out, in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iiverl_core.training.attention import PackedAttention
from iiverl_core.training.merged_attention import attend, divide
from iiverl_core.training.spans import Segment

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)
PREFIXES = st.lists(st.integers(0, 8), min_size=8, max_size=8)


def row(lengths: list[int], prefixes: list[int] | None = None) -> list[Segment]:
    """Segments of these lengths; `prefixes` has for each the number of an earlier one that it continues, if it is less."""
    segments: list[Segment] = []
    for i, length in enumerate(lengths):
        start = sum(lengths[:i])
        prefix = prefixes[i] if prefixes else i
        if prefix < i and not segments[prefix].prefix_length:
            segments.append(Segment(start, length, segments[prefix].start, segments[prefix].length))
        else:
            segments.append(Segment(start, length))
    return segments


def visible(segments: list[Segment], window: int | None) -> Tensor:
    """Which token of a row attends to which, (T, T)."""
    total = sum(segment.length for segment in segments)
    mask = torch.zeros(total, total, dtype=torch.bool)
    for segment in segments:
        before = list(range(segment.prefix_start, segment.prefix_start + segment.prefix_length))
        own = list(range(segment.start, segment.start + segment.length))
        for i, token in enumerate(own):
            seen = before + own[: i + 1]
            mask[token, seen[-window:] if window else seen] = True
    return mask


def by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~mask, float("-inf")).softmax(-1), value)


def states(
    lengths: list[int], heads: int, groups: int, features: int, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values of a row, and weights of the outputs."""
    generator, total = torch.Generator().manual_seed(seed), sum(lengths)
    shapes = ((heads, 8), (groups, 8), (groups, features), (heads, features))
    *rows, weights = (
        torch.randn(total, *shape, dtype=torch.float64, generator=generator) for shape in shapes
    )
    return [row.requires_grad_() for row in rows], weights


def assert_equal(found: Tensor, expected: Tensor, rows: list[Tensor], weights: Tensor) -> None:
    """Compare outputs, and the gradients of all states."""
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, rows, weights), torch.autograd.grad(expected, rows, weights)
    )


HEADS = pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])


@HEADS
@given(lengths=LENGTHS, prefixes=PREFIXES, window=st.none() | st.integers(1, 30), seed=st.integers(0, 99))
def test_tokens_attend_to_the_prefix_and_within_their_segment(
    heads: int, groups: int, lengths: list[int], prefixes: list[int], window: int | None, seed: int
) -> None:
    segments = row(lengths, prefixes)
    rows, weights = states(lengths, heads, groups, 4, seed)
    found = PackedAttention(segments, CPU).attend(*rows, scale=0.3, window=window)
    assert_equal(found, by_hand(*rows, visible(segments, window), 0.3), rows, weights)


@HEADS
@given(lengths=LENGTHS, prefixes=PREFIXES, chunk=st.integers(1, 45), seed=st.integers(0, 99))
def test_merged_parts_are_the_whole(
    heads: int, groups: int, lengths: list[int], prefixes: list[int], chunk: int, seed: int
) -> None:
    segments = row(lengths, prefixes)
    rows, weights = states(lengths, heads, groups, 8, seed)
    found = attend(*rows, divide(segments, chunk), 0.3)
    assert_equal(found, by_hand(*rows, visible(segments, None), 0.3), rows, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_long_segments_are_computed_in_chunks(dtype: torch.dtype) -> None:
    """Ragged ones, of one token, and just full, behind prefixes of several lengths and without one."""
    segments = row([300, 513, 257, 1, 512, 40, 700, 256], [0, 0, 0, 0, 0, 5, 5, 5])
    generator = torch.Generator().manual_seed(0)
    total = sum(segment.length for segment in segments)
    rows = [torch.randn(total, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]
    weights = torch.randn(total, 4, 16, generator=generator).to(dtype)
    exact = [x.double().requires_grad_() for x in rows]
    expected = by_hand(*exact, visible(segments, None), 0.25)
    rows = [x.requires_grad_() for x in rows]
    attention = PackedAttention(segments, CPU)
    found = attention.attend(*rows)
    assert type(found.grad_fn).__name__ == "_MergedBackward"
    close = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(found.double(), expected, **close)
    gradients = torch.autograd.grad(found, rows, weights)
    for gradient, by_autograd in zip(
        gradients, torch.autograd.grad(expected, exact, weights.double()), strict=True
    ):
        torch.testing.assert_close(gradient.double(), by_autograd, **close)


def test_what_the_kernel_would_read_out_of_bounds_is_not_given_to_it() -> None:
    segments = row([512, 512, 512], [0, 0, 0])
    attention = PackedAttention(segments, CPU)
    right, fewer_values, no_multiple = (
        [torch.randn(1536, count, 16, requires_grad=True) for count in heads]
        for heads in ((4, 2, 2), (4, 2, 1), (5, 2, 2))
    )
    assert type(attention.attend(*right).grad_fn).__name__ == "_MergedBackward"
    expected = by_hand(*fewer_values, visible(segments, None), 0.25)
    torch.testing.assert_close(attention.attend(*fewer_values), expected)
    with pytest.raises(RuntimeError, match="number of heads"):
        attention.attend(*no_multiple)


def test_features_may_lie_apart() -> None:
    segments = row([300, 300, 300], [0, 0, 0])
    rows = [torch.randn(900, 4, 16) for _ in range(3)]
    apart = [x.mT.contiguous().mT for x in rows]
    assert apart[0].stride(-1) != 1
    parts = divide(segments)
    torch.testing.assert_close(attend(*apart, parts, None), attend(*rows, parts, None), rtol=0, atol=0)


def test_what_would_be_many_small_parts_is_computed_in_blocks() -> None:
    lengths, prefixes = [20] * 8, [99] * 8  # prompts, then their responses by length, as layouts have them
    for length in range(4, 16):
        lengths += [length] * 8
        prefixes += range(8)
    for segments in (row(lengths, prefixes), row([300] * 16)):
        total = sum(segment.length for segment in segments)
        rows = [torch.randn(total, 2, 8, requires_grad=True) for _ in range(3)]
        attended = PackedAttention(segments, CPU).attend(*rows)
        assert type(attended.grad_fn).__name__ != "_MergedBackward"


def test_bounds_are_those_of_the_kernels_for_variable_lengths() -> None:
    attention = PackedAttention(row([3, 1, 5]), CPU)
    assert attention.kernel.bounds.tolist() == [0, 3, 4, 9] and attention.kernel.bounds.dtype == torch.int32
    assert attention.kernel.longest == 5
