"""Attention over a packed row against softmax over all pairs of tokens with a mask, written out, in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from iiverl_core.training.attention import PackedAttention, Segment
from iiverl_core.training.merged_attention import CHUNK

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


@pytest.mark.parametrize("features", [4, 8], ids=["masked", "in parts"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@given(lengths=LENGTHS, prefixes=PREFIXES, window=st.none() | st.integers(1, 30), seed=st.integers(0, 99))
def test_tokens_attend_to_the_prefix_and_within_their_segment(
    heads: int,
    groups: int,
    features: int,
    lengths: list[int],
    prefixes: list[int],
    window: int | None,
    seed: int,
) -> None:
    segments = row(lengths, prefixes)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, 8), (groups, 8), (groups, features))
    rows = [
        torch.randn(sum(lengths), *shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in shapes
    ]
    attention = PackedAttention(segments, CPU)
    found = attention.attend(*rows, scale=0.3, window=window)
    expected = by_hand(*rows, visible(segments, window), 0.3)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    for gradient, by_autograd in zip(
        torch.autograd.grad(found, rows, weights), torch.autograd.grad(expected, rows, weights), strict=True
    ):
        torch.testing.assert_close(gradient, by_autograd)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_long_segments_are_computed_in_chunks(dtype: torch.dtype) -> None:
    """Chunks of 256 tokens; ragged, of one token, and just full, behind prefixes of several lengths and without one."""
    segments = row([300, 513, 257, 1, 512, 40, 700, 256], [0, 0, 0, 0, 0, 5, 5, 5])
    assert max(segment.length for segment in segments) > 2 * CHUNK
    generator = torch.Generator().manual_seed(0)
    total = sum(segment.length for segment in segments)
    rows = [torch.randn(total, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]
    weights = torch.randn(total, 4, 16, generator=generator).to(dtype)
    exact = [x.double().requires_grad_() for x in rows]
    expected = by_hand(*exact, visible(segments, None), 0.25)
    rows = [x.requires_grad_() for x in rows]
    found = PackedAttention(segments, CPU).attend(*rows)
    close = {"rtol": 0.02, "atol": 0.02} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(found.double(), expected, **close)
    gradients = torch.autograd.grad(found, rows, weights)
    for gradient, by_autograd in zip(
        gradients, torch.autograd.grad(expected, exact, weights.double()), strict=True
    ):
        torch.testing.assert_close(gradient.double(), by_autograd, **close)


def test_bounds_are_those_of_the_kernels_for_variable_lengths() -> None:
    attention = PackedAttention(row([3, 1, 5]), CPU)
    assert attention.kernel.bounds.tolist() == [0, 3, 4, 9] and attention.kernel.bounds.dtype == torch.int32
    assert attention.kernel.longest == 5
