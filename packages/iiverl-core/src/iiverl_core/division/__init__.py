"""Divide devices between training and generating: times that are measured or estimated, and a simulation of steps.

Nothing here needs a device. `iiverl plan` and `benchmarks/async_scale.py` print what it finds.
"""

from iiverl_core.division.choice import MODES, Division, best_division
from iiverl_core.division.costs import Costs, ModelSize, estimate_costs
from iiverl_core.division.lengths import Lengths
from iiverl_core.division.measured import Measured, calibrate, measure
from iiverl_core.division.planned import DivisionPlan, plan_division
from iiverl_core.division.simulation import Times, generation_seconds, simulate

__all__ = [
    "MODES",
    "Costs",
    "Division",
    "DivisionPlan",
    "Lengths",
    "Measured",
    "ModelSize",
    "Times",
    "best_division",
    "calibrate",
    "estimate_costs",
    "generation_seconds",
    "measure",
    "plan_division",
    "simulate",
]
