"""Checks of split models: parallel sizes against the devices, each other and the models.

A model is checked only if its `config.json` is on this machine; otherwise the code that builds it reports problems.
"""

from math import prod

from iiverl_core.config.checks.check import Checks, ConfigView
from iiverl_core.config.model_facts import ModelFacts, engine_problem, nearest_sizes, read_model_facts, splits
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.sections.section import ENGINE
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


def facts_of(view: ConfigView, role: Role) -> ModelFacts | None:
    """Read the shape of a role's model; None if its `config.json` is not on this machine or its keys are invalid."""
    path, override = f"{ROLE_KEYS[role].model}.path", f"{ROLE_KEYS[role].model}.override_config"
    return None if {path, override} & view.invalid_keys else read_model_facts(view[path], view[override])


def uses(view: ConfigView, role: Role) -> bool:
    """Return whether the run splits a model of this role."""
    needed = view.config.needs_reference if role == "reference" else view.uses(role)
    return needed and view.config.splits_models


def reports(view: ConfigView, role: Role, *names: str) -> bool:
    """Return whether a role differs from the actor in these keys or its model, so that its problems are not the actor's."""
    if role == "actor":
        return True
    keys = [f"{ROLE_KEYS[role].megatron}.{name}" for name in names]
    return view.is_set(*keys) or facts_of(view, role) != facts_of(view, "actor")


@checks.add("C801", "error", ACTOR[TENSOR], ACTOR[PIPELINE], ACTOR[CONTEXT], PER_NODE, NODES)
def _copies_divide_over_devices(view: ConfigView) -> str | None:
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
    advice = "; ".join(ways) or "use more devices, or lower several of the sizes"
    one = " × ".join(f"{name} ({size})" for name, size in sizes.items())
    return f"{devices} devices ({NODES} × {PER_NODE}) cannot be divided into model copies of {copy} devices: {one}; {advice}"


@checks.add("C802", "error", ACTOR[EXPERT], ACTOR[PIPELINE], PER_NODE, NODES)
def _experts_divide_over_devices(view: ConfigView) -> str | None:
    size, stages, devices = view[ACTOR[EXPERT]], view[ACTOR[PIPELINE]], view.config.devices
    if not view.config.splits_models or devices % stages or devices // stages % size == 0:
        return None
    stage = devices // stages
    near = nearest_sizes(size, stage, lambda n: stage % n == 0)
    return f"the {stage} devices of a pipeline stage cannot be divided into groups of {size}; use {near}"


@checks.add("C803", "error", ACTOR[EXPERT])
def _there_are_experts(view: ConfigView) -> str | None:
    roles: list[Role] = [role for role in ROLE_KEYS if uses(view, role)]
    known = [facts_of(view, role) for role in roles]
    if view[ACTOR[EXPERT]] == 1 or not known or any(facts is None or facts.experts for facts in known):
        return None
    return f"no model of this run has experts to split over {view[ACTOR[EXPERT]]} devices; set it to 1"


def _check_same_layout(role: Role, name: str) -> None:
    key, actors = f"{ROLE_KEYS[role].megatron}.{name}", ACTOR[name]

    @checks.add("C804", "error", key, actors, role=role)
    def one_layout_for_all(view: ConfigView) -> str | None:
        if not uses(view, role) or view[key] == view[actors]:
            return None
        return f"{key} ({view[key]}) differs from {actors} ({view[actors]}); this version needs the same layout for all models, so set only the actor's"


def _check_model(role: Role) -> None:
    section, path = ROLE_KEYS[role].megatron, f"{ROLE_KEYS[role].model}.path"
    dtype, context = f"{section}.dtype", f"{section}.{CONTEXT}"
    packed = f"{ROLE_KEYS[role].model}.use_remove_padding"

    @checks.add("C805", "error", path, role=role)
    def model_is_known(view: ConfigView) -> str | None:
        facts = facts_of(view, role)
        backend = BACKENDS[view.config.backend]
        needed = view.config.needs_reference if role == "reference" else view.uses(role)
        if not needed or backend.check_model is None or facts is None or not reports(view, role):
            return None  # the code that builds the model reports it
        problem = load_code(backend.check_model, backend.name)(facts)
        return f"the {role} model '{view[path]}' {problem}" if problem else None

    if ROLE_KEYS[role].training:

        @checks.add("C806", "error", dtype, role=role)
        def losses_need_no_scaling(view: ConfigView) -> str | None:
            reported = role == "actor" or view.is_set(dtype)
            if not uses(view, role) or not reported or view[dtype] not in ("fp16", "float16"):
                return None
            return (
                f"{view[dtype]} would lose small gradients, because losses are not scaled; use bf16 or fp32"
            )

    if role != "reference":  # the actor's is the reference's, too

        @checks.add("C807", "warning", packed, context, role=role)
        def shared_rows_are_padded(view: ConfigView) -> str | None:
            if not uses(view, role) or not view[packed] or view[context] == 1:
                return None
            return (
                f"has no effect: sequences split over devices ({context}: {view[context]}) are always padded"
            )


