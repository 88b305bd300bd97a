"""The memory that a run needs on each device, counted from its configuration and its models' shapes alone.

Arithmetic without a device, a weight or a tensor library: what `iiverl plan` prints. A number that is not exact says in
its docstring what it leaves out.
"""

from iiverl_core.memory.advice import advice, no_room
from iiverl_core.memory.engine import EngineMemory
from iiverl_core.memory.layout import Layout, Stage, layout_of
from iiverl_core.memory.plan import Item, MemoryPlan, Pass, Phase, RoleMemory, find_facts, plan_memory

__all__ = [
    "EngineMemory",
    "Item",
    "Layout",
    "MemoryPlan",
    "Pass",
    "Phase",
    "RoleMemory",
    "Stage",
    "advice",
    "find_facts",
    "layout_of",
    "no_room",
    "plan_memory",
]
