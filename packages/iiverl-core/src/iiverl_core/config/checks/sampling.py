"""Checks that the responses to a prompt differ, and that there are enough of them to compare."""

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.sections.section import ADV_ESTIMATOR
from iiverl_core.registry import ESTIMATORS

checks = Checks()

ROLLOUT = "actor_rollout_ref.rollout"
VAL = "actor_rollout_ref.rollout.val_kwargs"
N = f"{ROLLOUT}.n"
FILTER = "algorithm.filter_groups"
GEN_BATCH, BATCH = "data.gen_batch_size", "data.train_batch_size"


@checks.add("C201", "error", N, ADV_ESTIMATOR)
def _a_group_has_two(view: ConfigView) -> str | None:
    estimator = ESTIMATORS.get(view[ADV_ESTIMATOR])
    if estimator is None or view[N] >= estimator.min_group_size:
        return None
    return (
        f"{estimator.name} compares the responses to a prompt with each other; set {N} to at least "
        f"{estimator.min_group_size}"
    )


@checks.add("C202", "error", f"{ROLLOUT}.do_sample", ADV_ESTIMATOR)
def _a_baseline_differs(view: ConfigView) -> str | None:
    estimator = ESTIMATORS.get(view[ADV_ESTIMATOR])
    if estimator is None or not estimator.greedy_baseline or view[f"{ROLLOUT}.do_sample"]:
        return None
    return f"{estimator.name} compares each response with the greedy one, and without sampling both are the same; set {ROLLOUT}.do_sample to true"


@checks.add("C203", "error", N, f"{FILTER}.enable")
def _a_group_can_differ(view: ConfigView) -> str | None:
    if not view[f"{FILTER}.enable"] or view[N] > 1:
        return None
    return f"{FILTER} drops groups whose responses all score the same, as a group of one always does; set {N} to at least 2"


@checks.add("C204", "error", f"{FILTER}.metric", f"{FILTER}.enable")
def _groups_are_filtered_by_what_is_known(view: ConfigView) -> str | None:
    if not view[f"{FILTER}.enable"] or view[f"{FILTER}.metric"] != "seq_final_reward":
        return None
    return "seq_final_reward includes the KL divergence, which is not known yet when groups are filtered; use seq_reward"


@checks.add("C205", "warning", f"{FILTER}.max_num_gen_batches", f"{FILTER}.enable", GEN_BATCH, BATCH)
def _a_step_can_be_filled(view: ConfigView) -> str | None:
    """Warn only: a step that is not full is trained on anyway."""
    most, each, wanted = view[f"{FILTER}.max_num_gen_batches"], view[GEN_BATCH], view[BATCH]
    if not view[f"{FILTER}.enable"] or most == 0 or most * each >= wanted:
        return None
    return (
        f"{most} × {each} prompts ({FILTER}.max_num_gen_batches × {GEN_BATCH}) cannot fill a step of {wanted} ({BATCH}); "
        f"set it to at least {-(-wanted // each)}"
    )


@checks.add("C206", "error", f"{ROLLOUT}.do_sample", N)
def _responses_differ(view: ConfigView) -> str | None:
    if view[f"{ROLLOUT}.do_sample"] or view[N] == 1:
        return None
    return f"without sampling, the {view[N]} responses to a prompt are identical; set {ROLLOUT}.do_sample to true or {N} to 1"


@checks.add("C207", "error", f"{ROLLOUT}.temperature", f"{ROLLOUT}.do_sample")
def _training_samples(view: ConfigView) -> str | None:
    if view[f"{ROLLOUT}.temperature"] > 0 or not view[f"{ROLLOUT}.do_sample"]:
        return None
    return f"sampling needs a temperature above 0; raise it, or set {ROLLOUT}.do_sample to false"


@checks.add("C208", "warning", f"{VAL}.temperature", f"{VAL}.do_sample")
def _validation_temperature_is_read(view: ConfigView) -> str | None:
    temperature, sample = view[f"{VAL}.temperature"], view[f"{VAL}.do_sample"]
    if sample and temperature == 0:
        return f"{VAL}.do_sample is true, but at temperature 0 the most likely token is always taken; set {VAL}.temperature above 0"
    if not sample and temperature > 0 and view.is_set(f"{VAL}.temperature"):
        return f"has no effect: validation takes the most likely token unless {VAL}.do_sample is true"
    return None


@checks.add("C209", "warning", f"{VAL}.n", f"{VAL}.do_sample")
def _validation_responses_differ(view: ConfigView) -> str | None:
    if view[f"{VAL}.do_sample"] or view[f"{VAL}.n"] == 1:
        return None
    return f"the {view[f'{VAL}.n']} responses to a prompt are identical unless {VAL}.do_sample is true"
