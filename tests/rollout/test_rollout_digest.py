"""The checksum tells tensors apart that differ in anything but the sign of a zero."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.rollout import weights as module
from iiverl_core.rollout.weights import digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]


def values(dtype: torch.dtype, n: int = 40) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 10).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(place=st.integers(0, 39))
def test_one_element_that_differs_shows(dtype, place) -> None:
    tensor, other = values(dtype), values(dtype)
    assert digest(tensor) == digest(other)
    other[place] += 1
    assert digest(tensor) != digest(other)


@given(first=st.integers(0, 39), second=st.integers(0, 39))
def test_two_elements_that_changed_places_show(first, second) -> None:
    tensor, other = values(torch.float32), values(torch.float32)
    other[[first, second]] = other[[second, first]]
    assert (digest(tensor) == digest(other)) == (first == second)


def test_length_order_and_transposition_show() -> None:
    tensor = values(torch.float32).view(5, 8)
    seen = {digest(x) for x in (tensor, tensor.t(), tensor.flip(0), tensor.flip(1), tensor[:4], tensor * 2)}
    assert len(seen) == 6


def test_memory_layout_and_the_sign_of_zero_do_not_show() -> None:
    tensor = values(torch.float32).view(5, 8)
    assert digest(tensor.t().contiguous().t()) == digest(tensor)
    assert digest(torch.zeros(3)) == digest(-torch.zeros(3))


@pytest.mark.parametrize("chunk", [1, 3, 7, 40])
def test_tensors_are_taken_in_parts(chunk, monkeypatch) -> None:
    expected = digest(values(torch.bfloat16))
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert digest(values(torch.bfloat16)) == expected


def test_nothing_has_a_digest() -> None:
    assert digest(torch.empty(0)) == 0
