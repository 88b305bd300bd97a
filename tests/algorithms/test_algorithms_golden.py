"""Values and gradients equal those of verl 0.9.1's algorithm core (`golden.json`), on flat tensors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from iiverl_core.algorithms import (
    AdvantageBatch,
    AdvantageSettings,
    PolicyBatch,
    PolicyLossSettings,
    Segments,
    find_estimator,
    find_policy_loss,
    kl_divergence,
)
from iiverl_core.algorithms.value_loss import value_loss
from iiverl_core.registry import ESTIMATORS, POLICY_LOSSES
from iiverl_core.training.aggregation import token_weights

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
MASK = torch.tensor(GOLDEN["mask"]).bool()
SEGMENTS = Segments(MASK.sum(1))
GROUPS = torch.tensor([int(name[1:]) for name in GOLDEN["index"]])
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def flat(padded: list[list[float]]) -> Tensor:
    return torch.tensor(padded)[MASK]


def weights(mode: str) -> Tensor:
    """The weight of each token, (T,)."""
    return SEGMENTS.expand(
        torch.tensor(token_weights(mode, SEGMENTS.lengths_B.tolist(), max_tokens_norm=MASK.shape[1]))
    )


def cases(kind: str) -> list:
    """The golden cases of a kind."""
    return [
        pytest.param(case, id=f"{case['name']}-{number}")
        for number, case in enumerate(GOLDEN["cases"])
        if case["kind"] == kind
    ]


@pytest.mark.parametrize("case", cases("advantage"))
def test_advantages(case: dict) -> None:
    batch = AdvantageBatch(
        rewards_T=flat(GOLDEN["token_level_rewards"]),
        segments=SEGMENTS,
        group_B=GROUPS,
        values_T=flat(GOLDEN["values"]),
        baseline_B=torch.tensor(GOLDEN["reward_baselines"]),
    )
    params = case["params"]
    settings = AdvantageSettings(
        gamma=params.get("gamma", 1.0),
        lam=params.get("lam", 1.0),
        norm_by_std=params.get("norm_adv_by_std_in_grpo", True),
    )
    advantages_T, returns_T = find_estimator(case["name"])(batch, settings)
    torch.testing.assert_close(advantages_T, flat(case["advantages"]), **TOLERANCE)
    torch.testing.assert_close(returns_T, flat(case["returns"]), **TOLERANCE)


@pytest.mark.parametrize("case", cases("value_loss"))
def test_value_loss(case: dict) -> None:
    values_T = flat(case["vpreds"]).requires_grad_()
    losses_T, clipped_T = value_loss(
        values_T, flat(GOLDEN["values"]), flat(case["returns"]), case["params"]["cliprange_value"]
    )
    loss = (losses_T * weights("token-mean")).sum()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert clipped_T.float().mean().item() == pytest.approx(case["clipfrac"], rel=1e-5)
    (grad_T,) = torch.autograd.grad(loss, values_T)
    torch.testing.assert_close(grad_T, flat(case["grad"]), **TOLERANCE)


@pytest.mark.parametrize("case", cases("kl"))
def test_kl(case: dict) -> None:
    log_probs_T = flat(GOLDEN["log_prob"]).requires_grad_()
    value_T = kl_divergence(case["name"], log_probs_T, flat(GOLDEN["ref_log_prob"]))
    torch.testing.assert_close(value_T.detach(), flat(case["value"]), **TOLERANCE)
    (grad_T,) = torch.autograd.grad(value_T.sum(), log_probs_T)
    torch.testing.assert_close(grad_T, flat(case["grad"]), **TOLERANCE)


@pytest.mark.parametrize("case", cases("aggregate"))
def test_aggregation(case: dict) -> None:
    value = (weights(case["name"]) * flat(GOLDEN["advantages"])).sum()
    assert value.item() == pytest.approx(case["value"], rel=1e-5)


@pytest.mark.parametrize("case", cases("policy_loss"))
def test_policy_loss(case: dict) -> None:
    params = case["params"]
    clip = params.get("clip_ratio", 0.2)
    settings = PolicyLossSettings(
        clip_low=params.get("clip_ratio_low", clip),
        clip_high=params.get("clip_ratio_high", clip),
        clip_dual=params.get("clip_ratio_c", 3.0),
    )
    policy_loss = find_policy_loss(case["name"])
    log_probs_T = flat(GOLDEN["log_prob"]).requires_grad_()
    batch = PolicyBatch(log_probs_T, flat(GOLDEN["old_log_prob"]), flat(GOLDEN["advantages"]), SEGMENTS)
    if policy_loss.select_tokens is not None:
        batch = replace(batch, token_mask_T=policy_loss.select_tokens(batch, settings))
    losses_T, metrics = policy_loss(batch, settings)
    mode = policy_loss.loss_agg_mode or params.get("loss_agg_mode", "token-mean")
    loss = (losses_T * weights(mode)).sum()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5, abs=1e-6)
    (grad_T,) = torch.autograd.grad(loss, log_probs_T)
    torch.testing.assert_close(grad_T, flat(case["grad"]), **TOLERANCE)
    for name, value in case["metrics"].items():
        assert metrics[name.removeprefix("actor/")].mean().item() == pytest.approx(value, rel=1e-5)


def test_every_kind_of_golden_case_is_compared() -> None:
    assert {case["name"] for case in GOLDEN["cases"] if case["kind"] == "advantage"} == set(ESTIMATORS)
    assert len(cases("value_loss")) == 2
    assert len(cases("kl")) == 9
    assert len(cases("aggregate")) == 5
    named = {case["name"] for case in GOLDEN["cases"] if case["kind"] == "policy_loss"}
    assert set(POLICY_LOSSES) - named == {"clip_cov"}  # whose choice is random in verl
