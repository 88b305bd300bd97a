"""Checks of LoRA adapters."""

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.checks.layouts import facts_of
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.rollout import ROLLOUT
from iiverl_core.registry import ENGINES

checks = Checks()

RANK = f"{ROLE_KEYS['actor'].model}.lora_rank"
REWARD = f"{ROLE_KEYS['reward'].model}.lora_rank"
SYNC, ENGINE = f"{ROLLOUT}.lora_sync", f"{ROLLOUT}.name"
OPTIONS = ("lora_alpha", "target_modules", "exclude_modules", "use_rslora", "lora_adapter_path")


def _check_adapter(role: Role) -> None:
    model = ROLE_KEYS[role].model
    rank = f"{model}.lora_rank"
    options = [f"{model}.{name}" for name in OPTIONS] + ([SYNC] if role == "actor" else [])

    @checks.add("C842", "warning", *options, rank, role=role)
    def options_are_read(view: ConfigView) -> str | None:
        given = [each for each in options if view.is_set(each)]
        if view[rank] or not given:
            return None
        return f"has no effect: {rank} is 0, so all weights are trained, without LoRA adapters"

    @checks.add("C846", "warning", rank, f"{model}.target_modules", f"{model}.path", role=role)
    def experts_are_not_adapted(view: ConfigView) -> str | None:
        facts = facts_of(view, role)
        if not view[rank] or not view.uses(role) or facts is None or not facts.experts:
            return None
        return (
            f"the {facts.experts} experts of a layer are one tensor in transformers, which gets no LoRA adapter: they "
            "stay as they are, and attention and other linear layers learn"
        )


for _role in ROLE_KEYS:
    if ROLE_KEYS[_role].training:
        _check_adapter(_role)


LAYOUT = tuple(
    path
    for path in keys()
    if path.startswith((f"{ROLE_KEYS['reference'].fsdp}.", f"{ROLE_KEYS['reference'].megatron}."))
)


@checks.add("C844", "warning", *LAYOUT, RANK, f"{ROLE_KEYS['actor'].model}.lora_adapter_path")
def _reference_is_not_built(view: ConfigView) -> str | None:
    model = view.config.actor_rollout_ref.model
    if not model.lora_rank or model.lora_adapter_path or not view.is_set(*LAYOUT):
        return None
    return f"has no effect: with LoRA ({RANK}), the reference is the actor without its adapters, and no model of its own"


@checks.add("C845", "error", SYNC, ENGINE, RANK)
def _engine_takes_adapters(view: ConfigView) -> str | None:
    engine, rank = ENGINES[view[ENGINE]], view[RANK]
    if not rank or view[SYNC] == "merged" or rank <= engine.max_lora_rank:
        return None
    if not engine.max_lora_rank:
        return f"the engine {engine.name} takes no adapters: set {SYNC} to merged"
    return f"the engine {engine.name} takes adapters of a rank of at most {engine.max_lora_rank}: set {SYNC} to merged"


@checks.add("C843", "error", REWARD, role="reward")
def _reward_model_is_not_trained(view: ConfigView) -> str | None:
    if not view[REWARD]:
        return None
    return "a reward model is not trained; set it to 0, and merge its adapter into its weights if it has one"
