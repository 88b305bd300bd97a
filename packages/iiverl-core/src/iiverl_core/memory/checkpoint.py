"""The size of a checkpoint on disk, in all and per process.

Indexes, and the state of the run beside the models, are left out; they matter only for models of a few MB.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from iiverl_core.config import Role, RunConfig
from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory.layout import Layout, Stage, layout_of
from iiverl_core.memory.states import MOMENTS, held, model_parameters

FP32 = 4


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of a checkpoint: in all, and of the files of the process that writes most."""

    total: int
    per_rank: int


def checkpoint_bytes(run: RunConfig, parameters: Mapping[Role, int]) -> int:
    """Count the bytes of a checkpoint from the parameters of each trained model."""
    trained = [role for role in run.roles.values() if role.training is not None]
    size = sum(parameters[role.role] * _bytes_each(run, layout_of(role, run.devices)) for role in trained)
    return size + parameters["actor"] * _exported_bytes_each(run)


def checkpoint_size(run: RunConfig, facts: Mapping[Role, ModelFacts]) -> CheckpointSize:
    """Count the bytes of a checkpoint from the shapes of the run's models.

    Under FSDP each process writes its shard. Under Megatron the first of the data-parallel replicas of a parameter writes
    it, and the states of the optimizer, which it gathers from the others. `hf_model` is written by the first process.
    """
    parameters: dict[Role, int] = {
        role: model_parameters(shape, language=role in ("actor", "reference"))
        for role, shape in facts.items()
    }
    per_rank = sum(
        _held(role.role, facts[role.role], layout_of(role, run.devices))
        * _bytes_each(run, layout_of(role, run.devices))
        for role in run.roles.values()
        if role.training is not None
    )
    per_rank += parameters["actor"] * _exported_bytes_each(run)
    return CheckpointSize(checkpoint_bytes(run, parameters), per_rank)


def _held(role: Role, facts: ModelFacts, layout: Layout) -> int:
    """Count the parameters that the process with most of them writes."""
    language = role == "actor"
    if layout.sharded:
        return ceil(model_parameters(facts, language=language) / layout.devices)
    stages: tuple[Stage, ...] = ("first", "last")
    return max(held(facts, layout, stage, language=language).all for stage in stages)


def _bytes_each(run: RunConfig, layout: Layout) -> int:
    """Count the bytes per parameter of a trained model's files.

    The optimizer's are two moments and, with Megatron's distributed optimizer, an fp32 copy of the weight.
    """
    contents = run.checkpoint.save_contents
    if "model" not in contents:
        return 0
    weight = layout.master_bytes if layout.sharded else layout.weight_bytes
    if "optimizer" not in contents:
        return weight
    return weight + (MOMENTS * layout.master_bytes if layout.sharded else (MOMENTS + 1) * FP32)


def _exported_bytes_each(run: RunConfig) -> int:
    """Count the bytes per parameter of the actor's folder for transformers."""
    if "hf_model" not in run.checkpoint.save_contents:
        return 0
    layout = layout_of(run.actor, run.devices)
    return layout.master_bytes if layout.sharded else layout.weight_bytes
