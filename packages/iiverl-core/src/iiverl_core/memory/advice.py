"""What to change where a run does not fit."""

from iiverl_core.config import Config
from iiverl_core.config.checks.devices import FSDP_SIZES
from iiverl_core.config.checks.layouts import MODELS, SECTIONS
from iiverl_core.config.roles import Role
from iiverl_core.memory.plan import MemoryPlan, Phase
from iiverl_core.registry import ENGINES

ROLLOUT = "actor_rollout_ref.rollout"
OFFLOAD = {"weights": "param_offload", "gradients": "grad_offload", "optimizer": "optimizer_offload"}
BUDGETS: dict[Role, str] = {
    "actor": "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "reference": "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",
    "critic": "critic.ppo_max_token_len_per_gpu",
    "reward": "reward_model.forward_max_token_len_per_gpu",
}


def advice(config: Config, plan: MemoryPlan, phase: Phase) -> str:
    """Name the key to change first for a phase that does not fit, by its largest item."""
    who, kind = phase.biggest
    if who == "engine":
        return _engine(config, kind)
    if kind in OFFLOAD:
        working = phase.name == f"update: {who}" or (phase.name == f"forward: {who}" and kind == "weights")
        return _states(config, plan, who, kind, working=working)
    return _work(config, plan, who, kind)


def no_room(config: Config, plan: MemoryPlan) -> str:
    """Say how the engine gets room for a sequence."""
    if plan.engine.weights + plan.engine.work > plan.device_memory:
        return f"raise {ROLLOUT}.tensor_model_parallel_size, which spreads an engine over more devices"
    return (
        f"raise {ROLLOUT}.gpu_memory_utilization, or {ROLLOUT}.tensor_model_parallel_size, which spreads an engine "
        "over more devices"
    )


def _engine(config: Config, kind: str) -> str:
    rollout = config.actor_rollout_ref.rollout
    if ENGINES[rollout.name].memory == "sequences":
        return f"lower {ROLLOUT}.max_num_seqs"
    if kind == "cache":
        return f"lower {ROLLOUT}.gpu_memory_utilization"
    return f"raise {ROLLOUT}.tensor_model_parallel_size"


def _states(config: Config, plan: MemoryPlan, who: Role, kind: str, *, working: bool) -> str:
    """Offload what only waits; spread what works over more devices."""
    layout = next(model.layout for model in plan.roles if model.role == who)
    if layout.sharded:
        if layout.offloaded:
            return "raise trainer.nnodes, which spreads each model over more devices"
        return f"set {FSDP_SIZES[who].replace('fsdp_size', 'param_offload')}, or raise trainer.nnodes"
    if not working:
        return f"set {SECTIONS[who].removesuffix('megatron')}{OFFLOAD[kind]}"
    sizes = "actor_rollout_ref.actor.megatron"
    if kind == "optimizer":
        return "raise trainer.nnodes: whatever the layout, all devices divide the optimizer"
    facts = next(model.facts for model in plan.roles if model.role == who)
    if facts.experts and layout.expert < facts.experts:
        return f"raise {sizes}.expert_model_parallel_size"
    return f"raise {sizes}.tensor_model_parallel_size, then {sizes}.pipeline_model_parallel_size"


def _work(config: Config, plan: MemoryPlan, who: Role, kind: str) -> str:
    """Compute activations again, split them, or let fewer tokens through at a time."""
    layout = next(model.layout for model in plan.roles if model.role == who)
    model = config.critic.model if who == "critic" else config.actor_rollout_ref.model
    fewer = f"lower {BUDGETS[who]} (or the micro-batch sizes, where they count)"
    if kind == "gathered":
        return "use --backend megatron, which splits a layer instead of collecting it"
    if kind == "activations" and who in ("actor", "critic") and not model.enable_gradient_checkpointing:
        return f"set {MODELS[who]}.enable_gradient_checkpointing"
    if kind == "activations" and not layout.sharded and layout.tensor > layout.sequence_split:
        return f"set {SECTIONS[who]}.sequence_parallel"
    return fewer
