"""Mismatch between rollout engine and trainer: its size, and importance weights that correct for it.

Both compute log-probs of the same tokens under the same weights, with different kernels, dtypes and batches. With the
log-ratio x = log π_trainer(token) - log π_rollout(token), in nats and clamped to ±20,

| `importance` | weight of a token | |
|---|---|---|
| `token` | min(exp(x), cap) | truncated importance sampling (Ionides 2008); biased, of low variance (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training") |
| `sequence` | min(exp(Σ x over the response), cap) | unbiased except for the truncation, of higher variance (Liu et al. 2025, "When speed kills stability: demystifying RL collapse from the training-inference mismatch") |

`rejection` gives weight 0 to the largest disagreements (masked importance sampling, Liu et al.), and can be combined
with either importance weight, or with none. Outside [low, high] it rejects

| `rejection` | by | |
|---|---|---|
| `token` | exp(x) | tokens |
| `sequence` | exp(Σ x over the response) | whole responses; long ones deviate more |
| `geometric` | exp(mean x over the response) | whole responses, regardless of length; close to 1, so bounds should be narrow |

With `bypass`, the old log-probs of the policy loss are the engine's, so its ratio is against the policy that sampled and
already is the importance weight; the trainer's log-probs in x are then those of the current weights. Importance weights
remain for losses without a ratio, and rejection for all (verl's bypass mode).

In a response of one token they are all the same. A token of weight 0 still counts in the loss's normaliser, which is a
constant of the batch; verl removes it from the normaliser, which gives the remaining tokens more weight.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from iiverl_core.algorithms.segments import Segments

MAX_LOG_RATIO = 20.0  # keeps the exponential of a log-ratio finite in fp32


@dataclass(frozen=True)
class RolloutCorrection:
    """Settings of the correction: importance weights truncated at `cap`, and rejection outside [`low`, `high`]."""

    importance: Literal["token", "sequence"] | None = None
    cap: float = 2.0
    rejection: Literal["token", "sequence", "geometric"] | None = None
    low: float = 0.5
    high: float = 2.0
    bypass: bool = False


@torch.no_grad()
def correction_weights(log_ratio_T: Tensor, segments: Segments, settings: RolloutCorrection) -> Tensor:
    """Compute the factor of each token's policy loss, (T,), without gradient; 1 if no correction is configured."""
    x_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    sequence_ratio_T = segments.expand(segments.sum(x_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp())
    by_level = {"token": x_T.exp(), "sequence": sequence_ratio_T}
    weights_T = torch.ones_like(x_T)
    if settings.importance is not None:
        weights_T = by_level[settings.importance].clamp(max=settings.cap)
    if settings.rejection is not None:
        by_level["geometric"] = segments.expand(segments.mean(x_T).exp())
        ratio_T = by_level[settings.rejection]
        weights_T = weights_T * ((ratio_T >= settings.low) & (ratio_T <= settings.high))
    return weights_T


@torch.no_grad()
def mismatch(log_ratio_T: Tensor) -> dict[str, Tensor]:
    """Measure the difference between trainer and engine on each token, (T,) each.

    `kl` is the k3 estimate of KL(π_rollout, π_trainer) in nats (Schulman 2020, "Approximating KL divergence"): unbiased
    over tokens that the engine has sampled, and never negative. `ratio` is exp(x).
    """
    x_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # x is normally near 0, where rounding of exp(x) - 1 would lose its difference from x
    return {"kl": (x_T.expm1() - x_T).clamp(min=0), "ratio": x_T.exp()}
