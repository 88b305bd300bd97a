"""Do the parts of the objective fit together: KL divergence, policy loss, aggregation?"""

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.algorithm import CORRECTION
from iiverl_core.config.sections.section import ADV_ESTIMATOR, LOSS_MODE
from iiverl_core.registry import AGGREGATIONS, POLICY_LOSSES

checks = Checks()

ACTOR = "actor_rollout_ref.actor"
KL_LOSS = f"{ACTOR}.use_kl_loss"
IN_REWARD = "algorithm.use_kl_in_reward"
CONTROL = "algorithm.kl_ctrl"
AGGREGATION = f"{ACTOR}.loss_agg_mode"
REJECTION = tuple(
    f"{CORRECTION}.{name}" for name in ("rollout_rs_threshold_lower", "rollout_rs_threshold", "rollout_rs")
)
COVARIANCES = f"{ACTOR}.policy_loss.clip_cov_lb", f"{ACTOR}.policy_loss.clip_cov_ub"


@checks.add(
    "C301", "error", f"{CONTROL}.type", f"{CONTROL}.target_kl", f"{CONTROL}.horizon", f"{CONTROL}.kl_coef"
)
def adaptive_control_has_an_aim(view: View) -> str | None:
    """An adaptive KL weight needs an aim, a horizon and something to multiply."""
    control = view.config.algorithm.kl_ctrl
    if control.type != "adaptive":
        return None
    missing = [name for name in ("target_kl", "horizon") if getattr(control, name) is None]
    if missing:
        return f"adaptive needs {' and '.join(f'{CONTROL}.{name}' for name in missing)}"
    return f"adaptive multiplies {CONTROL}.kl_coef, and 0 stays 0" if control.kl_coef == 0 else None


@checks.add("C302", "warning", f"{CONTROL}.target_kl", f"{CONTROL}.horizon", f"{CONTROL}.type")
def aim_is_read(view: View) -> str | None:
    """A fixed KL weight has no aim."""
    control = view.config.algorithm.kl_ctrl
    if control.type == "adaptive" or (control.target_kl is None and control.horizon is None):
        return None
    return f"has no effect: only {CONTROL}.type: adaptive aims at a KL divergence"


@checks.add(
    "C303", "warning", f"{CONTROL}.kl_coef", f"{CONTROL}.type", "algorithm.kl_penalty", IN_REWARD, KL_LOSS
)
def reward_kl_is_read(view: View) -> str | None:
    """What weighs the KL divergence in the reward is set only where it goes there."""
    if view.config.kl_in_reward or not view.given(
        f"{CONTROL}.kl_coef", f"{CONTROL}.type", "algorithm.kl_penalty"
    ):
        return None
    if view[IN_REWARD] is None:
        return f"has no effect: with {KL_LOSS} the KL divergence is part of the loss, not of the reward"
    return f"has no effect: {IN_REWARD} is false"


@checks.add("C304", "warning", f"{ACTOR}.kl_loss_coef", f"{ACTOR}.kl_loss_type", KL_LOSS)
def kl_loss_is_read(view: View) -> str | None:
    """What weighs the KL loss is set only where there is one."""
    if view[KL_LOSS] or not view.given(f"{ACTOR}.kl_loss_coef", f"{ACTOR}.kl_loss_type"):
        return None
    return f"has no effect without {KL_LOSS}: true"


@checks.add("C305", "warning", IN_REWARD, KL_LOSS, f"{CONTROL}.kl_coef", f"{ACTOR}.kl_loss_coef")
def kl_counts_once(view: View) -> str | None:
    """The KL divergence is in the loss or in the reward."""
    weights = view[f"{CONTROL}.kl_coef"], view[f"{ACTOR}.kl_loss_coef"]
    if not (view.config.kl_in_reward and view[KL_LOSS] and all(weights)):
        return None
    return f"the KL divergence counts twice: in the reward, and by {KL_LOSS} in the loss"


