"""The section `algorithm`: from rewards to advantages."""

from typing import Annotated, Literal

from iiverl_core.config.sections.choices import AdvEstimator, KLKind, only_estimators
from iiverl_core.config.sections.section import (
    Count,
    Natural,
    Nonnegative,
    OnlyWhen,
    Positive,
    Section,
    Share,
)

CORRECTION = "algorithm.rollout_correction"
FILTERED = OnlyWhen("algorithm.filter_groups.enable", (True,))
REJECTING = OnlyWhen(f"{CORRECTION}.rollout_rs", ("token", "sequence", "geometric"))
WEIGHTING = OnlyWhen(f"{CORRECTION}.rollout_is", ("token", "sequence"), otherwise=REJECTING)


class KLControlConfig(Section):
    """The weight of the KL divergence in the reward."""

    type: Literal["fixed", "adaptive"] = "fixed"
    """Keep the weight as it is, or move it so that the KL divergence stays near `target_kl`."""
    kl_coef: Nonnegative = 0.001
    """The weight, or its first value."""
    target_kl: Positive | None = None
    """KL divergence that `adaptive` aims at, in nats a sequence."""
    horizon: Count | None = None
    """Samples over which `adaptive` moves the weight."""


class FilterGroupsConfig(Section):
    """Dynamic sampling: groups whose responses all score the same are replaced by others."""

    enable: bool = False
    """Replace groups that give no gradient."""
    metric: Annotated[str | None, FILTERED] = None
    """What must differ in a group: `score` (or null), `seq_reward` (after the penalty for length), or a reward's component."""
    max_num_gen_batches: Annotated[Natural, FILTERED] = 0
    """Batches that may be generated to fill one; 0 for as many as an epoch has."""


class RolloutCorrectionConfig(Section):
    """Weights that make up for a rollout engine whose log-probs differ from the trainer's."""

    rollout_is: Literal["token", "sequence"] | None = None
    """Weigh each token's loss by the importance of the `token` or of its whole `sequence`; null for no weights."""
    rollout_is_threshold: Annotated[Positive, WEIGHTING] = 2.0
    """Cap of those weights."""
    rollout_rs: Literal["token", "sequence", "geometric"] | None = None
    """Leave out each `token`, or each response (by its whole `sequence`, or the `geometric` mean over it), on which the two differ most."""
    rollout_rs_threshold: Annotated[Positive | None, REJECTING] = None
    """Probability ratio above which it is left out; null for `rollout_is_threshold`."""
    rollout_rs_threshold_lower: Annotated[Positive | None, REJECTING] = None
    """Probability ratio below which it is left out; null for 1 / the upper one."""
    mismatch_kl_warning: Positive | None = 0.05
    """Metric `rollout/kl`, in nats a token, above which a step warns; null for no warning."""
    mismatch_kl_limit: Positive | None = None
    """Metric `rollout/kl`, in nats a token, above which the run ends; null for no limit."""

    @property
    def rejection_bounds(self) -> tuple[float, float]:
        """Probability ratios between which `rollout_rs` leaves nothing out."""
        high = self.rollout_rs_threshold or self.rollout_is_threshold
        return self.rollout_rs_threshold_lower or 1 / high, high


class AlgorithmConfig(Section):
    """From rewards to advantages."""

    gamma: Annotated[Share, only_estimators("gamma")] = 1.0
    """Discount of later rewards."""
    lam: Annotated[Share, only_estimators("lam")] = 1.0
    """GAE's λ: 0 trusts the critic, 1 the rewards."""
    adv_estimator: AdvEstimator = "gae"
    """How advantages are estimated: by name, or by a function of one's own, `path/to/file.py:name`."""
    norm_adv_by_std_in_grpo: Annotated[bool, only_estimators("norm_by_std")] = True
    """Divide a group's advantages by their standard deviation; false is Dr. GRPO."""
    use_kl_in_reward: bool | None = None
    """Take the KL divergence from the reward; null does it unless `actor_rollout_ref.actor.use_kl_loss`."""
    kl_penalty: KLKind = "kl"
    """Estimator of the KL divergence in the reward."""
    kl_ctrl: KLControlConfig = KLControlConfig()
    filter_groups: FilterGroupsConfig = FilterGroupsConfig()
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
