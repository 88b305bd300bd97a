"""Estimate the memory that a run needs on each device, from its configuration and the shapes of its models.

Pure arithmetic without devices, weights or a tensor library, printed by `iiverl plan`. Docstrings of inexact numbers
say what they leave out.
"""

from iiverl_core.memory.advice import advice, suggest_for_engine
from iiverl_core.memory.checkpoint import CheckpointSize, checkpoint_bytes, checkpoint_size
from iiverl_core.memory.engine import EngineMemory
from iiverl_core.memory.layout import Layout, Stage, layout_of
from iiverl_core.memory.plan import Item, MemoryPlan, Pass, Phase, RoleMemory, find_facts, plan_memory
from iiverl_core.memory.states import trained_parameters
from iiverl_core.memory.tradeoffs import compiling_tradeoff, gradient_sync_tradeoff

__all__ = [
    "CheckpointSize",
    "EngineMemory",
    "Item",
    "Layout",
    "MemoryPlan",
    "Pass",
    "Phase",
    "RoleMemory",
    "Stage",
    "advice",
    "checkpoint_bytes",
    "checkpoint_size",
    "compiling_tradeoff",
    "find_facts",
    "gradient_sync_tradeoff",
    "layout_of",
    "plan_memory",
    "suggest_for_engine",
    "trained_parameters",
]
