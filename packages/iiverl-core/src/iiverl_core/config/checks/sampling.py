"""Do the responses to a prompt differ, in training and in validation?"""

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.sections.algorithm import ADV_ESTIMATOR

checks = Checks()

ROLLOUT = "actor_rollout_ref.rollout"
VAL = "actor_rollout_ref.rollout.val_kwargs"
N = f"{ROLLOUT}.n"


@checks.add("error", N, ADV_ESTIMATOR)
def a_group_has_two(view: View) -> str | None:
    """GRPO compares the responses to a prompt with each other."""
    if view[ADV_ESTIMATOR] != "grpo" or view[N] > 1:
        return None
    return f"grpo compares the responses to a prompt with each other; {N} has to be 2 or more"


@checks.add("error", f"{ROLLOUT}.do_sample", N)
def responses_differ(view: View) -> str | None:
    """More than one response is sampled, not computed again."""
    if view[f"{ROLLOUT}.do_sample"] or view[N] == 1:
        return None
    return f"without sampling, the {view[N]} responses to a prompt are all the same"


@checks.add("error", f"{ROLLOUT}.temperature", f"{ROLLOUT}.do_sample")
def training_samples(view: View) -> str | None:
    """Sampling needs a temperature."""
    if view[f"{ROLLOUT}.temperature"] > 0 or not view[f"{ROLLOUT}.do_sample"]:
        return None
    return "sampling needs a temperature above 0; set it, or do_sample: false"


@checks.add("warning", f"{VAL}.temperature", f"{VAL}.do_sample")
def validation_temperature_is_read(view: View) -> str | None:
    """A temperature of validation is used only where validation samples."""
    temperature, sample = view[f"{VAL}.temperature"], view[f"{VAL}.do_sample"]
    if sample and temperature == 0:
        return f"{VAL}.do_sample asks for sampling, and at temperature 0 the likeliest token is always taken"
    if not sample and temperature > 0 and view.given(f"{VAL}.temperature"):
        return f"has no effect: validation takes the likeliest token unless {VAL}.do_sample is true"
    return None


@checks.add("warning", f"{VAL}.n", f"{VAL}.do_sample")
def validation_responses_differ(view: View) -> str | None:
    """More than one response in validation is sampled."""
    if view[f"{VAL}.do_sample"] or view[f"{VAL}.n"] == 1:
        return None
    return f"the {view[f'{VAL}.n']} responses to a prompt are all the same unless {VAL}.do_sample is true"
