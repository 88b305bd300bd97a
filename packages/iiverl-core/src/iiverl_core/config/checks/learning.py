"""Checks of the objective: estimator, KL divergence, policy loss, aggregation."""

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.algorithm import CORRECTION
from iiverl_core.config.sections.section import ADV_ESTIMATOR, LOSS_MODE
from iiverl_core.config.vllm import built_for_cpu
from iiverl_core.registry import AGGREGATIONS, ENGINES, ESTIMATORS, POLICY_LOSSES

checks = Checks()

ACTOR = "actor_rollout_ref.actor"
KL_LOSS = f"{ACTOR}.use_kl_loss"
IN_REWARD = "algorithm.use_kl_in_reward"
CONTROL = "algorithm.kl_ctrl"
AGGREGATION = f"{ACTOR}.loss_agg_mode"
REJECTION = tuple(
    f"{CORRECTION}.{name}" for name in ("rollout_rs_threshold_lower", "rollout_rs_threshold", "rollout_rs")
)
BYPASS = f"{CORRECTION}.bypass_old_log_prob"
ROLLOUT = "actor_rollout_ref.rollout"
VLLM_KWARGS = f"{ROLLOUT}.engine_kwargs.vllm"
DO_SAMPLE = f"{ROLLOUT}.do_sample"
ENABLE_CRITIC = "critic.enable"
COVARIANCES = f"{ACTOR}.policy_loss.clip_cov_lb", f"{ACTOR}.policy_loss.clip_cov_ub"


@checks.add(
    "C301", "error", f"{CONTROL}.type", f"{CONTROL}.target_kl", f"{CONTROL}.horizon", f"{CONTROL}.kl_coef"
)
def _adaptive_control_has_an_aim(view: ConfigView) -> str | None:
    control = view.config.algorithm.kl_ctrl
    if control.type != "adaptive":
        return None
    missing = [name for name in ("target_kl", "horizon") if getattr(control, name) is None]
    if missing:
        return f"adaptive needs {' and '.join(f'{CONTROL}.{name}' for name in missing)}; set {'it' if len(missing) == 1 else 'both'}"
    return f"adaptive scales {CONTROL}.kl_coef, so it must not start at 0" if control.kl_coef == 0 else None


@checks.add("C302", "warning", f"{CONTROL}.target_kl", f"{CONTROL}.horizon", f"{CONTROL}.type")
def _aim_is_read(view: ConfigView) -> str | None:
    control = view.config.algorithm.kl_ctrl
    if control.type == "adaptive" or (control.target_kl is None and control.horizon is None):
        return None
    return f"has no effect: only {CONTROL}.type: adaptive has a target"


@checks.add(
    "C303", "warning", f"{CONTROL}.kl_coef", f"{CONTROL}.type", "algorithm.kl_penalty", IN_REWARD, KL_LOSS
)
def _reward_kl_is_read(view: ConfigView) -> str | None:
    if view.config.kl_in_reward or not view.is_set(
        f"{CONTROL}.kl_coef", f"{CONTROL}.type", "algorithm.kl_penalty"
    ):
        return None
    if view[IN_REWARD] is None:
        return f"has no effect: with {KL_LOSS}, the KL divergence is part of the loss, not of the reward"
    return f"has no effect: {IN_REWARD} is false"


@checks.add("C304", "warning", f"{ACTOR}.kl_loss_coef", f"{ACTOR}.kl_loss_type", KL_LOSS)
def _kl_loss_is_read(view: ConfigView) -> str | None:
    if view[KL_LOSS] or not view.is_set(f"{ACTOR}.kl_loss_coef", f"{ACTOR}.kl_loss_type"):
        return None
    return f"has no effect without {KL_LOSS}: true"


@checks.add("C305", "warning", IN_REWARD, KL_LOSS, f"{CONTROL}.kl_coef", f"{ACTOR}.kl_loss_coef")
def _kl_counts_once(view: ConfigView) -> str | None:
    weights = view[f"{CONTROL}.kl_coef"], view[f"{ACTOR}.kl_loss_coef"]
    if not (view.config.kl_in_reward and view[KL_LOSS] and all(weights)):
        return None
    return f"the KL divergence counts twice: in the reward and, with {KL_LOSS}, in the loss"


@checks.add("C306", "warning", IN_REWARD, KL_LOSS, f"{CONTROL}.kl_coef", ADV_ESTIMATOR)
def _kl_in_reward_is_meant(view: ConfigView) -> str | None:
    """Warn only if the file names an estimator without a critic: these files are often written for later verl."""
    asked = view.is_set(IN_REWARD, KL_LOSS, f"{CONTROL}.kl_coef")
    estimator = ESTIMATORS.get(view[ADV_ESTIMATOR])
    if asked or (estimator and estimator.needs_critic) or not view.config.kl_in_reward:
        return None
    return (
        f"{IN_REWARD} is not set, so the reward includes a KL penalty, as in II-VERL but not in later verl; "
        "set it to true or false"
    )


REFERENCE = tuple(path for path in keys() if path.startswith("actor_rollout_ref.ref."))


@checks.add("C307", "warning", *REFERENCE, KL_LOSS, IN_REWARD, f"{CONTROL}.kl_coef")
def _reference_is_read(view: ConfigView) -> str | None:
    if view.config.needs_reference or not view.is_set(*REFERENCE):
        return None
    return f"has no effect: without a KL divergence ({KL_LOSS}, {IN_REWARD}), there is no reference model"


