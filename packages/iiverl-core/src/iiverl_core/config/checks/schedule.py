"""Checks of the lengths of the run, its warm-ups and its validations."""

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.roles import Role
from iiverl_core.config.sections.section import BACKEND

checks = Checks()

STEPS = "trainer.total_training_steps"
WARM_UP = "trainer.critic_warmup"
TEST_FREQ, BEFORE, ONLY = "trainer.test_freq", "trainer.val_before_train", "trainer.val_only"


def _check_schedule(role: Role, section: str) -> None:
    norm, clip = f"{section}.clip_grad", f"{section.removesuffix('.optim')}.grad_clip"
    steps_key, ratio, lowest, absolute, style = (
        f"{section}.{name}"
        for name in (
            "lr_warmup_steps",
            "lr_warmup_steps_ratio",
            "min_lr_ratio",
            "min_lr",
            "warmup_style",
        )
    )

    @checks.add("C601", "warning", steps_key, ratio, role=role)
    def one_warm_up(view: ConfigView) -> str | None:
        if view[steps_key] < 0 or view[ratio] == 0:
            return None
        return f"takes precedence over {ratio}, which has no effect"

    @checks.add("C602", "warning", steps_key, STEPS, role=role)
    def warm_up_ends(view: ConfigView) -> str | None:
        warm_up, steps = view[steps_key], view[STEPS]
        if steps is None or warm_up < steps:
            return None
        return f"the warm-up of {warm_up} steps does not finish before the run ends ({STEPS}: {steps})"

    @checks.add("C603", "warning", lowest, absolute, style, role=role)
    def decay_is_read(view: ConfigView) -> str | None:
        if (view[lowest] is None and not view[absolute]) or view[style] != "constant":
            return None
        return f"has no effect with {style}: constant"

    @checks.add("C607", "warning", absolute, lowest, role=role)
    def lowest_rate_is_read(view: ConfigView) -> str | None:
        if not view[absolute] or view[lowest] is None:
            return None
        return f"has no effect beside {lowest}: {view[lowest]}"

    @checks.add("C608", "warning", norm, clip, BACKEND, role=role)
    def one_gradient_norm(view: ConfigView) -> str | None:
        if (
            view.config.splits_models
            or not (view.is_set(norm) and view.is_set(clip))
            or view[norm] == view[clip]
        ):
            return None
        return f"has no effect beside {clip}: {view[clip]}"


_check_schedule("actor", "actor_rollout_ref.actor.optim")
_check_schedule("critic", "critic.optim")


@checks.add("C604", "error", ONLY, BEFORE)
def _validation_is_not_ruled_out(view: ConfigView) -> str | None:
    if not view[ONLY] or view[BEFORE]:
        return None
    return f"with {BEFORE}: false, the run would do nothing; set {BEFORE} to true"


@checks.add("C605", "error", "data.val_files", TEST_FREQ, ONLY)
def _validation_has_data(view: ConfigView) -> str | None:
    if view["data.val_files"] is not None or (view[TEST_FREQ] < 1 and not view[ONLY]):
        return None
    asks = ONLY if view[ONLY] else f"{TEST_FREQ} ({view[TEST_FREQ]})"
    return f"{asks} asks for validation, but there are no files; set them, or turn validation off"


@checks.add("C606", "warning", TEST_FREQ, STEPS)
def _validation_comes(view: ConfigView) -> str | None:
    if view[STEPS] is None or view[TEST_FREQ] <= view[STEPS]:
        return None
    return f"the run ends at step {view[STEPS]} and validates only then"


@checks.add("C402", "warning", WARM_UP, STEPS, role="critic")
def _actor_is_trained(view: ConfigView) -> str | None:
    warm_up, steps = view[WARM_UP], view[STEPS]
    if steps is None or warm_up < steps:
        return None
    return f"the actor is first trained at step {warm_up}, but the run ends at step {steps} ({STEPS})"
