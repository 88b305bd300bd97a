"""Do critic and reward model fit the actor that they serve?"""

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.roles import Role
from iiverl_core.config.sections.section import ADV_ESTIMATOR, BACKEND
from iiverl_core.registry import BACKENDS, ESTIMATORS

checks = Checks()

ENABLE = "critic.enable"
WARM_UP, STEPS = "trainer.critic_warmup", "trainer.total_training_steps"


@checks.add("C401", "error", ENABLE, ADV_ESTIMATOR)
def estimator_has_a_critic(view: View) -> str | None:
    """GAE, for one, is made of a critic's values."""
    estimator = ESTIMATORS.get(view[ADV_ESTIMATOR])
    if estimator is None or not estimator.needs_critic or view[ENABLE] is not False:
        return None
    default = "" if view.given(ADV_ESTIMATOR) else ", the default,"
    return f"{ADV_ESTIMATOR}: {estimator.name}{default} needs a critic's values; leave {ENABLE} out, or choose another estimator"


@checks.add("C402", "warning", WARM_UP, STEPS, role="critic")
def actor_is_trained(view: View) -> str | None:
    """The critic's warm-up leaves steps for the actor."""
    warm_up, steps = view[WARM_UP], view[STEPS]
    if steps is None or warm_up < steps:
        return None
    return f"the actor is trained from step {warm_up} on, and the run ends at step {steps} ({STEPS})"


def _check_strategy(role: Role, key: str) -> None:
    @checks.add("C403", "error", key, BACKEND, role=role)
    def one_backend(view: View) -> str | None:
        if BACKENDS[view[key]] is BACKENDS[view[BACKEND]]:
            return None
        return f"{view[key]} contradicts {BACKEND}: {view[BACKEND]}; leave this out, and it is the same"


_check_strategy("critic", "critic.strategy")
_check_strategy("reward", "reward_model.strategy")
