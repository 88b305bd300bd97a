"""The losses over a micro-batch: the actor's (policy loss, entropy bonus, KL penalty) and the critic's, with metrics."""

from dataclasses import fields

import torch
from torch import Tensor

from iiverl_core.algorithms import PolicyBatch, PolicyLoss, PolicyLossSettings, kl_divergence
from iiverl_core.algorithms.rollout_correction import RolloutCorrection, correction_weights, mismatch
from iiverl_core.algorithms.value_loss import value_loss
from iiverl_core.config import LossConfig, RolloutCorrectionConfig
from iiverl_core.registry import PolicyLossInfo
from iiverl_core.samples import ROLLOUT_LOG_PROBS, STALENESS
from iiverl_core.training.backend import Loss, MicroBatch, Outputs


def policy_loss_settings(config: LossConfig) -> PolicyLossSettings:
    """Read the options of the policy losses from the configuration, which has the same names."""
    return PolicyLossSettings(
        **{each.name: getattr(config, each.name) for each in fields(PolicyLossSettings)}
    )


def rollout_correction(config: RolloutCorrectionConfig, loss: PolicyLossInfo) -> RolloutCorrection:
    """Convert the configuration of the rollout correction for a policy loss to its settings."""
    low, high = config.rejection_bounds
    return RolloutCorrection(
        bypass=config.bypass_old_log_prob,
        importance=None if config.bypass_old_log_prob and loss.uses_ratio else config.rollout_is,
        cap=config.rollout_is_threshold,
        rejection=config.rollout_rs,
        low=low,
        high=high,
    )


def actor_loss(config: LossConfig, policy_loss: PolicyLoss, correction: RolloutCorrection) -> Loss:
    """Create the configured loss  w · policy - entropy_coeff · entropy + kl_loss_coef · KL(π, π_ref).

    Micro-batches have `advantages`; `old_log_probs`, unless the weights have not changed since the responses were
    sampled and the ratio is 1 by definition; `ref_log_probs` with `use_kl_loss`; and `token_mask` if the policy loss
    selects tokens of the mini-batch. `rollout_log_probs`, if present, are compared with the trainer's old log-probs and
    give the weights w that `correction` configures; if it bypasses the trainer's, they are the old log-probs.
    """
    settings = policy_loss_settings(config)

    def loss(outputs: Outputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        log_probs_T, entropy_T = outputs.log_probs_T, outputs.entropy_T
        if log_probs_T is None or entropy_T is None:
            raise ValueError("the actor's loss needs log-probs and entropy")
        arrays = batch.arrays_T
        before_T = arrays.get("old_log_probs", log_probs_T.detach())
        old_T = arrays[ROLLOUT_LOG_PROBS] if correction.bypass else before_T
        weights_T = batch.weights_T.to(log_probs_T.dtype)

        token_mask_T = arrays["token_mask"].bool() if "token_mask" in arrays else None
        policy_T, token_metrics = policy_loss(
            PolicyBatch(log_probs_T, old_T, arrays["advantages"], batch.segments, token_mask_T), settings
        )
        metrics: dict[str, Tensor] = {}
        if ROLLOUT_LOG_PROBS in arrays:
            log_ratio_T = before_T - arrays[ROLLOUT_LOG_PROBS]
            metrics |= _mismatch_metrics(log_ratio_T, batch)
            if correction.importance or correction.rejection:
                correction_T = correction_weights(log_ratio_T, batch.segments, correction)
                metrics |= _weight_metrics(correction_T, batch.inv_num_tokens)
                policy_T = correction_T * policy_T
        total_T = policy_T - config.entropy_coeff * entropy_T
        metrics |= {"actor/pg_loss": weights_T @ policy_T, "actor/entropy_loss": weights_T @ entropy_T}
        metrics |= {f"actor/{name}": x_T.sum() * batch.inv_num_tokens for name, x_T in token_metrics.items()}
        if config.use_kl_loss:
            kl_T = kl_divergence(config.kl_loss_type, log_probs_T, arrays["ref_log_probs"])
            total_T = total_T + config.kl_loss_coef * kl_T
            metrics["actor/kl_loss"] = weights_T @ kl_T
        return weights_T @ total_T, {name: value.detach() for name, value in metrics.items()}

    return loss


def critic_loss(config: LossConfig) -> Loss:
    """Create the critic's clipped loss. Micro-batches have `returns`, and the `values` before the first update."""

    def loss(outputs: Outputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        values_T = outputs.values_T
        if values_T is None:
            raise ValueError("the critic's loss needs values")
        losses_T, clipped_T = value_loss(
            values_T, batch.arrays_T["values"], batch.arrays_T["returns"], config.value_clip
        )
        total = batch.weights_T.to(losses_T.dtype) @ losses_T
        metrics = {
            "critic/vf_loss": total,
            "critic/vf_clipfrac": clipped_T.sum() * batch.inv_num_tokens,
            "critic/vpred_mean": values_T.sum() * batch.inv_num_tokens,
        }
        return total, {name: value.detach() for name, value in metrics.items()}

    return loss


def _mismatch_metrics(log_ratio_T: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
    """Compare engine and trainer; a dummy micro-batch contributes nothing."""
    differences, inv_num_tokens = mismatch(log_ratio_T), batch.inv_num_tokens
    by_staleness = {
        f"rollout/kl/staleness_{steps}": (differences["kl"] * (batch.arrays_T[STALENESS] == steps)).sum()
        / tokens
        for steps, tokens in batch.tokens_by_staleness.items()
    }
    return by_staleness | {
        "rollout/kl": differences["kl"].sum() * inv_num_tokens,
        "rollout/ratio/mean": differences["ratio"].sum() * inv_num_tokens,
        "rollout/ratio/max": differences["ratio"].max() * (inv_num_tokens > 0),
    }


def _weight_metrics(weights_T: Tensor, inv_num_tokens: float) -> dict[str, Tensor]:
    return {
        "rollout/weight/mean": weights_T.sum() * inv_num_tokens,
        "rollout/rejected": (weights_T == 0).sum().to(torch.float32) * inv_num_tokens,
    }
