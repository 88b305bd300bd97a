"""Suggestions for a run that does not fit."""

from iiverl_core.config import ROLLOUT, MegatronConfig, Role, RunConfig
from iiverl_core.memory.plan import MemoryPlan, Phase
from iiverl_core.registry import ENGINES

OFFLOAD = {"weights": "parameters", "gradients": "gradients", "optimizer": "optimizer"}
"""Keys of offloading by kind of state."""


def advice(run: RunConfig, plan: MemoryPlan, phase: Phase) -> str:
    """Suggest the key to change first for a phase that does not fit, by its largest item."""
    owner, kind = phase.biggest
    if owner == "engine":
        return _engine(run, kind)
    if kind in OFFLOAD:
        working = phase.name == f"update: {owner}" or (
            phase.name == f"forward: {owner}" and kind == "weights"
        )
        return _states(run, plan, owner, kind, working=working)
    return _work(run, plan, owner, kind)


def suggest_for_engine(run: RunConfig, plan: MemoryPlan) -> str:
    """Suggest how to make a sequence fit into the engine's cache."""
    if plan.engine.weights + plan.engine.work > plan.device_memory:
        return f"raise {ROLLOUT}.tensor_model_parallel_size, which spreads an engine over more devices"
    return (
        f"raise {ROLLOUT}.gpu_memory_utilization, or {ROLLOUT}.tensor_model_parallel_size, which spreads an engine "
        "over more devices"
    )


def _engine(run: RunConfig, kind: str) -> str:
    rollout = run.rollout
    if ENGINES[rollout.name].memory == "sequences":
        return f"lower {ROLLOUT}.max_num_seqs"
    if kind == "cache":
        return f"lower {ROLLOUT}.gpu_memory_utilization"
    return f"raise {ROLLOUT}.tensor_model_parallel_size"


def _states(run: RunConfig, plan: MemoryPlan, owner: Role, kind: str, *, working: bool) -> str:
    """Suggest offloading for an idle model, and more devices for a working one."""
    layout = next(model.layout for model in plan.roles if model.role == owner)
    if layout.sharded:
        if kind == "gradients" and layout.whole_gradient_bytes:
            return f"set {run.roles[owner].key('parallel.gradient_sync')} to micro_batch"
        if layout.offloaded:
            return "raise trainer.nnodes, which spreads each model over more devices"
        return f"set {run.roles[owner].key('offload.parameters')}, or raise trainer.nnodes"
    if not working:
        return f"set {run.roles[owner].key(f'offload.{OFFLOAD[kind]}')}"
    sizes = run.actor.key("parallel")
    if kind == "optimizer":
        return "raise trainer.nnodes: whatever the layout, all devices divide the optimizer"
    facts = next(model.facts for model in plan.roles if model.role == owner)
    if facts.experts and layout.expert < facts.experts:
        return f"raise {sizes}.expert_model_parallel_size"
    return f"raise {sizes}.tensor_model_parallel_size, then {sizes}.pipeline_model_parallel_size"


def _work(run: RunConfig, plan: MemoryPlan, owner: Role, kind: str) -> str:
    """Suggest recomputing or splitting activations, or fewer tokens per micro-batch."""
    layout = next(model.layout for model in plan.roles if model.role == owner)
    role = run.roles[owner]
    budget = role.key("training.micro_batching.tokens" if role.training else "forward.tokens")
    fewer_tokens = f"lower {budget} (or the micro-batch sizes, where they count)"
    if kind == "gathered" and layout.stays_gathered:
        return f"set {role.key('parallel.reshard_after_forward')}"
    if kind == "gathered":
        return "use --backend megatron, which splits a layer instead of collecting it"
    if kind == "activations" and role.training and not role.model.enable_gradient_checkpointing:
        return f"set {role.key('model.enable_gradient_checkpointing')}"
    if kind == "activations" and role.training and isinstance(role.parallel, MegatronConfig):
        if role.parallel.recompute_method == "block":
            return f"set {role.key('parallel.recompute_method')} to uniform"
        if role.parallel.recompute_num_layers > 1:
            return f"lower {role.key('parallel.recompute_num_layers')}"
    if kind == "activations" and not layout.sharded and layout.tensor > layout.sequence_split:
        return f"set {role.key('parallel.sequence_parallel')}"
    return fewer_tokens
