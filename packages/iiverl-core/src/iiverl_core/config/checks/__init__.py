"""Checks over several keys: against each other, the disk and what is installed."""

from iiverl_core.config.checks.adapters import checks as adapters
from iiverl_core.config.checks.batches import checks as batches
from iiverl_core.config.checks.check import ConfigView
from iiverl_core.config.checks.dataset import checks as dataset
from iiverl_core.config.checks.devices import checks as devices
from iiverl_core.config.checks.files import checks as files
from iiverl_core.config.checks.functions import checks as functions
from iiverl_core.config.checks.layouts import checks as layouts
from iiverl_core.config.checks.learning import checks as learning
from iiverl_core.config.checks.rewards import checks as rewards
from iiverl_core.config.checks.sampling import checks as sampling
from iiverl_core.config.checks.schedule import checks as schedule
from iiverl_core.config.checks.turns import checks as turns
from iiverl_core.config.checks.vision import checks as vision
from iiverl_core.config.diagnostics import Problem

__all__ = ["ALL", "ConfigView", "run_checks"]

ALL = tuple(
    check
    for group in (
        adapters,
        batches,
        sampling,
        turns,
        vision,
        learning,
        rewards,
        schedule,
        devices,
        layouts,
        dataset,
        files,
        functions,
    )
    for check in group.all
)


def run_checks(view: ConfigView) -> list[Problem]:
    """Run every check whose keys are valid."""
    return [problem for check in ALL for problem in check.run(view)]
