"""Checks of models that read images, and of keys about images."""

import importlib.util

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.model_facts import find_config, reads_images
from iiverl_core.config.roles import ROLE_KEYS
from iiverl_core.installation import install_command

checks = Checks()

PATH = f"{ROLE_KEYS['actor'].model}.path"
RANK = f"{ROLE_KEYS['actor'].model}.lora_rank"
STRATEGY = "actor_rollout_ref.actor.strategy"
FREEZE = "actor_rollout_ref.actor.freeze_vision_tower"
SPLIT = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
REFERENCE_SPLIT = "actor_rollout_ref.ref.ulysses_sequence_parallel_size"
REWARD = "reward_model.enable"
KEY, LEAST, MOST = "data.image_key", "data.min_pixels", "data.max_pixels"
PACKAGES = ("PIL", "torchvision")


def _reads_images(view: ConfigView) -> bool:
    return reads_images(view[PATH])


@checks.add("C271", "unsupported", PATH, STRATEGY)
def _the_backend_trains_it(view: ConfigView) -> str | None:
    if not _reads_images(view) or not view.config.splits_models:
        return None
    return "the actor reads images, and Megatron does not train such models yet; use FSDP"


@checks.add("C272", "unsupported", f"{ROLE_KEYS['critic'].model}.path", PATH, role="critic")
def _there_is_no_critic(view: ConfigView) -> str | None:
    path = f"{ROLE_KEYS['critic'].model}.path"
    if not (_reads_images(view) or reads_images(view[path])):
        return None
    return "critics do not read images yet; use an estimator without a critic, such as grpo"


@checks.add("C273", "unsupported", REWARD, PATH)
def _no_model_scores(view: ConfigView) -> str | None:
    if not view[REWARD] or not _reads_images(view):
        return None
    return "the actor reads images, and reward models do not yet; use a reward function or a reward server"


@checks.add("C274", "unsupported", SPLIT, REFERENCE_SPLIT, PATH)
def _sequences_are_whole(view: ConfigView) -> str | None:
    if max(view[SPLIT], view[REFERENCE_SPLIT]) == 1 or not _reads_images(view) or view.config.splits_models:
        return None
    return "the actor reads images, and its sequences cannot be split over devices yet; set it to 1"


@checks.add("C275", "unsupported", RANK, PATH)
def _all_weights_are_trained(view: ConfigView) -> str | None:
    if not view[RANK] or not _reads_images(view):
        return None
    return "the actor reads images, and such models have no LoRA adapters yet; set it to 0"


@checks.add("C277", "unsupported", PATH)
def _images_can_be_decoded(view: ConfigView) -> str | None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing or not _reads_images(view):
        return None
    return f"the actor reads images, which needs {' and '.join(missing)}: {install_command('iiverl[vision]')}"


@checks.add("C278", "error", LEAST, MOST)
def _sizes_are_in_order(view: ConfigView) -> str | None:
    if view[LEAST] is None or view[MOST] is None or view[LEAST] <= view[MOST]:
        return None
    return f"{LEAST} ({view[LEAST]}) is above {MOST} ({view[MOST]})"


@checks.add("C279", "warning", FREEZE, LEAST, MOST, PATH)
def _images_are_read(view: ConfigView) -> str | None:
    given = [key for key in (LEAST, MOST) if view[key] is not None] + [FREEZE] * view[FREEZE]
    if not given or find_config(view[PATH]) is None or _reads_images(view):
        return None
    return f"{', '.join(given)}: no effect, since the actor reads texts only"
