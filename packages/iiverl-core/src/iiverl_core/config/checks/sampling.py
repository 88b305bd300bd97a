"""Do the responses to a prompt differ, in training and in validation, and are there enough to compare?"""

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.sections.section import ADV_ESTIMATOR
from iiverl_core.registry import ESTIMATORS

checks = Checks()

ROLLOUT = "actor_rollout_ref.rollout"
VAL = "actor_rollout_ref.rollout.val_kwargs"
N = f"{ROLLOUT}.n"
FILTER = "algorithm.filter_groups"
GEN_BATCH, BATCH = "data.gen_batch_size", "data.train_batch_size"


@checks.add("C201", "error", N, ADV_ESTIMATOR)
def a_group_has_two(view: View) -> str | None:
    """Most estimators compare the responses to a prompt with each other."""
    estimator = ESTIMATORS.get(view[ADV_ESTIMATOR])
    if estimator is None or view[N] >= estimator.min_group_size:
        return None
    return (
        f"{estimator.name} compares the responses to a prompt with each other; {N} has to be "
        f"{estimator.min_group_size} or more"
    )


@checks.add("C202", "error", f"{ROLLOUT}.do_sample", ADV_ESTIMATOR)
def a_baseline_differs(view: View) -> str | None:
    """Some estimators compare a sampled response with the greedy one."""
    estimator = ESTIMATORS.get(view[ADV_ESTIMATOR])
    if estimator is None or not estimator.greedy_baseline or view[f"{ROLLOUT}.do_sample"]:
        return None
    return f"{estimator.name} compares each response with the greedy one; without {ROLLOUT}.do_sample: true, each is that one"


@checks.add("C203", "error", N, f"{FILTER}.enable")
def a_group_can_differ(view: View) -> str | None:
    """A group of one has nothing that differs."""
    if not view[f"{FILTER}.enable"] or view[N] > 1:
        return None
    return f"{FILTER} drops groups that all score the same, as a group of one does; {N} has to be 2 or more"


@checks.add("C204", "error", f"{FILTER}.metric", f"{FILTER}.enable")
def groups_are_filtered_by_what_is_known(view: View) -> str | None:
    """Groups are filtered as soon as they are scored."""
    if not view[f"{FILTER}.enable"] or view[f"{FILTER}.metric"] != "seq_final_reward":
        return None
    return "groups are filtered before the KL divergence is known; seq_reward is the reward without it"


@checks.add("C205", "warning", f"{FILTER}.max_num_gen_batches", f"{FILTER}.enable", GEN_BATCH, BATCH)
def a_step_can_be_filled(view: View) -> str | None:
    """As many prompts may be answered as a step holds; a step that is not full is trained on all the same."""
    most, each, wanted = view[f"{FILTER}.max_num_gen_batches"], view[GEN_BATCH], view[BATCH]
    if not view[f"{FILTER}.enable"] or most == 0 or most * each >= wanted:
        return None
    return (
        f"{most} × {each} prompts ({FILTER}.max_num_gen_batches × {GEN_BATCH}) can never fill a step of {wanted} "
        f"({BATCH})"
    )


@checks.add("C206", "error", f"{ROLLOUT}.do_sample", N)
def responses_differ(view: View) -> str | None:
    """More than one response is sampled, not computed again."""
    if view[f"{ROLLOUT}.do_sample"] or view[N] == 1:
        return None
    return f"without sampling, the {view[N]} responses to a prompt are all the same"


@checks.add("C207", "error", f"{ROLLOUT}.temperature", f"{ROLLOUT}.do_sample")
def training_samples(view: View) -> str | None:
    """Sampling needs a temperature."""
    if view[f"{ROLLOUT}.temperature"] > 0 or not view[f"{ROLLOUT}.do_sample"]:
        return None
    return "sampling needs a temperature above 0; set it, or do_sample: false"


@checks.add("C208", "warning", f"{VAL}.temperature", f"{VAL}.do_sample")
def validation_temperature_is_read(view: View) -> str | None:
    """A temperature of validation is used only where validation samples."""
    temperature, sample = view[f"{VAL}.temperature"], view[f"{VAL}.do_sample"]
    if sample and temperature == 0:
        return f"{VAL}.do_sample asks for sampling, and at temperature 0 the likeliest token is always taken"
    if not sample and temperature > 0 and view.given(f"{VAL}.temperature"):
        return f"has no effect: validation takes the likeliest token unless {VAL}.do_sample is true"
    return None


@checks.add("C209", "warning", f"{VAL}.n", f"{VAL}.do_sample")
def validation_responses_differ(view: View) -> str | None:
    """More than one response in validation is sampled."""
    if view[f"{VAL}.do_sample"] or view[f"{VAL}.n"] == 1:
        return None
    return f"the {view[f'{VAL}.n']} responses to a prompt are all the same unless {VAL}.do_sample is true"
