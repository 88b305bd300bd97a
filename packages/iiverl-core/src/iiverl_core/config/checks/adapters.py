"""Checks of LoRA adapters."""

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.section import BACKEND
from iiverl_core.registry import BACKENDS

checks = Checks()

RANK = f"{ROLE_KEYS['actor'].model}.lora_rank"
REWARD = f"{ROLE_KEYS['reward'].model}.lora_rank"
OPTIONS = ("lora_alpha", "target_modules", "exclude_modules", "use_rslora", "lora_adapter_path")


def _check_adapter(role: Role) -> None:
    model = ROLE_KEYS[role].model
    rank = f"{model}.lora_rank"
    options = [f"{model}.{name}" for name in OPTIONS]

    @checks.add("C841", "error", rank, BACKEND, role=role)
    def backend_trains_adapters(view: ConfigView) -> str | None:
        backend = BACKENDS[view.config.backend]
        if not view[rank] or backend.adapters:
            return None
        return (
            f"the {backend.title} backend does not train LoRA adapters in this version; set {BACKEND}: fsdp"
        )

    @checks.add("C842", "warning", *options, rank, role=role)
    def options_are_read(view: ConfigView) -> str | None:
        given = [each for each in options if view.is_set(each)]
        if view[rank] or not given:
            return None
        return f"has no effect: {rank} is 0, so all weights are trained, without LoRA adapters"


for _role in ROLE_KEYS:
    if ROLE_KEYS[_role].training:
        _check_adapter(_role)


LAYOUT = tuple(path for path in keys() if path.startswith(f"{ROLE_KEYS['reference'].fsdp}."))


@checks.add("C844", "warning", *LAYOUT, RANK, f"{ROLE_KEYS['actor'].model}.lora_adapter_path")
def _reference_is_not_built(view: ConfigView) -> str | None:
    model = view.config.actor_rollout_ref.model
    if not model.lora_rank or model.lora_adapter_path or not view.is_set(*LAYOUT):
        return None
    return f"has no effect: with LoRA ({RANK}), the reference is the actor without its adapters, and no model of its own"


@checks.add("C843", "error", REWARD, role="reward")
def _reward_model_is_not_trained(view: ConfigView) -> str | None:
    if not view[REWARD]:
        return None
    return "a reward model is not trained; set it to 0, and merge its adapter into its weights if it has one"
