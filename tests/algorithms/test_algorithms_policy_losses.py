"""Every policy loss: the same gradient for any division and order, on policy, far off policy, of single tokens."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from iiverl_core.algorithms import PolicyBatch, PolicyLossSettings, Segments, find_policy_loss
from iiverl_core.algorithms.policy_losses.covariance import covariance, positions
from iiverl_core.registry import POLICY_LOSSES
from iiverl_core.training.aggregation import token_weights

OPTIONS = PolicyLossSettings(clip_cov_ratio=0.2, clip_cov_lb=0.01, kl_cov_ratio=0.2)
EVERY = pytest.mark.parametrize("name", POLICY_LOSSES)
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=6)


def batch_of(lengths: list[int], seed: int, *, steps: float = 0.0, by_token: bool = False) -> PolicyBatch:
    """Some responses whose policy has moved; `steps` rounds log-probs and advantages, which makes many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    segments, tokens = Segments.of(lengths), sum(lengths)
    old_T = -torch.rand(tokens, generator=generator, dtype=torch.float64) * 3
    log_probs_T = (old_T + torch.randn(tokens, generator=generator, dtype=torch.float64) * 0.4).clamp(max=0)
    advantages_B = torch.randn(tokens if by_token else len(lengths), generator=generator, dtype=torch.float64)
    if steps:
        old_T, log_probs_T, advantages_B = (
            (x / steps).round() * steps for x in (old_T, log_probs_T, advantages_B)
        )
    return PolicyBatch(
        log_probs_T, old_T, advantages_B if by_token else segments.expand(advantages_B), segments
    )


def chosen(name: str, batch: PolicyBatch, options: PolicyLossSettings = OPTIONS) -> PolicyBatch:
    """The mini-batch with the tokens chosen that the loss chooses."""
    choose = find_policy_loss(name).select_tokens
    return batch if choose is None else replace(batch, token_mask_T=choose(batch, options))


def part(batch: PolicyBatch, sequences: list[int]) -> tuple[PolicyBatch, Tensor]:
    """Some of a batch's sequences, in this order, and where their tokens stand in the batch."""
    tokens = torch.arange(len(batch.log_probs_T)).split(batch.segments.lengths_B.tolist())
    index = torch.cat([tokens[sequence] for sequence in sequences])
    taken = PolicyBatch(
        batch.log_probs_T[index],
        batch.old_log_probs_T[index],
        batch.advantages_T[index],
        Segments(batch.segments.lengths_B[sequences]),
        None if batch.token_mask_T is None else batch.token_mask_T[index],
    )
    return taken, index


def weights(name: str, batch: PolicyBatch) -> Tensor:
    """The weight of each token in the loss of the mini-batch, (T,)."""
    lengths = batch.segments.lengths_B.tolist()
    mode = find_policy_loss(name).loss_agg_mode or "token-mean"
    return batch.segments.expand(torch.tensor(token_weights(mode, lengths, 6), dtype=torch.float64))


def gradient(
    name: str, batch: PolicyBatch, weights_T: Tensor, options: PolicyLossSettings = OPTIONS
) -> Tensor:
    """The gradient of the weighted loss with respect to each log-prob, (T,)."""
    x_T = batch.log_probs_T.clone().requires_grad_()
    losses_T, _ = find_policy_loss(name)(replace(batch, log_probs_T=x_T), options)
    (grad_T,) = torch.autograd.grad(weights_T @ losses_T, x_T)
    return grad_T


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@EVERY
@settings(max_examples=25)
@given(LENGTHS, st.integers(0, 1000), st.sampled_from([0.0, 0.5]), st.booleans(), st.data())
def test_division_and_order_do_not_change_the_gradient(
    name: str, lengths: list[int], seed: int, steps: float, by_token: bool, data
) -> None:
    batch = batch_of(lengths, seed, steps=steps, by_token=by_token)
    whole = chosen(name, batch)
    weights_T = weights(name, whole)
    expected_T = gradient(name, whole, weights_T)

    order = data.draw(st.permutations(range(len(lengths))))
    cut = data.draw(st.integers(0, len(lengths)))
    divided_T = torch.zeros_like(expected_T)
    for sequences in (order[:cut], order[cut:]):
        if sequences:
            micro_batch, index = part(whole, sequences)
            divided_T[index] = gradient(name, micro_batch, weights_T[index])
    close(divided_T, expected_T)

    permuted, index = part(batch, order)
    permuted = chosen(name, permuted)
    close(gradient(name, permuted, weights(name, permuted)), expected_T[index])


