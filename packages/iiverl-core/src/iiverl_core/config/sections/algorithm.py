"""The section `algorithm`: from rewards to advantages."""

from typing import Annotated, Literal

from iiverl_core.config.sections.section import (
    Count,
    KLKind,
    Natural,
    Nonnegative,
    NotYet,
    OnlyWhen,
    Positive,
    Section,
    Share,
)

AdvEstimator = Literal[
    "gae",
    "grpo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "opo",
    "gpg",
    "grpo_passk",
]
ADV_ESTIMATOR = "algorithm.adv_estimator"


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

    enable: Annotated[bool, NotYet("dynamic sampling", (False,))] = False
    """Replace groups that give no gradient."""
    metric: str | None = None
    """What must differ within a group: `score`, `seq_reward`, or another metric of the reward."""
    max_num_gen_batches: Natural = 0
    """Batches that may be generated to fill one; 0 for any number."""


class AlgorithmConfig(Section):
    """From rewards to advantages."""

    gamma: Annotated[Share, OnlyWhen(ADV_ESTIMATOR, ("gae", "reinforce_plus_plus"))] = 1.0
    """Discount of later rewards."""
    lam: Annotated[Share, OnlyWhen(ADV_ESTIMATOR, ("gae",))] = 1.0
    """GAE's λ: 0 trusts the critic, 1 the rewards."""
    adv_estimator: Annotated[AdvEstimator, NotYet("the advantage estimator {}", ("grpo",))] = "gae"
    """How advantages are estimated."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide a group's advantages by their standard deviation; false is Dr. GRPO."""
    use_kl_in_reward: bool | None = None
    """Take the KL divergence from the reward; null does it unless `actor_rollout_ref.actor.use_kl_loss`."""
    kl_penalty: KLKind = "kl"
    """Estimator of the KL divergence in the reward."""
    kl_ctrl: KLControlConfig = KLControlConfig()
    filter_groups: FilterGroupsConfig = FilterGroupsConfig()
