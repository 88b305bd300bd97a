"""Does Megatron know the models, and do its sizes fit them, the devices and each other?

Of models, what is told is told as far as their `config.json` is at hand.
"""

from math import prod

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.model_facts import ModelFacts, read_model_facts
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.sections.section import ENGINE
from iiverl_core.config.splitting import engine_problem, nearest_sizes, splits
from iiverl_core.registry import BACKENDS, load_code

checks = Checks()

NODES, PER_NODE = "trainer.nnodes", "trainer.n_gpus_per_node"
TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VIRTUAL = "virtual_pipeline_model_parallel_size"
CONTEXT, EXPERT = "context_parallel_size", "expert_model_parallel_size"
ACTOR = {
    name: f"{ROLE_KEYS['actor'].megatron}.{name}" for name in (TENSOR, PIPELINE, VIRTUAL, CONTEXT, EXPERT)
}
ENGINE_SIZE = "actor_rollout_ref.rollout.tensor_model_parallel_size"


def facts_of(view: View, role: Role) -> ModelFacts | None:
    """What is known of a role's model; None where its `config.json` is not at hand or something in its place is broken."""
    path, override = f"{ROLE_KEYS[role].model}.path", f"{ROLE_KEYS[role].model}.override_config"
    return None if {path, override} & view.invalid_keys else read_model_facts(view[path], view[override])


def uses(view: View, role: Role) -> bool:
    """Whether the run splits a model of this role."""
    needed = view.config.needs_reference if role == "reference" else view.uses(role)
    return needed and view.config.splits_models


def own(view: View, role: Role, *names: str) -> bool:
    """Whether a role's layout or model is its own, so that what is wrong with it is not told of the actor already."""
    if role == "actor":
        return True
    keys = [f"{ROLE_KEYS[role].megatron}.{name}" for name in names]
    return view.given(*keys) or facts_of(view, role) != facts_of(view, "actor")