def _check_layers(role: Role) -> None:
    section, path = ROLE_KEYS[role].megatron, f"{ROLE_KEYS[role].model}.path"
    tensor, pipeline, virtual = f"{section}.{TENSOR}", f"{section}.{PIPELINE}", f"{section}.{VIRTUAL}"

    @checks.add("C808", "error", virtual, pipeline, role=role)
    def chunks_need_stages(view: ConfigView) -> str | None:
        reported = role == "actor" or view.is_set(virtual, pipeline)
        if not uses(view, role) or not reported or view[virtual] is None or view[pipeline] > 1:
            return None
        return f"{virtual} ({view[virtual]}) needs more than one pipeline stage ({pipeline}); set it to null"

    @checks.add("C809", "error", tensor, path, role=role)
    def layers_are_split_evenly(view: ConfigView) -> str | None:
        facts, size = facts_of(view, role), view[tensor]
        if not uses(view, role) or facts is None or not reports(view, role, TENSOR):
            return None
        shape = facts.split_shape
        if splits(size, **shape):
            return None
        near = nearest_sizes(size, facts.heads, lambda n: splits(n, **shape))
        mlps = f" and MLPs of size {shape['inner']}" if shape["inner"] else ""
        return (
            f"{path} ({view[path]}) cannot be split over {size} devices ({tensor}): it has {facts.heads} attention heads, "
            f"{facts.kv_heads} key-value head{'s' * (facts.kv_heads != 1)}{mlps}; use {near}"
        )

    @checks.add("C810", "error", pipeline, virtual, path, role=role)
    def stages_are_equal(view: ConfigView) -> str | None:
        facts, stages, chunks = facts_of(view, role), view[pipeline], view[virtual] or 1
        if not uses(view, role) or facts is None or not reports(view, role, PIPELINE, VIRTUAL):
            return None
        if facts.layers % (stages * chunks) == 0:
            return None
        near = nearest_sizes(stages, facts.layers, lambda n: facts.layers % (n * chunks) == 0)
        parts = f"{stages} stages ({pipeline})" + (f" of {chunks} chunks ({virtual})" if chunks > 1 else "")
        advice = f"use {near}" if near else "use fewer chunks"
        return f"the {facts.layers} layers of {path} ({view[path]}) cannot be divided into {parts}; {advice}"


def _check_recomputing(role: Role) -> None:
    section, path = ROLE_KEYS[role].megatron, f"{ROLE_KEYS[role].model}.path"
    method, number = f"{section}.recompute_method", f"{section}.recompute_num_layers"
    recompute = f"{ROLE_KEYS[role].model}.enable_gradient_checkpointing"
    pipeline, virtual = f"{section}.{PIPELINE}", f"{section}.{VIRTUAL}"

    @checks.add("C816", "error", number, method, pipeline, virtual, path, recompute, role=role)
    def layers_are_recomputed_evenly(view: ConfigView) -> str | None:
        """megatron-core goes on behind the last layer if groups of layers do not divide those of a chunk."""
        facts = facts_of(view, role)
        if not uses(view, role) or facts is None or not view[recompute] or view[method] != "uniform":
            return None
        if not reports(view, role, "recompute_num_layers", "recompute_method", PIPELINE, VIRTUAL):
            return None
        layers, rest = divmod(facts.layers, view[pipeline] * (view[virtual] or 1))
        if rest or layers % view[number] == 0:
            return None  # stages that are not equal are reported by another check
        near = nearest_sizes(view[number], layers, lambda n: layers % n == 0)
        return f"the {layers} layers of a stage's part of {path} ({view[path]}) cannot be divided into groups of {view[number]}; use {near}"