@EVERY
@settings(max_examples=20)
@given(LENGTHS, st.integers(0, 1000), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_what_stands_under_the_padding_changes_nothing(
    name: str, lengths: list[int], seed: int, garbage: float
) -> None:
    """Neither value nor gradient, nor does a gradient get there, a row that is all padding included."""
    clean = batch_of(lengths, seed)
    mask_BL = torch.arange(max(lengths)) < torch.tensor([*lengths, 0])[:, None]

    def padded(x_T: Tensor) -> Tensor:
        return torch.full(mask_BL.shape, garbage, dtype=x_T.dtype).masked_scatter(mask_BL, x_T)

    x_BL = padded(clean.log_probs_T).requires_grad_()
    old_BL, advantages_BL = padded(clean.old_log_probs_T), padded(clean.advantages_T)
    rows = mask_BL.any(1)
    made = PolicyBatch(x_BL[mask_BL], old_BL[mask_BL], advantages_BL[mask_BL], Segments(mask_BL.sum(1)[rows]))
    made, clean = chosen(name, made), chosen(name, clean)
    losses_T, _ = find_policy_loss(name)(made, OPTIONS)
    weights_T = weights(name, clean)
    (grad_BL,) = torch.autograd.grad(weights_T @ losses_T, x_BL)
    assert torch.equal(losses_T, find_policy_loss(name)(clean, OPTIONS)[0])
    assert torch.equal(grad_BL[mask_BL], gradient(name, clean, weights_T))
    assert not grad_BL[~mask_BL].any()


@EVERY
@settings(max_examples=20)
@given(LENGTHS, st.integers(0, 1000))
def test_on_policy_the_gradient_is_that_of_reinforce(name: str, lengths: list[int], seed: int) -> None:
    moved = batch_of(lengths, seed)
    batch = chosen(name, replace(moved, log_probs_T=moved.old_log_probs_T))
    stopped_T = batch.token_mask_T if name == "clip_cov" else torch.zeros_like(batch.advantages_T).bool()
    assert stopped_T is not None
    grad_T = gradient(name, batch, torch.ones_like(batch.advantages_T))
    close(grad_T, (-batch.advantages_T).masked_fill(stopped_T, 0))
    _, metrics = find_policy_loss(name)(batch, OPTIONS)
    assert metrics["ppo_kl"].abs().max() == 0
    if "pg_clipfrac" in metrics:
        assert metrics["pg_clipfrac"].tolist() == stopped_T.double().tolist()


FAR = st.one_of(st.floats(-100, 0, width=32), st.sampled_from([-1e30, -1e4, -1e-7, 0.0, 1e-7]))


@EVERY
@settings(max_examples=50)
@given(st.lists(st.tuples(FAR, FAR, st.floats(-10, 10, width=32)), min_size=1, max_size=8), st.booleans())
def test_losses_and_gradients_stay_finite(name: str, tokens: list, one_by_one: bool) -> None:
    log_probs_T, old_T, advantages_T = torch.tensor(tokens).T
    segments = Segments.of([1] * len(tokens) if one_by_one else [len(tokens)])
    batch = chosen(name, PolicyBatch(log_probs_T, old_T, advantages_T, segments))
    losses_T, metrics = find_policy_loss(name)(batch, OPTIONS)
    assert losses_T.isfinite().all()
    assert all(x_T.isfinite().all() for x_T in metrics.values())
    assert gradient(name, batch, torch.ones_like(losses_T)).isfinite().all()
    if name == "vanilla":  # dual clip bounds the loss
        assert (losses_T <= 3 * advantages_T.abs() + 1e-5).all()


@EVERY
def test_losses_and_metrics_are_of_tokens(name: str) -> None:
    batch = chosen(name, batch_of([3, 1, 4], 1))
    x_T = batch.log_probs_T.clone().requires_grad_()
    losses_T, metrics = find_policy_loss(name)(replace(batch, log_probs_T=x_T), OPTIONS)
    assert losses_T.shape == x_T.shape and losses_T.requires_grad
    assert "ppo_kl" in metrics
    assert ("pg_clipfrac" in metrics) == (name not in ("gpg", "kl_cov"))
    for metric_T in metrics.values():
        assert metric_T.shape == x_T.shape and metric_T.dtype == x_T.dtype and not metric_T.requires_grad


@EVERY
@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_a_response_of_one_token_stands_for_itself(name: str, seed: int) -> None:
    """Its loss is the same beside other responses, and for GSPO that of PPO without dual clip."""
    batch = batch_of([1, 4, 1], seed)
    batch = replace(batch, token_mask_T=torch.rand(6, generator=torch.Generator().manual_seed(seed)) < 0.5)
    together_T, _ = find_policy_loss(name)(batch, OPTIONS)
    for sequence, token in ((0, 0), (2, 5)):
        alone, _ = part(batch, [sequence])
        alone_T, _ = find_policy_loss(name)(alone, OPTIONS)
        close(alone_T, together_T[token : token + 1])
        if name == "gspo":
            ppo_T, _ = find_policy_loss("vanilla")(alone, replace(OPTIONS, clip_dual=1e9))
            close(alone_T, ppo_T)


@given(LENGTHS, st.integers(0, 1000))
def test_gspo_has_the_gradient_of_the_sequence_s_ratio(lengths: list[int], seed: int) -> None:
    """Against the paper's main objective, whose ratio carries the gradient itself."""
    batch = batch_of(lengths, seed)
    x_T = batch.log_probs_T.clone().requires_grad_()
    ratio_B = batch.segments.mean(x_T - batch.old_log_probs_T).exp()
    advantages_B = batch.segments.mean(batch.advantages_T)
    surrogate_B = torch.minimum(advantages_B * ratio_B, advantages_B * ratio_B.clamp(0.8, 1.2))
    (expected_T,) = torch.autograd.grad(-surrogate_B.mean(), x_T)
    close(gradient("gspo", batch, weights("gspo", batch)), expected_T)


def test_gspo_stops_a_response_that_has_become_far_likelier() -> None:
    old_T, advantages_T = torch.full((4,), -15.0), -torch.ones(4)
    batch = PolicyBatch(
        old_T + torch.tensor([9.0, 9.0, 11.0, 11.0]), old_T, advantages_T, Segments.of([2, 2])
    )
    assert gradient("gspo", batch, torch.ones(4)).tolist() == pytest.approx([math.exp(9)] * 2 + [0] * 2)


def test_clipped_tokens_keep_a_bounded_gradient_in_cispo() -> None:
    old_T, advantages_T = torch.tensor([-3.0, -3.0, -3.0]), torch.tensor([2.0, 2.0, -1.0])
    batch = PolicyBatch(torch.tensor([-0.5, -6.0, -3.0]), old_T, advantages_T, Segments.of([3]))
    assert gradient("cispo", batch, torch.ones(3)).tolist() == pytest.approx([-2.4, -1.6, 1.0])
    unbounded = replace(OPTIONS, clip_low=10.0)
    assert gradient("cispo", batch, torch.ones(3), unbounded)[1] == pytest.approx(
        -2 * torch.tensor(-3.0).exp()
    )


def test_the_gate_of_sapo_closes_with_distance_and_sooner_for_negative_advantages() -> None:
    old_T = torch.full((5,), -5.0)
    ratio_T = torch.tensor([0.5, 1.0, 2.0, 4.0, 1e8])
    up = PolicyBatch(old_T + ratio_T.log(), old_T, torch.ones(5), Segments.of([5]))
    pull_T = -gradient("sapo", up, torch.ones(5)) / ratio_T
    push_T = gradient("sapo", replace(up, advantages_T=-torch.ones(5)), torch.ones(5)) / ratio_T
    assert pull_T[1] == push_T[1] == 1
    assert pull_T[0] == pytest.approx(1 / math.cosh(0.25) ** 2)  # 4 σ(x) (1 - σ(x)) = 1 / cosh²(x/2)
    assert pull_T[2:4].tolist() == pytest.approx([1 / math.cosh(0.5) ** 2, 1 / math.cosh(1.5) ** 2])
    assert (push_T[[0, 2, 3]] < pull_T[[0, 2, 3]]).all()
    assert pull_T[-1] == push_T[-1] == 0


def test_the_geometric_mean_clips_log_ratios() -> None:
    batch = PolicyBatch(
        torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]), torch.ones(2), Segments.of([2])
    )
    losses_T, metrics = find_policy_loss("geo_mean")(batch, replace(OPTIONS, clip_low=0.4, clip_high=0.4))
    assert losses_T.tolist() == pytest.approx([-torch.tensor((0.4 - 1.0) / 2).exp().item()] * 2)
    assert metrics["pg_clipfrac"].tolist() == [1, 1] and metrics["pg_clipfrac_lower"].tolist() == [0, 0]


