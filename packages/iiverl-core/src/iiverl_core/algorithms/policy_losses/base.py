"""Inputs and outputs of the policy losses, and helpers that most of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from iiverl_core.algorithms.segments import Segments

MAX_LOG_RATIO = 20.0  # keeps the exponential of a log-ratio finite in fp32


@dataclass(frozen=True)
class PolicyBatch:
    """The tokens of the responses of a micro-batch or mini-batch.

    `log_probs_T` are the policy's, with gradient; `old_log_probs_T` those of the policy before the step's first update.
    `token_mask_T` (bool) marks the tokens selected by `PolicyLoss.select_tokens`, if the loss has one.
    """

    log_probs_T: Tensor
    old_log_probs_T: Tensor
    advantages_T: Tensor
    segments: Segments
    token_mask_T: Tensor | None = None

    @property
    def log_ratio_T(self) -> Tensor:
        """Log π - log π_old of each token in nats, (T,), clamped to ±20; the gradient is zero beyond that."""
        return (self.log_probs_T - self.old_log_probs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


@dataclass(frozen=True)
class PolicyLossSettings:
    """Options of the policy losses.

    `clip_low` and `clip_high` limit how far the ratio π/π_old may fall below 1 and rise above it; `geo_mean` applies
    them to log-ratios, `dppo_tv` and `dppo_kl` to divergences. `clip_dual` is the ratio at which dual clip and DPPO's
    truncation take effect. `tau_pos` and `tau_neg` are SAPO's temperatures for positive and other advantages.
    `clip_cov_ratio` and `kl_cov_ratio` are fractions of a mini-batch's tokens, `clip_cov_lb` and `clip_cov_ub` the
    covariances between which `clip_cov` selects, and `ppo_kl_coef` is the weight of `kl_cov`'s penalty.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float = 3.0
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    clip_cov_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 0.0002
    ppo_kl_coef: float = 0.1


LossFunction: TypeAlias = Callable[[PolicyBatch, PolicyLossSettings], tuple[Tensor, dict[str, Tensor]]]
"""Returns the loss of each token, (T,), and metrics of each token, (T,), whose mean over all tokens is logged under
`actor/`."""


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss and its requirements.

    A loss sees one micro-batch at a time. A loss that compares tokens across the whole mini-batch does so in
    `select_tokens`, which gets the whole mini-batch under the weights before the update and returns a bool per token,
    (T,), so that the gradient does not depend on how the mini-batch is split. `loss_agg_mode`, if given, is part of the
    algorithm and replaces that of the configuration.
    """

    function: LossFunction
    select_tokens: Callable[[PolicyBatch, PolicyLossSettings], Tensor] | None = None
    loss_agg_mode: str | None = None

    def __call__(self, batch: PolicyBatch, settings: PolicyLossSettings) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of each token, (T,), and metrics of each token by name, (T,)."""
        return self.function(batch, settings)


def surrogates(ratio_T: Tensor, advantages_T: Tensor, settings: PolicyLossSettings) -> tuple[Tensor, Tensor]:
    """Compute -A r with the ratio unclipped, and with the ratio clipped to [1 - clip_low, 1 + clip_high], (T,) each."""
    bounded_T = ratio_T.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return -advantages_T * ratio_T, -advantages_T * bounded_T


def clip_metrics(
    log_ratio_T: Tensor, clipped_T: Tensor, clipped_lower_T: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the metrics of most losses, (T,) each: clipped tokens, and the k1 estimate of KL(π_old, π) in nats.

    `pg_clipfrac_lower` counts the tokens clipped by a second bound, in most losses one for negative advantages; it is 0
    if the loss has no such bound.
    """
    x_T = log_ratio_T.detach()
    return {
        "pg_clipfrac": clipped_T.to(x_T.dtype),
        "pg_clipfrac_lower": x_T.new_zeros(x_T.shape)
        if clipped_lower_T is None
        else clipped_lower_T.to(x_T.dtype),
        "ppo_kl": -x_T,
    }
