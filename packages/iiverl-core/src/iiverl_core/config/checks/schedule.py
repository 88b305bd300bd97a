"""Do the lengths of run, warm-up and validation make sense together?"""

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.roles import Role

checks = Checks()

STEPS = "trainer.total_training_steps"
TEST_FREQ, BEFORE, ONLY = "trainer.test_freq", "trainer.val_before_train", "trainer.val_only"


def _check_schedule(role: Role, section: str) -> None:
    """The checks of one model's learning rate."""
    steps_key, ratio, lowest, style = (
        f"{section}.{name}"
        for name in ("lr_warmup_steps", "lr_warmup_steps_ratio", "min_lr_ratio", "warmup_style")
    )

    @checks.add("C601", "warning", steps_key, ratio, role=role)
    def one_warm_up(view: View) -> str | None:
        if view[steps_key] < 0 or view[ratio] == 0:
            return None
        return f"it is taken, and {ratio} has no effect"

    @checks.add("C602", "warning", steps_key, STEPS, role=role)
    def warm_up_ends(view: View) -> str | None:
        warm_up, steps = view[steps_key], view[STEPS]
        if steps is None or warm_up < steps:
            return None
        return f"the warm-up of {warm_up} steps is not over when the run ({STEPS}: {steps}) ends"

    @checks.add("C603", "warning", lowest, style, role=role)
    def decay_is_read(view: View) -> str | None:
        if view[lowest] is None or view[style] != "constant":
            return None
        return f"has no effect with {style}: constant"


_check_schedule("actor", "actor_rollout_ref.actor.optim")
_check_schedule("critic", "critic.optim")


@checks.add("C604", "error", ONLY, BEFORE)
def validation_is_not_ruled_out(view: View) -> str | None:
    """A run of nothing but the first validation has one."""
    if not view[ONLY] or view[BEFORE]:
        return None
    return f"with {BEFORE}: false this run would do nothing"


@checks.add("C605", "error", "data.val_files", TEST_FREQ, ONLY)
def validation_has_data(view: View) -> str | None:
    """Validation that is asked for has prompts."""
    if view["data.val_files"] is not None or (view[TEST_FREQ] < 1 and not view[ONLY]):
        return None
    asks = ONLY if view[ONLY] else f"{TEST_FREQ} ({view[TEST_FREQ]})"
    return f"{asks} asks for validation, and there are no files to validate on"


@checks.add("C606", "warning", TEST_FREQ, STEPS)
def validation_comes(view: View) -> str | None:
    """The first validation after training began comes before the end."""
    if view[STEPS] is None or view[TEST_FREQ] <= view[STEPS]:
        return None
    return f"the run ends at step {view[STEPS]}; it validates then, and not before"