def _check_experts(role: Role) -> None:
    section, path = ROLE_KEYS[role].megatron, f"{ROLE_KEYS[role].model}.path"
    tensor, expert, sequence = (f"{section}.{name}" for name in (TENSOR, EXPERT, "sequence_parallel"))

    @checks.add("C811", "error", expert, path, role=role)
    def experts_are_spread_evenly(view: ConfigView) -> str | None:
        facts, size = facts_of(view, role), view[expert]
        if (
            not uses(view, role)
            or facts is None
            or not reports(view, role, EXPERT)
            or facts.experts % size == 0
        ):
            return None
        near = nearest_sizes(size, facts.experts, lambda n: facts.experts % n == 0)
        return f"the {facts.experts} experts of {path} ({view[path]}) cannot be divided among {size} devices ({expert}); use {near}"

    @checks.add("C812", "error", sequence, tensor, path, role=role)
    def experts_get_parts_of_the_sequence(view: ConfigView) -> str | None:
        facts = facts_of(view, role)
        if not uses(view, role) or facts is None or not reports(view, role, "sequence_parallel", TENSOR):
            return None
        if not facts.experts or view[tensor] == 1 or view[sequence]:
            return None
        return (
            f"{path} ({view[path]}) has experts, which need {sequence} if {tensor} is above 1; set it to true"
        )


def _check_sequence_split(role: Role) -> None:
    split, path = ROLE_KEYS[role].sequence_split, f"{ROLE_KEYS[role].model}.path"
    packing = f"{ROLE_KEYS[role].model}.use_remove_padding"

    def splits_sequences(view: ConfigView) -> bool:
        needed = view.config.needs_reference if role == "reference" else view.uses(role)
        followed = role == "reference" and not view.is_set(split)  # the actor's problem is reported
        return needed and not followed and view.config.sequence_split(role) > 1

    @checks.add("C710", "error", split, PER_NODE, NODES, role=role)
    def groups_divide_over_devices(view: ConfigView) -> str | None:
        size, devices = view[split], view.config.devices
        if not splits_sequences(view) or devices % size == 0:
            return None
        near = nearest_sizes(size, devices, lambda n: devices % n == 0)
        return f"{devices} devices ({NODES} × {PER_NODE}) cannot be divided into groups of {size} that share sequences; use {near}"

    @checks.add("C814", "error", split, path, role=role)
    def heads_divide_over_devices(view: ConfigView) -> str | None:
        facts, size = facts_of(view, role), view[split]
        if not splits_sequences(view) or facts is None or facts.heads % size == 0:
            return None
        near = nearest_sizes(size, facts.heads, lambda n: facts.heads % n == 0)
        return (
            f"the {facts.heads} attention heads of {path} ({view[path]}) cannot be divided over {size} devices that share a "
            f"sequence; use {near}"
        )

    @checks.add("C815", "error", split, packing, role=role)
    def split_sequences_are_packed(view: ConfigView) -> str | None:
        if not splits_sequences(view) or view[packing] is not False:
            return None
        return f"only packed sequences can be split over devices; set {packing} to true, or {split} to 1"


for _role in ROLE_KEYS:
    _check_sequence_split(_role)
    _check_model(_role)
    _check_layers(_role)
    _check_experts(_role)
    if ROLE_KEYS[_role].training:
        _check_recomputing(_role)
    if _role != "actor":
        for _name in ACTOR:
            _check_same_layout(_role, _name)


@checks.add("C813", "error", ENGINE_SIZE, ENGINE, "actor_rollout_ref.model.path", PER_NODE, NODES)
def _engine_holds_the_model(view: ConfigView) -> str | None:
    """Check a model on this machine; for a model on the Hub, `controller.models.check_engine_devices` does."""
    facts, size = facts_of(view, "actor"), view.config.engine_devices
    if facts is None or size == 1:
        return None
    devices = view.config.trainer.rollout_devices or view.config.devices
    problem = engine_problem(
        size, devices, heads=facts.heads, kv_heads=facts.kv_heads, inner=facts.intermediate_size
    )
    path = "actor_rollout_ref.model.path"
    return problem and f"{ENGINE_SIZE} is {size}, but {path} ({view[path]}) {problem}"
