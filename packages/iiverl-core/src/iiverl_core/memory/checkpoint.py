"""The size of a checkpoint on disk, in all and per process.

Indexes, and the state of the run beside the models, are left out; they matter only for models of a few MB.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from iiverl_core.config import Role, RoleConfig, RunConfig
from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory.layout import Layout, Stage, layout_of
from iiverl_core.memory.states import MOMENTS, held, held_trained, model_parameters, trained_parameters

FP32 = 4


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint: in all, and of the files of the process that writes most."""

    total: int
    per_rank: int


def checkpoint_bytes(run: RunConfig, trained: Mapping[Role, int], exported: int) -> int:
    """Count the bytes of a checkpoint.

    Args:
        trained: the parameters of each trained model that its optimizer updates.
        exported: all parameters of the actor.
    """
    size = sum(count * _bytes_each(run, run.roles[role]) for role, count in trained.items())
    return size + exported * _exported_bytes_each(run)


def checkpoint_size(run: RunConfig, facts: Mapping[Role, ModelFacts]) -> CheckpointSize:
    """Count the bytes of a checkpoint from the shapes of the run's models.

    Under FSDP each process writes its shard. Under Megatron the first of the data-parallel replicas of a parameter writes
    it, and the states of the optimizer, which it gathers from the others. `hf_model` is written by the first process.
    """
    roles = [role for role in run.roles.values() if role.training is not None]
    trained: dict[Role, int] = {
        role.role: trained_parameters(facts[role.role], role.model, language=role.role == "actor")
        for role in roles
    }
    exported = model_parameters(facts["actor"], language=True)
    per_rank = sum(
        _held(role, facts[role.role], layout_of(role, run.devices)) * _bytes_each(run, role) for role in roles
    )
    per_rank += exported * _exported_bytes_each(run)
    return CheckpointSize(checkpoint_bytes(run, trained, exported), per_rank)


def _held(role: RoleConfig, facts: ModelFacts, layout: Layout) -> int:
    """Count the parameters that the process with most of them writes."""
    language = role.role == "actor"
    if layout.sharded:
        return ceil(trained_parameters(facts, role.model, language=language) / layout.devices)
    stages: tuple[Stage, ...] = ("first", "last")
    if role.model.lora_rank:
        return max(held_trained(facts, role.model, layout, stage, language=language) for stage in stages)
    return max(held(facts, layout, stage, language=language).all for stage in stages)


def _bytes_each(run: RunConfig, role: RoleConfig) -> int:
    """Count the bytes per parameter of a trained model's files.

    The optimizer's are two moments and, with Megatron's distributed optimizer, an fp32 copy of the weight.
    """
    contents = run.checkpoint.save_contents
    if "model" not in contents:
        return 0
    layout = layout_of(role, run.devices)
    master = FP32 if role.model.lora_rank else layout.master_bytes
    weight = master if layout.sharded or role.model.lora_rank else layout.weight_bytes
    if "optimizer" not in contents:
        return weight
    return weight + (MOMENTS * master if layout.sharded else (MOMENTS + 1) * FP32)


def _exported_bytes_each(run: RunConfig) -> int:
    """Count the bytes per parameter of the actor's folder for transformers."""
    if "hf_model" not in run.checkpoint.save_contents:
        return 0
    layout = layout_of(run.actor, run.devices)
    return layout.master_bytes if layout.sharded else layout.weight_bytes