def test_dppo_lets_rare_tokens_move_and_holds_frequent_ones() -> None:
    rare, frequent, back, truncated = (1e-5, 1e-3), (0.99, 0.7), (0.5, 0.9), (1e-3, 1e-2)
    old_T, log_probs_T = torch.tensor([rare, frequent, back, truncated]).log().T
    advantages_T = torch.tensor([1.0, -1.0, -1.0, -1.0])
    batch = PolicyBatch(log_probs_T, old_T, advantages_T, Segments.of([4]))
    _, metrics = find_policy_loss("dppo_tv")(batch, replace(OPTIONS, clip_low=0.15, clip_high=0.15))
    assert metrics["pg_clipfrac"].tolist() == [0, 1, 0, 0]
    assert metrics["pg_clipfrac_lower"].tolist() == [1, 0, 0, 1]
    assert gradient("dppo_tv", batch, torch.ones(4)).tolist() == pytest.approx([-3.0, 0.0, 1.8, 3.0])
    _, metrics = find_policy_loss("vanilla")(batch, OPTIONS)
    assert metrics["pg_clipfrac"].tolist() == [1, 1, 0, 0]


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_dppo_kl_bounds_the_divergence_of_two_coins(new: float, old: float) -> None:
    far = kl_divergence(Bernoulli(torch.tensor(old).double()), Bernoulli(torch.tensor(new).double())).item()
    x_T = torch.tensor([new, old]).double().log()
    batch = PolicyBatch(x_T[:1], x_T[1:], torch.ones(1).double() * (1 if new > old else -1), Segments.of([1]))
    for bound, left_out in ((far * 1.001 + 1e-6, False), (far * 0.999 - 1e-6, new != old)):
        _, metrics = find_policy_loss("dppo_kl")(batch, replace(OPTIONS, clip_low=bound, clip_high=bound))
        if bound >= 0:
            assert metrics["pg_clipfrac"].item() == left_out


