"""Sampling: the distribution is the one asked for, draws follow it, and log-probs are those of it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from iiverl_core.rollout import SamplingParams
from iiverl_core.rollout.sampling import draw, greedy, sample, warp_logits

INF = float("inf")
BELOW_ONE = float(np.nextafter(1.0, 0.0))


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(rows: int, tokens: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed)) * scale


@st.composite
def cases(draw_value):
    """Logits of one to three rows, some of them minus infinity, and sampling parameters."""
    rows, tokens = draw_value(st.integers(1, 3)), draw_value(st.integers(1, 600))
    logits = normal(
        rows, tokens, seed=draw_value(st.integers(0, 2**31)), scale=draw_value(st.floats(0.01, 20))
    )
    if draw_value(st.booleans()):
        logits = logits.round()  # equal logits
    banned = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(1)) < draw_value(
        st.floats(0, 0.9)
    )
    banned[torch.arange(rows), logits.argmax(-1)] = False
    return logits.masked_fill(banned, -INF), SamplingParams(
        temperature=draw_value(st.floats(1e-6, 10)),
        top_k=draw_value(st.one_of(st.just(-1), st.integers(1, 700))),
        top_p=draw_value(st.one_of(st.just(1.0), st.floats(1e-6, 1))),
    )


@given(cases(), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_possible_and_has_its_log_prob(case: tuple[torch.Tensor, SamplingParams], u: float) -> None:
    logits, params = case
    tokens, log_probs = sample(logits, torch.full((len(logits),), u, dtype=torch.float64), params)
    distribution = (
        warp_logits(logits, params.temperature, params.top_k, params.top_p).double().log_softmax(-1)
    )
    torch.testing.assert_close(distribution.exp().sum(-1), torch.ones(len(logits), dtype=torch.float64))
    expected = distribution.gather(-1, tokens[:, None])[:, 0]
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(log_probs, expected.float(), rtol=1e-5, atol=1e-5)


@given(cases())
def test_what_stays_is_the_likeliest(case: tuple[torch.Tensor, SamplingParams]) -> None:
    logits, params = case
    kept = warp_logits(logits, params.temperature, params.top_k, params.top_p) > -INF
    for row, keep in zip(logits, kept, strict=True):
        assert keep.any()
        if not keep.all():
            assert row[keep].min() >= row[~keep].max()


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_k=40, top_p=0.9)])
def test_evenly_spread_numbers_draw_each_token_as_often_as_it_is_probable(params: SamplingParams) -> None:
    count, logits = 20_000, normal(1, 300)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _ = sample(logits.expand(count, -1), u, params)
    probs = warp_logits(logits, params.temperature, params.top_k, params.top_p).double().softmax(-1)[0]
    # The numbers that draw a token are an interval as long as its probability.
    assert (tokens.bincount(minlength=300) - count * probs).abs().max() <= 1


def test_random_numbers_draw_the_distribution() -> None:
    count, logits = 50_000, normal(1, 300, scale=1.5)
    u = torch.from_numpy(np.random.default_rng(0).random(count))
    tokens, _ = draw(logits.expand(count, -1), u)
    expected = count * logits.double().softmax(-1)[0]
    enough = expected >= 5
    chi_square = ((tokens.bincount(minlength=300) - expected) ** 2 / expected)[enough].sum()
    freedom = float(enough.sum() - 1)
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_rare_tokens_of_a_large_vocabulary_are_drawn_where_they_lie() -> None:
    """Each rare token has a tenth of the probability at which fp32 sums near 1 stand still."""
    size = 150_000
    logits = torch.full((1, size), -12.0)
    logits[0, 0] = 6.0
    probs = logits.double().softmax(-1)[0]
    assert probs[1] < 2**-24
    wanted = torch.linspace(1, size - 1, 40).long()
    middles = probs.cumsum(0)[wanted] - probs[wanted] / 2
    tokens, log_probs = draw(logits.expand(40, -1), middles)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(log_probs, probs[wanted].log().float())


@pytest.mark.parametrize("size", [5, 256, 257, 1000])
def test_numbers_at_the_edges_draw_the_outermost_possible_tokens(size: int) -> None:
    logits = torch.full((2, size), -INF)
    logits[:, 2:-1] = normal(1, size)[:, 2:-1]
    tokens, log_probs = draw(logits, numbers(0.0, BELOW_ONE))
    assert tokens.tolist() == [2, size - 2]
    assert torch.isfinite(log_probs).all()


def test_a_lone_token_is_drawn_whatever_the_number() -> None:
    logits = torch.full((4, 700), -INF)
    logits[:, 600] = -40.0
    tokens, log_probs = draw(logits, numbers(0.0, 1e-300, 0.5, BELOW_ONE))
    assert tokens.tolist() == [600] * 4
    assert log_probs.tolist() == [0.0] * 4


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = normal(50, 400)
    u = torch.linspace(0, BELOW_ONE, 50, dtype=torch.float64)
    for temperature in (1e-4, 1e-30):
        tokens, log_probs = sample(logits, u, SamplingParams(temperature=temperature))
        assert torch.equal(tokens, logits.argmax(-1))
        assert log_probs.abs().max() < 1e-6
    tokens, log_probs = sample(logits, None, SamplingParams(temperature=0))
    assert torch.equal(tokens, logits.argmax(-1))
    assert (log_probs == 0).all()


def test_sampling_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="a number for each row"):
        sample(normal(1, 4), None, SamplingParams())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.3, -1, 0.8), (0.6, 30, 1.0), (0.9, 50, 0.95)])
def test_masks_equal_those_of_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    logits, ids = normal(8, 500, seed), torch.zeros(8, 1, dtype=torch.long)
    theirs = TemperatureLogitsWarper(temperature)(ids, logits)
    theirs = TopKLogitsWarper(top_k)(ids, theirs) if top_k > 0 else theirs
    theirs = TopPLogitsWarper(top_p)(ids, theirs) if top_p < 1 else theirs
    ours = warp_logits(logits, temperature, top_k, top_p)
    assert torch.equal(ours == -INF, theirs == -INF)
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1))


def test_equals_of_the_kth_stay() -> None:
    kept = warp_logits(torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]), 1.0, top_k=2) > -INF
    assert kept.tolist() == [[False, True, True, True, False]]


def test_top_p_is_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log()
    for top_p, kept in [
        (1e-9, [2]),
        (0.39, [2]),
        (0.41, [2, 3]),
        (0.69, [2, 3]),
        (0.71, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
    ]:
        assert (warp_logits(logits, 1.0, top_p=top_p)[0] > -INF).nonzero().flatten().tolist() == kept
    assert (warp_logits(torch.zeros(1, 4), 1.0, top_p=0.5)[0] > -INF).tolist() == [True, True, False, False]


@pytest.mark.parametrize("broken", [float("nan"), INF])
def test_logits_that_are_not_finite_have_no_log_prob(broken: float) -> None:
    logits = normal(2, 300)
    logits[1, 7] = broken
    for _, log_probs in (
        greedy(logits),
        draw(logits, numbers(0.3, 0.3)),
        sample(logits, numbers(0.3, 0.3), SamplingParams(top_k=5, top_p=0.9)),
    ):
        assert torch.isfinite(log_probs).tolist() == [True, False]


def test_a_row_does_not_depend_on_the_others() -> None:
    logits, u = normal(30, 1000), torch.from_numpy(np.random.default_rng(0).random(30))
    params = SamplingParams(temperature=0.8, top_k=100, top_p=0.95)
    tokens, log_probs = sample(logits, u, params)
    for row in range(30):
        alone = sample(logits[row : row + 1], u[row : row + 1], params)
        assert alone[0].item() == tokens[row]
        torch.testing.assert_close(alone[1][0], log_probs[row])


def test_half_precision_logits_are_sampled_in_fp32() -> None:
    logits = normal(4, 50).bfloat16()
    u = numbers(0.1, 0.4, 0.6, 0.9)
    for ours, exact in zip(
        draw(warp_logits(logits, 0.7), u), draw(warp_logits(logits.float(), 0.7), u), strict=True
    ):
        assert torch.equal(ours, exact)
