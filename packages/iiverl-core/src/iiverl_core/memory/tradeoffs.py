"""Settings that trade memory, or time at the start, for speed under FSDP."""

from dataclasses import dataclass, replace
from math import ceil

from iiverl_core.config import FSDPConfig, RunConfig
from iiverl_core.memory.plan import MemoryPlan, find_facts, plan_memory


@dataclass(frozen=True)
class Measured:
    """What compiling the blocks of a model took in seconds, and how many times as fast training was then.

    `flops` is the speed per device without compiled blocks, in FLOP/s.
    """

    seconds: float
    speedup: float
    flops: float


MEASURED = {"CPU": Measured(seconds=63, speedup=0.69, flops=7e8)}
"""By kind of device, from `python benchmarks/gpu_check.py --sizes tiny --only "train compiled"` on two CPU cores, in bf16;
a GPU's are to be of `--sizes 0.5b`."""


def compiling_tradeoff(run: RunConfig, plan: MemoryPlan) -> list[str]:
    """Say what compiled blocks cost, and after how many steps of sequences of full length they have saved as much."""
    actor = run.actor
    if not isinstance(actor.parallel, FSDPConfig):
        return []
    longest = run.data.max_prompt_length + run.data.max_response_length
    tokens = run.data.train_batch_size * run.rollout.n * longest * run.training("actor").epochs
    flops = 6 * plan.roles[0].facts.active_parameters * tokens / run.devices
    found = [_measured(kind, measured, flops) for kind, measured in MEASURED.items()]
    if "GPU" not in MEASURED:
        found.append("on a GPU it is not measured yet")
    state = "compiled" if actor.parallel.compile_blocks else "not compiled"
    return [f"Transformer blocks are {state} ({actor.key('parallel')}.compile_blocks): {'; '.join(found)}"]


def _measured(kind: str, measured: Measured, flops: float) -> str:
    took = f"on a {kind}, compiling took {measured.seconds:.0f} s and training was {measured.speedup:.2f} times as fast"
    saved = flops / measured.flops * (1 - 1 / measured.speedup)
    return (
        f"{took}, which pays from {ceil(measured.seconds / saved):,} steps on"
        if saved > 0
        else f"{took}, which never pays"
    )


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
