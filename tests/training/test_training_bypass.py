"""The actor's loss with the engine's log-probs as old ones, and the importance weights that remain."""

import numpy as np
import pytest
import torch
from torch import Tensor

from iiverl_core.algorithms import find_policy_loss
from iiverl_core.config import RolloutCorrectionConfig, build, run_config
from iiverl_core.registry import POLICY_LOSSES
from iiverl_core.samples import ROLLOUT_LOG_PROBS, STALENESS, TokenSequence
from iiverl_core.training import MicroBatch, Outputs
from iiverl_core.training.batching import make_micro_batch
from iiverl_core.training.losses import actor_loss, rollout_correction
from iiverl_core.training.metrics import merge

LENGTHS = (4, 2)
CURRENT_T = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5, -0.25])
ADVANTAGES_T = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.5, 1.0])
RATIO_T = torch.tensor([1.5, 3.0, 0.25, 0.5, 0.5, 1.0])  # of the current policy to the engine's
ENGINE_T = CURRENT_T - RATIO_T.log()


def batch(**arrays: Tensor) -> MicroBatch:
    arrays |= {"advantages": ADVANTAGES_T, "token_mask": torch.tensor([1.0, 0, 1, 1, 0, 1])}
    parts = {name: [part.numpy() for part in x_T.split(LENGTHS)] for name, x_T in arrays.items()}
    zeros = [np.zeros(length, dtype=np.float32) for length in LENGTHS]
    sequences = [TokenSequence.single_turn([0], x.astype(np.int64), x) for x in zeros]
    return make_micro_batch(sequences, parts, [1.0] * len(LENGTHS), device=torch.device("cpu"))


def gradient(mode: str, micro_batch: MicroBatch, **correction: object) -> Tensor:
    """Compute the gradient of the policy loss by the current log-probs, (T,)."""
    config = run_config(build({})).loss
    settings = rollout_correction(RolloutCorrectionConfig.model_validate(correction), POLICY_LOSSES[mode])
    log_probs_T = CURRENT_T.clone().requires_grad_()
    outputs = Outputs(log_probs_T=log_probs_T, entropy_T=torch.zeros(6))
    loss, _ = actor_loss(config, find_policy_loss(mode), settings)(outputs, micro_batch)
    loss.backward()
    assert log_probs_T.grad is not None
    return log_probs_T.grad


@pytest.mark.parametrize("mode", list(POLICY_LOSSES))
def test_the_ratio_is_against_the_engine(mode: str) -> None:
    known = {ROLLOUT_LOG_PROBS: ENGINE_T}
    expected = gradient(mode, batch(old_log_probs=ENGINE_T))
    assert torch.equal(gradient(mode, batch(**known), bypass_old_log_prob=True), expected)
    weighted = gradient(mode, batch(**known), bypass_old_log_prob=True, rollout_is="token")
    factor_T = torch.ones(6) if POLICY_LOSSES[mode].uses_ratio else RATIO_T.clamp(max=2)
    torch.testing.assert_close(weighted, expected * factor_T)


def test_only_the_loss_without_a_ratio_ignores_old_log_probs() -> None:
    others = {
        name
        for name in POLICY_LOSSES
        if torch.equal(*(gradient(name, batch(old_log_probs=CURRENT_T - x)) for x in (0.05, 0.1)))
    }
    assert others == {name for name, info in POLICY_LOSSES.items() if not info.uses_ratio} == {"gpg"}


def test_rejection_compares_the_current_policy_with_the_engine() -> None:
    known = batch(**{ROLLOUT_LOG_PROBS: ENGINE_T})
    settings = {"rollout_rs": "token", "rollout_rs_threshold": 2.5, "rollout_rs_threshold_lower": 0.4}
    kept = gradient("gpg", known, bypass_old_log_prob=True, **settings)
    assert (kept != 0).tolist() == [True, False, False, True, True, True]


def test_the_mismatch_is_told_by_the_age_of_the_weights() -> None:
    """Weighted by their tokens, the parts make up the whole; also over micro-batches of which some have no such token."""
    ages = ([0.0, 2, 2, 0], [1.0, 1])
    counts = {0: 2, 1: 2, 2: 2}
    zeros = [np.zeros(length, dtype=np.float32) for length in LENGTHS]
    sequences = [TokenSequence.single_turn([0], x.astype(np.int64), x) for x in zeros]
    total: dict[str, Tensor] = {}
    for i, part in enumerate(zip(CURRENT_T.split(LENGTHS), ENGINE_T.split(LENGTHS), strict=True)):
        current_T, engine_T = part
        arrays = {
            "advantages": [np.ones(LENGTHS[i], np.float32)],
            ROLLOUT_LOG_PROBS: [engine_T.numpy()],
            STALENESS: [np.array(ages[i], np.float32)],
        }
        micro_batch = make_micro_batch(
            *([sequences[i]], arrays, [1.0]),
            inv_num_tokens=1 / 6,
            tokens_by_staleness=counts,
            device=torch.device("cpu"),
        )
        config = run_config(build({})).loss
        settings = rollout_correction(RolloutCorrectionConfig(), POLICY_LOSSES["vanilla"])
        outputs = Outputs(log_probs_T=current_T, entropy_T=torch.zeros(LENGTHS[i]))
        merge(total, actor_loss(config, find_policy_loss("vanilla"), settings)(outputs, micro_batch)[1])
    x_T = RATIO_T.log()
    kl_T = x_T.exp() - 1 - x_T
    by_age = {age: total[f"rollout/kl/staleness_{age}"] for age in counts}
    torch.testing.assert_close(by_age[0], (kl_T[0] + kl_T[3]) / 2)
    torch.testing.assert_close(by_age[1], kl_T[4:].mean())
    torch.testing.assert_close(
        sum(by_age[age] * count for age, count in counts.items()) / 6, total["rollout/kl"]
    )