@checks.add("C308", "warning", f"{ACTOR}.loss_scale_factor", f"{ACTOR}.loss_agg_mode")
def _scale_is_read(view: ConfigView) -> str | None:
    actor = view.config.actor_rollout_ref.actor
    if actor.loss_scale_factor is None or "max_tokens_norm" in AGGREGATIONS[actor.loss_agg_mode].reads:
        return None
    return f"has no effect with {ACTOR}.loss_agg_mode: {actor.loss_agg_mode}"


@checks.add("C309", "warning", AGGREGATION, LOSS_MODE)
def _aggregation_is_read(view: ConfigView) -> str | None:
    loss = POLICY_LOSSES.get(view[LOSS_MODE])
    if loss is None or loss.loss_agg_mode in (None, view[AGGREGATION]) or not view.is_set(AGGREGATION):
        return None
    return f"has no effect: {LOSS_MODE}: {loss.name} always aggregates by {loss.loss_agg_mode}"


@checks.add("C310", "error", *COVARIANCES, LOSS_MODE)
def _covariances_are_a_range(view: ConfigView) -> str | None:
    low, high = (view[key] for key in COVARIANCES)
    loss = POLICY_LOSSES.get(view[LOSS_MODE])
    if loss is None or "clip_cov_lb" not in loss.reads or low < high:
        return None
    return f"the range from {COVARIANCES[0]} ({low}) to {COVARIANCES[1]} ({high}) is empty; the first has to be below the second"


@checks.add("C311", "error", f"{ACTOR}.tis_imp_ratio_cap")
def _importance_cap_moved(view: ConfigView) -> str | None:
    cap = view[f"{ACTOR}.tis_imp_ratio_cap"]
    if cap <= 0:
        return None
    return (
        "not supported; remove it, and set "
        f"algorithm.rollout_correction: {{rollout_is: token, rollout_is_threshold: {cap:g}}}"
    )


@checks.add("C312", "error", *REJECTION, f"{CORRECTION}.rollout_is_threshold")
def _rejection_keeps_something(view: ConfigView) -> str | None:
    low, high = view.config.algorithm.rollout_correction.rejection_bounds
    if view[f"{CORRECTION}.rollout_rs"] is None or low < high:
        return None
    return (
        f"every token would be rejected: the lower threshold {low:g} (rollout_rs_threshold_lower, or 1 / "
        f"rollout_rs_threshold) is not below the upper one, {high:g} (rollout_rs_threshold, or rollout_is_threshold)"
    )


@checks.add("C313", "warning", f"{CORRECTION}.rollout_is", BYPASS, LOSS_MODE)
def _importance_weights_are_read(view: ConfigView) -> str | None:
    loss = POLICY_LOSSES.get(view[LOSS_MODE])
    if not view[BYPASS] or view[f"{CORRECTION}.rollout_is"] is None or (loss and not loss.uses_ratio):
        return None
    return (
        f"has no effect with {BYPASS}: the ratio in {LOSS_MODE}: {view[LOSS_MODE]} already is against the policy that "
        "sampled, so weights would count the mismatch twice"
    )


@checks.add("C316", "warning", BYPASS, f"{CORRECTION}.rollout_is", "trainer.max_staleness", DO_SAMPLE)
def _old_log_probs_are_of_the_policy_that_sampled(view: ConfigView) -> str | None:
    corrected = view[BYPASS] or view[f"{CORRECTION}.rollout_is"] is not None
    if corrected or not view["trainer.max_staleness"] or not view[DO_SAMPLE]:
        return None
    return (
        "the responses of older weights are trained on as if the newest had sampled them: with trainer.max_staleness, leave "
        "it out, or set it to true"
    )


@checks.add("C314", "error", BYPASS, f"{ROLLOUT}.do_sample")
def _bypass_has_log_probs(view: ConfigView) -> str | None:
    if not view[BYPASS] or view[f"{ROLLOUT}.do_sample"]:
        return None
    return f"needs sampled responses: without {ROLLOUT}.do_sample, the engine has no log-probs to use as old ones"


@checks.add(
    "C315", "warning", f"{ROLLOUT}.top_p", f"{ROLLOUT}.top_k", f"{ROLLOUT}.name", VLLM_KWARGS, DO_SAMPLE
)
def _trainer_knows_what_was_kept(view: ConfigView) -> str | None:
    top_k, engine = view[f"{ROLLOUT}.top_k"], view[f"{ROLLOUT}.name"]
    cut = view[DO_SAMPLE] and (view[f"{ROLLOUT}.top_p"] < 1 or top_k > 0)
    if not cut or ENGINES[engine].returns_kept:
        return None
    asked = view[VLLM_KWARGS].get("return_sampling_mask", True) if engine == "vllm" else False
    if asked and not built_for_cpu():
        return None
    reason = {
        (True, "vllm"): "; vLLM reports them on GPUs only",
        (False, "vllm"): f"; leave {VLLM_KWARGS}.return_sampling_mask out",
    }
    return (
        f"the trainer does not know which tokens the engine {engine} samples from, and computes over all of them, so "
        f"rollout/ratio is below 1{reason.get((bool(asked), engine), '')}"
    )


@checks.add("C401", "error", ENABLE_CRITIC, ADV_ESTIMATOR)
def _estimator_has_its_critic(view: ConfigView) -> str | None:
    estimator = ESTIMATORS.get(view[ADV_ESTIMATOR])
    if estimator is None or not estimator.needs_critic or view[ENABLE_CRITIC] is not False:
        return None
    default = "" if view.is_set(ADV_ESTIMATOR) else " (the default)"
    return f"{ADV_ESTIMATOR}: {estimator.name}{default} needs a critic; leave {ENABLE_CRITIC} out, or choose another estimator"