@checks.add("C801", "error", ACTOR[TENSOR], ACTOR[PIPELINE], ACTOR[CONTEXT], PER_NODE, NODES)
def copies_divide_over_devices(view: View) -> str | None:
    """The devices hold a whole number of copies of the model."""
    names = (TENSOR, PIPELINE, CONTEXT)
    sizes, devices = {name: view[ACTOR[name]] for name in names}, view.config.devices
    copy = prod(sizes.values())
    if not view.config.splits_models or devices % copy == 0:
        return None
    ways = []
    for name, size in sizes.items():
        rest = copy // size
        near = nearest_sizes(size, devices // rest, lambda n, rest=rest: devices % (n * rest) == 0)
        ways += [f"use {name} {near}"] if near else []
    advice = "; ".join(ways) or "take more devices, or lower several of the sizes"
    one = " × ".join(f"{name} ({size})" for name, size in sizes.items())
    return f"{devices} devices ({NODES} × {PER_NODE}) do not divide into copies over {copy}: {one}; {advice}"


@checks.add("C802", "error", ACTOR[EXPERT], ACTOR[PIPELINE], PER_NODE, NODES)
def experts_divide_over_devices(view: View) -> str | None:
    """The devices of a pipeline stage divide into groups that hold all of its experts."""
    size, stages, devices = view[ACTOR[EXPERT]], view[ACTOR[PIPELINE]], view.config.devices
    if not view.config.splits_models or devices % stages or devices // stages % size == 0:
        return None
    stage = devices // stages
    near = nearest_sizes(size, stage, lambda n: stage % n == 0)
    return f"the {stage} devices of a pipeline stage do not divide into groups of {size}; use {near}"


@checks.add("C803", "error", ACTOR[EXPERT])
def there_are_experts(view: View) -> str | None:
    """Where experts are spread, a model has some."""
    roles: list[Role] = [role for role in ROLE_KEYS if uses(view, role)]
    known = [facts_of(view, role) for role in roles]
    if view[ACTOR[EXPERT]] == 1 or not known or any(facts is None or facts.experts for facts in known):
        return None
    return f"{view[ACTOR[EXPERT]]}, and no model of this run has experts; set it to 1"


def _check_same_layout(role: Role, name: str) -> None:
    key, actors = f"{ROLE_KEYS[role].megatron}.{name}", ACTOR[name]

    @checks.add("C804", "error", key, actors, role=role)
    def one_layout_for_all(view: View) -> str | None:
        if not uses(view, role) or view[key] == view[actors]:
            return None
        return f"{key} is {view[key]}, and {actors} is {view[actors]}: in this version all models have one layout; set only the actor's"


def _check_model(role: Role) -> None:
    """The checks of what the backend can do with one role's model, however it is split."""
    section, path = ROLE_KEYS[role].megatron, f"{ROLE_KEYS[role].model}.path"
    dtype, context = f"{section}.dtype", f"{section}.{CONTEXT}"
    packed = f"{ROLE_KEYS[role].model}.use_remove_padding"

    @checks.add("C805", "error", path, role=role)
    def model_is_known(view: View) -> str | None:
        facts = facts_of(view, role)
        backend = BACKENDS[view.config.backend]
        needed = view.config.needs_reference if role == "reference" else view.uses(role)
        if not needed or backend.check_model is None or facts is None or not own(view, role):
            return None  # whoever builds the model tells
        problem = load_code(backend.check_model, backend.name)(facts)
        return f"the {role} model '{view[path]}' {problem}" if problem else None

    if ROLE_KEYS[role].training:

        @checks.add("C806", "error", dtype, role=role)
        def losses_need_no_scaling(view: View) -> str | None:
            told = role == "actor" or view.given(dtype)
            if not uses(view, role) or not told or view[dtype] not in ("fp16", "float16"):
                return None
            return f"{view[dtype]}, in which small gradients vanish: losses are not scaled; use bf16 or fp32"

    if role != "reference":  # the actor's is the reference's, too

        @checks.add("C807", "warning", packed, context, role=role)
        def shared_rows_are_padded(view: View) -> str | None:
            if not uses(view, role) or not view[packed] or view[context] == 1:
                return None
            return f"has no effect: rows that several devices share ({context} is {view[context]}) are padded"


def _check_layers(role: Role) -> None:
    """The checks of one role's tensor and pipeline sizes against its model."""
    section, path = ROLE_KEYS[role].megatron, f"{ROLE_KEYS[role].model}.path"
    tensor, pipeline, virtual = f"{section}.{TENSOR}", f"{section}.{PIPELINE}", f"{section}.{VIRTUAL}"

    @checks.add("C808", "error", virtual, pipeline, role=role)
    def chunks_need_stages(view: View) -> str | None:
        told = role == "actor" or view.given(virtual, pipeline)
        if not uses(view, role) or not told or view[virtual] is None or view[pipeline] > 1:
            return None
        return f"{virtual} ({view[virtual]}) interleaves the chunks of pipeline stages, and there is one stage ({pipeline}); set it to null"

    @checks.add("C809", "error", tensor, path, role=role)
    def layers_are_split_evenly(view: View) -> str | None:
        facts, size = facts_of(view, role), view[tensor]
        if not uses(view, role) or facts is None or not own(view, role, TENSOR):
            return None
        inner = facts.intermediate_size if len(facts.expert_layers) < facts.layers else 0
        shape = {"heads": facts.heads, "kv_heads": facts.kv_heads, "inner": inner}
        if splits(size, **shape):
            return None
        near = nearest_sizes(size, facts.heads, lambda n: splits(n, **shape))
        layers = f", and layers of {inner}" if inner else ""
        return (
            f"{path} ({view[path]}) does not divide over {size} devices ({tensor}): it has {facts.heads} attention heads, "
            f"{facts.kv_heads} of keys and values{layers}; use {near}"
        )

    @checks.add("C810", "error", pipeline, virtual, path, role=role)
    def stages_are_equal(view: View) -> str | None:
        facts, stages, chunks = facts_of(view, role), view[pipeline], view[virtual] or 1
        if not uses(view, role) or facts is None or not own(view, role, PIPELINE, VIRTUAL):
            return None
        if facts.layers % (stages * chunks) == 0:
            return None
        near = nearest_sizes(stages, facts.layers, lambda n: facts.layers % (n * chunks) == 0)
        parts = f"{stages} stages ({pipeline})" + (f" of {chunks} chunks ({virtual})" if chunks > 1 else "")
        advice = f"use {near}" if near else "use fewer chunks"
        return f"the {facts.layers} layers of {path} ({view[path]}) do not divide into {parts}; {advice}"


def _check_experts(role: Role) -> None:
    """The checks of one role's layout against its model's experts, where it has some."""
    section, path = ROLE_KEYS[role].megatron, f"{ROLE_KEYS[role].model}.path"
    tensor, expert, sequence = (f"{section}.{name}" for name in (TENSOR, EXPERT, "sequence_parallel"))

    @checks.add("C811", "error", expert, path, role=role)
    def experts_are_spread_evenly(view: View) -> str | None:
        facts, size = facts_of(view, role), view[expert]
        if not uses(view, role) or facts is None or not own(view, role, EXPERT) or facts.experts % size == 0:
            return None
        near = nearest_sizes(size, facts.experts, lambda n: facts.experts % n == 0)
        return f"the {facts.experts} experts of {path} ({view[path]}) do not divide over {size} devices ({expert}); use {near}"

    @checks.add("C812", "error", sequence, tensor, path, role=role)
    def experts_get_parts_of_the_sequence(view: View) -> str | None:
        facts = facts_of(view, role)
        if not uses(view, role) or facts is None or not own(view, role, "sequence_parallel", TENSOR):
            return None
        if not facts.experts or view[tensor] == 1 or view[sequence]:
            return None
        return f"{path} ({view[path]}) has experts, which need {sequence} where {tensor} is above 1; set it to true"


for _role in ROLE_KEYS:
    _check_model(_role)
    _check_layers(_role)
    _check_experts(_role)
    if _role != "actor":
        for _name in ACTOR:
            _check_same_layout(_role, _name)


@checks.add("C813", "error", ENGINE_SIZE, ENGINE, "actor_rollout_ref.model.path", PER_NODE, NODES)
def engine_holds_the_model(view: View) -> str | None:
    """The actor can be spread over an engine's devices; for a model that only the Hub knows, the run tells."""
    facts, size = facts_of(view, "actor"), view.config.engine_devices
    if facts is None or size == 1:
        return None
    devices = view.config.trainer.rollout_devices or view.config.devices
    problem = engine_problem(
        size, devices, heads=facts.heads, kv_heads=facts.kv_heads, inner=facts.intermediate_size
    )
    path = "actor_rollout_ref.model.path"
    return problem and f"{ENGINE_SIZE} is {size}, and {path} ({view[path]}) {problem}"
