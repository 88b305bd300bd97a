"""Any cut into micro-batches, segments, and bad names."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.algorithms import (
    Segments,
    kl_divergence,
)
from iiverl_core.controller.state import AdaptiveKL, FixedKL
from iiverl_core.errors import ConfigError
from iiverl_core.registry import AGGREGATIONS
from iiverl_core.training.aggregation import token_weights


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.sampled_from(list(AGGREGATIONS)), st.data())
def test_a_batch_s_loss_is_the_sum_of_its_parts(lengths: list[int], mode: str, data) -> None:
    """Weights come from the whole batch, so any cut into micro-batches adds up to the same loss."""
    weights_T = Segments.of(lengths).expand(
        torch.tensor(token_weights(mode, lengths, max_tokens_norm=30)).double()
    )
    losses_T = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(len(lengths))).double()
    cut = sum(lengths[: data.draw(st.integers(0, len(lengths)))])
    parts = (weights_T[:cut] @ losses_T[:cut]) + (weights_T[cut:] @ losses_T[cut:])
    torch.testing.assert_close(parts, weights_T @ losses_T)
    if mode not in ("token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        assert weights_T.sum().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_row_that_is_all_padding_is_refused_and_left_out(mode: str) -> None:
    """A batch with such a row weighs as much as one without it, since it can only be left out."""
    mask_BL = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    lengths = mask_BL.sum(1).tolist()
    with pytest.raises(ValueError, match="without tokens"):
        Segments.of(lengths)
    with pytest.raises(ValueError, match="without tokens"):
        token_weights(mode, lengths, max_tokens_norm=3)
    kept = [length for length in lengths if length]
    losses_BL = torch.tensor([[1.0, 2.0, math.nan], [math.nan] * 3, [4.0, math.inf, math.nan]])
    weights_T = Segments.of(kept).expand(torch.tensor(token_weights(mode, kept, max_tokens_norm=3)))
    expected = {
        "token-mean": 7 / 3,
        "token-sum": 7.0,
        "seq-mean-token-sum": 7 / 2,
        "seq-mean-token-mean": (1.5 + 4) / 2,
        "seq-mean-token-sum-norm": 7 / 6,
    }
    assert (weights_T @ losses_BL[mask_BL]).item() == pytest.approx(expected[mode])


def test_unknown_names_are_told() -> None:
    with pytest.raises(ConfigError, match="token-mean"):
        token_weights("mean", [1], 1)
    with pytest.raises(ConfigError, match="low_var_kl"):
        kl_divergence("k4", torch.zeros(1), torch.zeros(1))


def test_segments() -> None:
    segments = Segments.of([2, 1, 3])
    x_T = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert segments.sum(x_T).tolist() == [3, 3, 15]
    assert segments.mean(x_T).tolist() == [1.5, 3, 5]
    assert segments.at_last(torch.tensor([7.0, 8.0, 9.0])).tolist() == [0, 7, 8, 0, 0, 9]
    assert [part.tolist() for part in segments.split(x_T)] == [[1, 2], [3], [4, 5, 6]]
    assert segments.expand(torch.tensor([0, 1, 2])).tolist() == [0, 0, 1, 2, 2, 2]


def test_the_adaptive_coefficient_follows_the_kl() -> None:
    controller = AdaptiveKL(coef=0.1, target=0.01, horizon=1000)
    controller.update(kl=1.0, sequences=100)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    controller.update(kl=0.0, sequences=100)
    assert controller.coef == pytest.approx(0.1 * 1.02 * 0.98)
    fixed = FixedKL(0.1)
    fixed.update(kl=5.0, sequences=100)
    assert fixed.coef == 0.1