def test_dppo_kl_holds_a_token_whose_probability_rounds_to_more_than_one() -> None:
    batch = PolicyBatch(torch.tensor([1e-7]), torch.tensor([0.5]).log(), torch.ones(1), Segments.of([1]))
    assert find_policy_loss("dppo_kl")(batch, OPTIONS)[1]["pg_clipfrac"].item() == 1


def test_covariances_add_up_to_the_covariance() -> None:
    batch = batch_of([5, 9, 2], 3)
    expected = torch.cov(torch.stack((batch.advantages_T, batch.log_probs_T)), correction=0)[0, 1]
    close(covariance(batch).mean(), expected)
    assert positions(batch).tolist() == [*range(5), *range(9), *range(2)]
    assert (
        covariance(replace(batch, advantages_T=torch.full_like(batch.advantages_T, 0.1))).abs().max() < 1e-12
    )


def test_clip_cov_picks_a_share_of_the_eligible_and_no_token_that_ppo_clips() -> None:
    batch = batch_of([50] * 40, 5)
    options = replace(OPTIONS, clip_cov_ratio=0.01, clip_cov_lb=0.3, clip_cov_ub=1.0)
    picked_T = chosen("clip_cov", batch, options).token_mask_T
    assert picked_T is not None and picked_T.sum() == 20
    covariance_T = covariance(batch)[picked_T]
    assert covariance_T.min() > 0.3 and covariance_T.max() < 1.0
    _, ppo = find_policy_loss("vanilla")(batch, options)
    assert ppo["pg_clipfrac"][picked_T].sum() == 0 and ppo["pg_clipfrac"].sum() > 0
    losses_T, metrics = find_policy_loss("clip_cov")(replace(batch, token_mask_T=picked_T), options)
    assert losses_T[picked_T].abs().max() == 0 and metrics["pg_clipfrac"].mean() == 0.01
    all_T = chosen("clip_cov", batch, replace(options, clip_cov_ratio=1.0)).token_mask_T
    inside_T = (covariance(batch) > 0.3) & (covariance(batch) < 1.0)
    assert all_T is not None and all_T.equal(inside_T & (ppo["pg_clipfrac"] == 0))


