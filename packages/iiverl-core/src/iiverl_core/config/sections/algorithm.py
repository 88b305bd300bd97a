"""The section `algorithm`: from rewards to advantages."""

from typing import Annotated, Literal

from iiverl_core.config.sections.choices import AdvEstimator, KLKind, only_estimators
from iiverl_core.config.sections.section import (
    Count,
    Fraction,
    Natural,
    Nonnegative,
    OnlyWhen,
    Positive,
    Section,
)

CORRECTION = "algorithm.rollout_correction"
FILTERED = OnlyWhen("algorithm.filter_groups.enable", (True,))
REJECTING = OnlyWhen(f"{CORRECTION}.rollout_rs", ("token", "sequence", "geometric"))
WEIGHTING = OnlyWhen(f"{CORRECTION}.rollout_is", ("token", "sequence"), otherwise=REJECTING)


class KLControlConfig(Section):
    """The coefficient of the KL divergence in the reward."""

    type: Literal["fixed", "adaptive"] = "fixed"
    """Keep the coefficient fixed, or adapt it so that the KL divergence stays near `target_kl`."""
    kl_coef: Nonnegative = 0.001
    """Coefficient, or its initial value."""
    target_kl: Positive | None = None
    """Target KL divergence of `adaptive`, in nats per sequence."""
    horizon: Count | None = None
    """Number of samples over which `adaptive` adapts the coefficient."""


class FilterGroupsConfig(Section):
    """Dynamic sampling (DAPO): groups whose responses all score the same are replaced by others."""

    enable: bool = False
    """Replace groups that have no gradient."""
    metric: Annotated[str | None, FILTERED] = None
    """What must differ within a group: `score` (or null), `seq_reward` (with the length penalty), or a component of the reward."""
    max_num_gen_batches: Annotated[Natural, FILTERED] = 0
    """Maximum batches to generate per step; 0 for as many as an epoch has."""


class RolloutCorrectionConfig(Section):
    """Correction for the difference between the log-probs of the rollout engine and of the trainer."""

    bypass_old_log_prob: bool = False
    """Use the engine's log-probs as old ones instead of computing the trainer's: the ratio is against the policy that sampled."""
    rollout_is: Literal["token", "sequence"] | None = None
    """Importance weights per `token` or per `sequence`; null for none."""
    rollout_is_threshold: Annotated[Positive, WEIGHTING] = 2.0
    """Cap of the importance weights."""
    rollout_rs: Literal["token", "sequence", "geometric"] | None = None
    """Reject outliers: each `token`, or whole responses by their `sequence` ratio or its `geometric` mean; null for no rejection."""
    rollout_rs_threshold: Annotated[Positive | None, REJECTING] = None
    """Probability ratio above which to reject; null for `rollout_is_threshold`."""
    rollout_rs_threshold_lower: Annotated[Positive | None, REJECTING] = None
    """Probability ratio below which to reject; null for the inverse of the upper threshold."""
    mismatch_kl_warning: Positive | None = 0.05
    """Warn if the metric `rollout/kl` of a step is above this, in nats per token; null for no warning."""
    mismatch_kl_limit: Positive | None = None
    """Stop the run if the metric `rollout/kl` is above this, in nats per token; null for no limit."""

    @property
    def rejection_bounds(self) -> tuple[float, float]:
        """Lower and upper probability ratio between which `rollout_rs` rejects nothing."""
        high = self.rollout_rs_threshold or self.rollout_is_threshold
        return self.rollout_rs_threshold_lower or 1 / high, high


class AlgorithmConfig(Section):
    """From rewards to advantages."""

    gamma: Annotated[Fraction, only_estimators("gamma")] = 1.0
    """Discount factor γ of rewards."""
    lam: Annotated[Fraction, only_estimators("lam")] = 1.0
    """GAE's λ: 0 relies on the critic, 1 on the rewards."""
    adv_estimator: AdvEstimator = "gae"
    """Advantage estimator: a name, or a user function, `path/to/file.py:name`."""
    norm_adv_by_std_in_grpo: Annotated[bool, only_estimators("norm_by_std")] = True
    """Divide a group's advantages by their standard deviation; false is Dr. GRPO."""
    use_kl_in_reward: bool | None = None
    """Subtract a KL penalty from the reward; null does so unless `actor_rollout_ref.actor.use_kl_loss` is true."""
    kl_penalty: KLKind = "kl"
    """Estimator of the KL divergence in the reward."""
    kl_ctrl: KLControlConfig = KLControlConfig()
    filter_groups: FilterGroupsConfig = FilterGroupsConfig()
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
