"""Settings that trade memory for speed under FSDP."""

from dataclasses import replace

from iiverl_core.config import FSDPConfig, RunConfig
from iiverl_core.memory.plan import MemoryPlan, find_facts, plan_memory


def gradient_sync_tradeoff(run: RunConfig, plan: MemoryPlan) -> list[str]:
    """Say whether the actor's gradients can be kept whole until a mini-batch's last micro-batch, and what that takes."""
    actor, parallel = run.actor, run.actor.parallel
    if not isinstance(parallel, FSDPConfig) or run.devices == 1 or parallel.gradient_sync == "mini_batch":
        return []
    later = replace(actor, parallel=parallel.model_copy(update={"gradient_sync": "mini_batch"}))
    other = plan_memory(
        replace(run, roles={**run.roles, "actor": later}), find_facts(run), plan.device_memory
    )
    if not other.fits:
        return []
    more = other.roles[0].states.gradients - plan.roles[0].states.gradients
    return [
        f"With {actor.key('parallel')}.gradient_sync: mini_batch, gradients are reduced over devices once per update instead of "
        f"once per micro-batch; it takes {more / 10**9:.1f} GB more in update: actor, and fits"
    ]