def test_clip_cov_picks_from_all_of_the_band() -> None:
    """One token of each of many mini-batches: the rank of it among the eligible is spread as a uniform one is."""
    options = PolicyLossSettings(
        clip_cov_ratio=1e-9, clip_cov_lb=0.0, clip_cov_ub=100.0, clip_low=1, clip_high=1e9
    )
    ranks = []
    for seed in range(200):
        batch = batch_of([seed + 40], seed, by_token=True)
        picked_T = chosen("clip_cov", batch, options).token_mask_T
        covariance_T = covariance(batch)
        eligible_T = covariance_T[covariance_T > 0]
        assert picked_T is not None and picked_T.sum() == 1
        ranks.append((eligible_T < covariance_T[picked_T]).double().mean())
    ranks = torch.stack(ranks)
    assert ranks.mean().item() == pytest.approx(0.5, abs=0.08)
    assert ranks.std().item() == pytest.approx(12**-0.5, abs=0.04)


def test_clip_cov_picks_nothing_where_nothing_is_eligible() -> None:
    for batch in (batch_of([1], 0), replace(batch_of([3, 2], 0), advantages_T=torch.zeros(5).double())):
        picked_T = chosen("clip_cov", batch).token_mask_T
        assert picked_T is not None and picked_T.shape == batch.log_probs_T.shape and not picked_T.any()


def test_kl_cov_holds_the_tokens_of_highest_covariance() -> None:
    batch = batch_of([50] * 40, 6)
    options = replace(OPTIONS, kl_cov_ratio=0.01)
    held_T = chosen("kl_cov", batch, options).token_mask_T
    assert held_T is not None and held_T.sum() == 20
    covariance_T = covariance(batch)
    assert covariance_T[held_T].min() > covariance_T[~held_T].max()
    free_T, _ = find_policy_loss("kl_cov")(replace(batch, token_mask_T=torch.zeros_like(held_T)), options)
    losses_T, metrics = find_policy_loss("kl_cov")(replace(batch, token_mask_T=held_T), options)
    close(losses_T - free_T, 0.1 * metrics["ppo_kl"] * held_T)
    for nothing in (batch_of([1], 0), replace(batch, advantages_T=torch.zeros(2000).double())):
        none_T = chosen("kl_cov", nothing).token_mask_T
        assert none_T is not None and not none_T.any()


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_equal_covariances_do_not_swell_the_choice(name: str) -> None:
    """A sure policy has many tokens of log-prob 0; position tells them apart."""
    old_T = torch.zeros(30).double().index_fill(0, torch.tensor([10, 20]), -4.0)
    batch = PolicyBatch(
        old_T,
        old_T,
        Segments.of([10] * 3).expand(torch.tensor([1.0, -1.0, -1.0])).double(),
        Segments.of([10] * 3),
    )
    options = replace(OPTIONS, clip_cov_ratio=0.1, kl_cov_ratio=0.16)
    token_mask_T = chosen(name, batch, options).token_mask_T
    assert token_mask_T is not None
    if (
        name == "kl_cov"
    ):  # the two unlikely tokens that are punished, then the first of the response that is rewarded
        assert token_mask_T.nonzero().flatten().tolist() == [0, 1, 10, 20]
    else:  # ranks of one token each, and one of two: both responses' first tokens
        assert 3 <= token_mask_T.sum() <= 4


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_the_order_of_responses_does_not_change_the_choice(name: str) -> None:
    """Though many tokens' covariances are equal, or equal but for rounding."""
    options = replace(OPTIONS, clip_cov_ratio=0.05, kl_cov_ratio=0.05)
    for seed in range(40):
        batch = batch_of([5] * 40, seed, steps=0.3)
        batch = replace(batch, advantages_T=batch.advantages_T.sign())
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        permuted, index = part(batch, order)
        expected_T, token_mask_T = (
            chosen(name, batch, options).token_mask_T,
            chosen(name, permuted, options).token_mask_T,
        )
        assert expected_T is not None and expected_T.any() and not expected_T.all()
        assert token_mask_T is not None and token_mask_T.equal(expected_T[index])


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_tokens_that_were_never_chosen_are_told(name: str) -> None:
    with pytest.raises(ValueError, match="`select_tokens` first"):
        find_policy_loss(name)(batch_of([2], 0), OPTIONS)
