"""Can the entry points of installed packages be used?"""

from iiverl_core.config.checks.view import Checks, View
from iiverl_core.config.sections.section import ADV_ESTIMATOR, BACKEND, ENGINE
from iiverl_core.registry import BACKENDS, ENGINES, ESTIMATORS, METRICS, REWARD_SOURCES, TRACKERS, Registry
from iiverl_core.registry.rewards import CHOOSER

checks = Checks()


def _check_entry_points(registry: Registry, key: str) -> None:
    @checks.add("C931", "warning", key)
    def entry_points_are_usable(view: View) -> str | None:
        return (
            "; ".join(f"the {entry} is left out: {reason}" for entry, reason in registry.broken.items())
            or None
        )


for _registry, _key in (
    (ESTIMATORS, ADV_ESTIMATOR),  # of the group of all algorithms
    (ENGINES, ENGINE),
    (BACKENDS, BACKEND),
    (REWARD_SOURCES, CHOOSER),
    (METRICS, "trainer.logger"),
    (TRACKERS, "trainer.logger"),
):
    _check_entry_points(_registry, _key)
