"""Do the parts of the objective fit together: KL divergence, clipping, aggregation, and what scores a response?"""

import os

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.schema import keys

checks = Checks()

ACTOR = "actor_rollout_ref.actor"
KL_LOSS = f"{ACTOR}.use_kl_loss"
IN_REWARD = "algorithm.use_kl_in_reward"
CONTROL = "algorithm.kl_ctrl"
URL = "reward_api.api_url"
FUNCTION = "custom_reward_function.path"


@checks.add("error", f"{CONTROL}.type", f"{CONTROL}.target_kl", f"{CONTROL}.horizon", f"{CONTROL}.kl_coef")
def adaptive_control_has_an_aim(view: View) -> str | None:
    """An adaptive KL weight needs an aim, a horizon and something to multiply."""
    control = view.config.algorithm.kl_ctrl
    if control.type != "adaptive":
        return None
    missing = [name for name in ("target_kl", "horizon") if getattr(control, name) is None]
    if missing:
        return f"adaptive needs {' and '.join(f'{CONTROL}.{name}' for name in missing)}"
    return f"adaptive multiplies {CONTROL}.kl_coef, and 0 stays 0" if control.kl_coef == 0 else None


@checks.add("warning", f"{CONTROL}.target_kl", f"{CONTROL}.horizon", f"{CONTROL}.type")
def aim_is_read(view: View) -> str | None:
    """A fixed KL weight has no aim."""
    control = view.config.algorithm.kl_ctrl
    if control.type == "adaptive" or (control.target_kl is None and control.horizon is None):
        return None
    return f"has no effect: only {CONTROL}.type: adaptive aims at a KL divergence"


@checks.add("warning", f"{CONTROL}.kl_coef", f"{CONTROL}.type", "algorithm.kl_penalty", IN_REWARD, KL_LOSS)
def reward_kl_is_read(view: View) -> str | None:
    """What weighs the KL divergence in the reward is set only where it goes there."""
    if view.config.kl_in_reward or not view.given(
        f"{CONTROL}.kl_coef", f"{CONTROL}.type", "algorithm.kl_penalty"
    ):
        return None
    if view[IN_REWARD] is None:
        return f"has no effect: with {KL_LOSS} the KL divergence is part of the loss, not of the reward"
    return f"has no effect: {IN_REWARD} is false"


@checks.add("warning", f"{ACTOR}.kl_loss_coef", f"{ACTOR}.kl_loss_type", KL_LOSS)
def kl_loss_is_read(view: View) -> str | None:
    """What weighs the KL loss is set only where there is one."""
    if view[KL_LOSS] or not view.given(f"{ACTOR}.kl_loss_coef", f"{ACTOR}.kl_loss_type"):
        return None
    return f"has no effect without {KL_LOSS}: true"


@checks.add("warning", IN_REWARD, KL_LOSS, f"{CONTROL}.kl_coef", f"{ACTOR}.kl_loss_coef")
def kl_counts_once(view: View) -> str | None:
    """The KL divergence is in the loss or in the reward."""
    weights = view[f"{CONTROL}.kl_coef"], view[f"{ACTOR}.kl_loss_coef"]
    if not (view.config.kl_in_reward and view[KL_LOSS] and all(weights)):
        return None
    return f"the KL divergence counts twice: in the reward, and by {KL_LOSS} in the loss"


@checks.add("warning", IN_REWARD, KL_LOSS, f"{CONTROL}.kl_coef", "algorithm.adv_estimator")
def kl_in_reward_is_meant(view: View) -> str | None:
    """Files written for later verl expect no KL where none is asked for."""
    asked = view.given(IN_REWARD, KL_LOSS, f"{CONTROL}.kl_coef")
    if asked or view["algorithm.adv_estimator"] != "grpo" or not view.config.kl_in_reward:
        return None
    return (
        f"{IN_REWARD} is not set, so a KL penalty is part of the reward, as in II-VERL; later verl has none. "
        "Set it to true or false"
    )


REFERENCE = tuple(path for path in keys() if path.startswith("actor_rollout_ref.ref."))


@checks.add("warning", *REFERENCE, KL_LOSS, IN_REWARD, f"{CONTROL}.kl_coef")
def reference_is_read(view: View) -> str | None:
    """Settings of the reference are there only where something reads it."""
    if view.config.needs_reference or not view.given(*REFERENCE):
        return None
    return f"has no effect: without a KL divergence there is no reference ({KL_LOSS}, {IN_REWARD})"


@checks.add("warning", f"{ACTOR}.loss_scale_factor", f"{ACTOR}.loss_agg_mode")
def scale_is_read(view: View) -> str | None:
    """Only one way of aggregating has a divisor."""
    actor = view.config.actor_rollout_ref.actor
    if actor.loss_scale_factor is None or actor.loss_agg_mode == "seq-mean-token-sum-norm":
        return None
    return f"has no effect with {ACTOR}.loss_agg_mode: {actor.loss_agg_mode}"


@checks.add("error", URL, "reward_api.enable")
def server_has_an_address(view: View) -> str | None:
    """A reward server is named by URLs."""
    urls = view[URL]
    if not view["reward_api.enable"]:
        return None
    if urls is None:
        return f"a reward server needs its address, {URL}, as in http://localhost:8000"
    wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
    return f"an address begins with http:// or https://, and {wrong[0]!r} does not" if wrong else None


@checks.add("here", "reward_api.token_env", "reward_api.enable")
def token_is_there(view: View) -> str | None:
    """The variable that holds the server's token is set."""
    name = view["reward_api.token_env"]
    if not view["reward_api.enable"] or name is None or os.environ.get(name):
        return None
    return f"the environment variable {name} is not set; it holds the reward server's token"


@checks.add("error", FUNCTION, "reward_api.enable")
def one_scorer(view: View) -> str | None:
    """Either a function or a server scores."""
    if view[FUNCTION] is None or not view["reward_api.enable"]:
        return None
    return (
        "a function and a server (reward_api.enable) cannot both score the responses; leave one of them out"
    )


@checks.add("warning", "custom_reward_function.name", "custom_reward_function.reward_kwargs", FUNCTION)
def function_is_read(view: View) -> str | None:
    """A function is named only where there is a file to find it in."""
    if view[FUNCTION] or not view.given(
        "custom_reward_function.name", "custom_reward_function.reward_kwargs"
    ):
        return None
    return f"has no effect without {FUNCTION}"
