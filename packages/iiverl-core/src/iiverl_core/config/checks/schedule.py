"""Do the lengths of run, warm-up and validation make sense together?"""

from iiverl_core.config.checks.view import Checks, View

checks = Checks()

OPTIM = "actor_rollout_ref.actor.optim"
STEPS = "trainer.total_training_steps"
TEST_FREQ, BEFORE, ONLY = "trainer.test_freq", "trainer.val_before_train", "trainer.val_only"


@checks.add("warning", f"{OPTIM}.lr_warmup_steps", f"{OPTIM}.lr_warmup_steps_ratio")
def one_warm_up(view: View) -> str | None:
    """The warm-up is given in steps or as a share."""
    optim = view.config.actor_rollout_ref.actor.optim
    if optim.lr_warmup_steps < 0 or optim.lr_warmup_steps_ratio == 0:
        return None
    return f"it is taken, and {OPTIM}.lr_warmup_steps_ratio has no effect"


@checks.add("warning", f"{OPTIM}.lr_warmup_steps", STEPS)
def warm_up_ends(view: View) -> str | None:
    """The run is longer than the warm-up."""
    warm_up, steps = view[f"{OPTIM}.lr_warmup_steps"], view[STEPS]
    if steps is None or warm_up < steps:
        return None
    return f"the warm-up of {warm_up} steps is not over when the run ({STEPS}: {steps}) ends"


@checks.add("warning", f"{OPTIM}.min_lr_ratio", f"{OPTIM}.warmup_style")
def decay_is_read(view: View) -> str | None:
    """Only a schedule that falls has a lowest rate."""
    optim = view.config.actor_rollout_ref.actor.optim
    if optim.min_lr_ratio is None or optim.warmup_style != "constant":
        return None
    return f"has no effect with {OPTIM}.warmup_style: constant"


@checks.add("error", ONLY, BEFORE)
def validation_is_not_ruled_out(view: View) -> str | None:
    """A run of nothing but the first validation has one."""
    if not view[ONLY] or view[BEFORE]:
        return None
    return f"with {BEFORE}: false this run would do nothing"


@checks.add("error", "data.val_files", TEST_FREQ, ONLY)
def validation_has_data(view: View) -> str | None:
    """Validation that is asked for has prompts."""
    if view["data.val_files"] is not None or (view[TEST_FREQ] < 1 and not view[ONLY]):
        return None
    asks = ONLY if view[ONLY] else f"{TEST_FREQ} ({view[TEST_FREQ]})"
    return f"{asks} asks for validation, and there are no files to validate on"


@checks.add("warning", TEST_FREQ, STEPS)
def validation_comes(view: View) -> str | None:
    """The first validation after training began comes before the end."""
    if view[STEPS] is None or view[TEST_FREQ] <= view[STEPS]:
        return None
    return f"the run ends at step {view[STEPS]}; it validates then, and not before"
