"""Checks of what no single key shows: whether keys fit each other, the disk and what is installed."""

from iiverl_core.config.checks.batches import checks as batches
from iiverl_core.config.checks.critic import checks as critic
from iiverl_core.config.checks.dataset import checks as dataset
from iiverl_core.config.checks.devices import checks as devices
from iiverl_core.config.checks.files import checks as files
from iiverl_core.config.checks.functions import checks as functions
from iiverl_core.config.checks.layouts import checks as layouts
from iiverl_core.config.checks.learning import checks as learning
from iiverl_core.config.checks.packages import checks as packages
from iiverl_core.config.checks.rewards import checks as rewards
from iiverl_core.config.checks.sampling import checks as sampling
from iiverl_core.config.checks.schedule import checks as schedule
from iiverl_core.config.checks.view import View
from iiverl_core.config.problems import Problem

__all__ = ["ALL", "View", "run_checks"]

ALL = tuple(
    check
    for part in (
        batches,
        sampling,
        learning,
        critic,
        rewards,
        schedule,
        devices,
        layouts,
        dataset,
        files,
        functions,
        packages,
    )
    for check in part.all
)


def run_checks(view: View) -> list[Problem]:
    """Run every check on what is not broken."""
    return [problem for check in ALL for problem in check.run(view)]