@checks.add("C306", "warning", IN_REWARD, KL_LOSS, f"{CONTROL}.kl_coef", ADV_ESTIMATOR)
def kl_in_reward_is_meant(view: View) -> str | None:
    """Files written for later verl expect no KL where none is asked for; the default, `gae`, says nothing about that."""
    asked = view.given(IN_REWARD, KL_LOSS, f"{CONTROL}.kl_coef")
    if asked or view[ADV_ESTIMATOR] == "gae" or not view.config.kl_in_reward:
        return None
    return (
        f"{IN_REWARD} is not set, so a KL penalty is part of the reward, as in II-VERL; later verl has none. "
        "Set it to true or false"
    )


REFERENCE = tuple(path for path in keys() if path.startswith("actor_rollout_ref.ref."))


@checks.add("C307", "warning", *REFERENCE, KL_LOSS, IN_REWARD, f"{CONTROL}.kl_coef")
def reference_is_read(view: View) -> str | None:
    """Settings of the reference are there only where something reads it."""
    if view.config.needs_reference or not view.given(*REFERENCE):
        return None
    return f"has no effect: without a KL divergence there is no reference ({KL_LOSS}, {IN_REWARD})"


@checks.add("C308", "warning", f"{ACTOR}.loss_scale_factor", f"{ACTOR}.loss_agg_mode")
def scale_is_read(view: View) -> str | None:
    """Only one way of aggregating has a divisor."""
    actor = view.config.actor_rollout_ref.actor
    if actor.loss_scale_factor is None or "max_tokens_norm" in AGGREGATIONS[actor.loss_agg_mode].reads:
        return None
    return f"has no effect with {ACTOR}.loss_agg_mode: {actor.loss_agg_mode}"


@checks.add("C309", "warning", AGGREGATION, LOSS_MODE)
def aggregation_is_read(view: View) -> str | None:
    """Some policy losses bring their own way of aggregating."""
    loss = POLICY_LOSSES.get(view[LOSS_MODE])
    if loss is None or loss.loss_agg_mode in (None, view[AGGREGATION]) or not view.given(AGGREGATION):
        return None
    return f"has no effect: {LOSS_MODE}: {loss.name} is defined with {loss.loss_agg_mode}"


@checks.add("C310", "error", *COVARIANCES, LOSS_MODE)
def covariances_are_a_range(view: View) -> str | None:
    """Clip-Cov has tokens to choose from."""
    low, high = (view[key] for key in COVARIANCES)
    loss = POLICY_LOSSES.get(view[LOSS_MODE])
    if loss is None or "clip_cov_lb" not in loss.reads or low < high:
        return None
    return f"there is no covariance above {COVARIANCES[0]} ({low}) and below {COVARIANCES[1]} ({high})"


@checks.add("C311", "error", f"{ACTOR}.tis_imp_ratio_cap")
def importance_cap_moved(view: View) -> str | None:
    """Importance weights are asked for where they are read."""
    cap = view[f"{ACTOR}.tis_imp_ratio_cap"]
    if cap <= 0:
        return None
    return (
        "importance weights are asked for elsewhere; leave this out, and set "
        f"algorithm.rollout_correction: {{rollout_is: token, rollout_is_threshold: {cap:g}}}"
    )


@checks.add("C312", "error", *REJECTION, f"{CORRECTION}.rollout_is_threshold")
def rejection_keeps_something(view: View) -> str | None:
    """Some probability ratio is neither too low nor too high."""
    low, high = view.config.algorithm.rollout_correction.rejection_bounds
    if view[f"{CORRECTION}.rollout_rs"] is None or low < high:
        return None
    return (
        f"no probability ratio is between {low:g} (rollout_rs_threshold_lower, or 1 / rollout_rs_threshold) and "
        f"{high:g} (rollout_rs_threshold, or rollout_is_threshold); the lower one has to be below the upper one"
    )
