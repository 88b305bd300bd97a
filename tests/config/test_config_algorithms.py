"""What the registry says of algorithms is what they do, and what the configuration says of their keys."""

import dataclasses
import re
from pathlib import Path
from typing import Any

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
)
from iiverl_core.config import load
from iiverl_core.config.schema import keys
from iiverl_core.registry import ESTIMATORS, POLICY_LOSSES

ESTIMATOR = "algorithm.adv_estimator"
LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"
ESTIMATOR_KEYS = {
    "gamma": "algorithm.gamma",
    "lam": "algorithm.lam",
    "norm_by_std": "algorithm.norm_adv_by_std_in_grpo",
}
LOSS_KEYS = {
    "clip_low": "actor_rollout_ref.actor.clip_ratio_low",
    "clip_high": "actor_rollout_ref.actor.clip_ratio_high",
    "clip_dual": "actor_rollout_ref.actor.clip_ratio_c",
    "tau_pos": "actor_rollout_ref.actor.tau_pos",
    "tau_neg": "actor_rollout_ref.actor.tau_neg",
    "clip_cov_ratio": "actor_rollout_ref.actor.policy_loss.clip_cov_ratio",
    "clip_cov_lb": "actor_rollout_ref.actor.policy_loss.clip_cov_lb",
    "clip_cov_ub": "actor_rollout_ref.actor.policy_loss.clip_cov_ub",
    "kl_cov_ratio": "actor_rollout_ref.actor.policy_loss.kl_cov_ratio",
    "ppo_kl_coef": "actor_rollout_ref.actor.policy_loss.ppo_kl_coef",
}
OTHER = {  # than the defaults, and far enough to change a result
    "gamma": 0.5,
    "lam": 0.5,
    "norm_by_std": False,
    "clip_low": 0.05,
    "clip_high": 0.01,
    "clip_dual": 1.1,
    "tau_pos": 3.0,
    "tau_neg": 5.0,
    "clip_cov_ratio": 0.9,
    "clip_cov_lb": -50.0,
    "clip_cov_ub": 0.5,
    "kl_cov_ratio": 0.9,
    "ppo_kl_coef": 7.0,
}


def unread(folder: Path, chooser: str, name: str, values: dict[str, str]) -> set[str]:
    """The keys of which loading says that they have no effect, where all of them are set."""
    file = folder / "empty.yaml"
    file.touch()
    overrides = [f"{chooser}={name}", "actor_rollout_ref.rollout.n=4"]
    reported = load(file, overrides + [f"{key}={value}" for key, value in values.items()]).problems
    named = {word for p in reported if "has no effect" in p.message for word in re.findall(r"\w+", p.key)}
    return {key for key in values if key.rpartition(".")[2] in named}


def estimated(name: str, **settings: Any) -> list[Tensor]:
    """The advantages and returns of a step of two groups."""
    segments = Segments.of([2, 3, 1, 4])
    batch = AdvantageBatch(
        rewards_T=segments.at_last(torch.tensor([1.0, 0.0, 2.0, 5.0])),
        segments=segments,
        group_B=torch.tensor([0, 0, 1, 1]),
        values_T=torch.linspace(0, 1, 10).square(),
        baseline_B=torch.tensor([0.5, 0.5, 1.0, 1.0]),
    )
    return list(find_estimator(name)(batch, AdvantageSettings(**settings)))


def losses(name: str, **settings: Any) -> list[Tensor]:
    """The losses and gradients of a mini-batch whose ratios go far to both sides, and whose covariances differ."""
    torch.manual_seed(0)
    segments = Segments.of([2, 3, 1, 4, 30])
    old_T = torch.linspace(-3, -1, 40)
    log_probs_T = (old_T + 2.5 * torch.cos(2.3 * torch.arange(40.0)) ** 5).requires_grad_()
    options = PolicyLossSettings(**{"clip_cov_ratio": 0.05, "clip_cov_lb": 0.0, **settings})
    batch = PolicyBatch(log_probs_T, old_T, 2 * torch.sin(torch.arange(40.0)), segments)
    loss = find_policy_loss(name)
    if loss.select_tokens:
        batch = dataclasses.replace(batch, token_mask_T=loss.select_tokens(batch, options))
    losses_T, metrics = loss(batch, options)
    (gradient_T,) = torch.autograd.grad(losses_T.sum(), log_probs_T)
    return [losses_T, gradient_T, *metrics.values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_read_the_settings_that_the_registry_names(name: str) -> None:
    changing = {s for s in ESTIMATOR_KEYS if not same(estimated(name), estimated(name, **{s: OTHER[s]}))}
    assert changing == set(ESTIMATORS[name].reads)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses_read_the_settings_that_the_registry_names(name: str) -> None:
    changing = {s for s in LOSS_KEYS if not same(losses(name), losses(name, **{s: OTHER[s]}))}
    assert changing == set(POLICY_LOSSES[name].reads)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_keys_that_an_estimator_does_not_read_have_no_effect(name: str, tmp_path: Path) -> None:
    values = {"algorithm.gamma": "0.9", "algorithm.lam": "0.9", "algorithm.norm_adv_by_std_in_grpo": "false"}
    not_read = {key for setting, key in ESTIMATOR_KEYS.items() if setting not in ESTIMATORS[name].reads}
    assert unread(tmp_path, ESTIMATOR, name, values) == not_read


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_keys_that_a_policy_loss_does_not_read_have_no_effect(name: str, tmp_path: Path) -> None:
    values = {key: str(keys()[key].default) for key in LOSS_KEYS.values()}
    values |= {key: "0.1" for key, value in values.items() if value.startswith("${")}
    not_read = {key for setting, key in LOSS_KEYS.items() if setting not in POLICY_LOSSES[name].reads}
    assert unread(tmp_path, LOSS, name, values) == not_read


def test_every_setting_has_a_key() -> None:
    assert set(LOSS_KEYS) == {field.name for field in dataclasses.fields(PolicyLossSettings)}
    assert set(ESTIMATOR_KEYS) == {field.name for field in dataclasses.fields(AdvantageSettings)}
