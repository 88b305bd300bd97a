"""Checks of models that read images, and of keys about images."""

import importlib.util

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.model_facts import find_config, reads_images
from iiverl_core.config.roles import ROLE_KEYS
from iiverl_core.config.sections.rollout import ROLLOUT
from iiverl_core.installation import install_command

checks = Checks()

PATH = f"{ROLE_KEYS['actor'].model}.path"
RANK = f"{ROLE_KEYS['actor'].model}.lora_rank"
STRATEGY = "actor_rollout_ref.actor.strategy"
FREEZE = "actor_rollout_ref.actor.freeze_vision_tower"
SPLIT = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
REFERENCE_SPLIT = "actor_rollout_ref.ref.ulysses_sequence_parallel_size"
SYNC = f"{ROLLOUT}.lora_sync"
CRITIC = f"{ROLE_KEYS['critic'].model}.path"
REWARD, REWARD_PATH, TOKENIZER = (
    f"reward_model.{name}" for name in ("enable", "model.path", "model.input_tokenizer")
)
KEY, LEAST, MOST = "data.image_key", "data.min_pixels", "data.max_pixels"
PACKAGES = ("PIL", "torchvision")


def _reads_images(view: ConfigView) -> bool:
    return reads_images(view[PATH])


@checks.add("C271", "unsupported", PATH, STRATEGY)
def _the_backend_trains_it(view: ConfigView) -> str | None:
    if not _reads_images(view) or not view.config.splits_models:
        return None
    return "the actor reads images, and Megatron does not train such models yet; use FSDP"


@checks.add("C272", "error", CRITIC, PATH, role="critic")
def _the_critic_reads_images(view: ConfigView) -> str | None:
    if not _reads_images(view) or find_config(view[CRITIC]) is None or reads_images(view[CRITIC]):
        return None
    return "the actor reads images, and the critic does not; set it to a model of the actor's family"


@checks.add("C273", "error", TOKENIZER, REWARD_PATH, REWARD, PATH)
def _the_reward_model_reads_what_it_can(view: ConfigView) -> str | None:
    if not view[REWARD] or not _reads_images(view) or find_config(view[REWARD_PATH]) is None:
        return None
    if reads_images(view[REWARD_PATH]) and view[TOKENIZER] is not None:
        return "a reward model that reads images reads the actor's own tokens; set it to null"
    if not reads_images(view[REWARD_PATH]) and view[TOKENIZER] is None:
        return f"the actor reads images, and the reward model does not; set it to {view[REWARD_PATH]}, so that it gets texts"
    return None


@checks.add("C274", "unsupported", SPLIT, REFERENCE_SPLIT, PATH)
def _sequences_are_whole(view: ConfigView) -> str | None:
    if max(view[SPLIT], view[REFERENCE_SPLIT]) == 1 or not _reads_images(view) or view.config.splits_models:
        return None
    return "the actor reads images, and its sequences cannot be split over devices yet; set it to 1"


@checks.add("C275", "unsupported", SYNC, RANK, PATH)
def _adapters_are_merged(view: ConfigView) -> str | None:
    if not view[RANK] or view[SYNC] == "merged" or not _reads_images(view):
        return None
    return "the actor reads images, and engines take the adapters of such models merged into the weights; set it to merged"


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
