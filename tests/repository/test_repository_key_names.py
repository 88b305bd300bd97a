"""The names of verl's keys end in `config/`: other modules take them from a run's configuration."""

from pathlib import Path

PACKAGES = Path(__file__).parents[2] / "packages"
CONFIG = PACKAGES / "iiverl-core" / "src" / "iiverl_core" / "config"
SECTION = "actor_rollout_ref"

NOT_YET = {
    "iiverl_cli/algorithms.py",
    "iiverl_core/cluster/advantages.py",
    "iiverl_core/cluster/model_runner.py",
    "iiverl_core/cluster/models.py",
    "iiverl_core/cluster/ray_engines.py",
    "iiverl_core/cluster/rollout_worker.py",
    "iiverl_core/cluster/worker.py",
    "iiverl_core/controller/collector.py",
    "iiverl_core/controller/models.py",
    "iiverl_core/controller/observer.py",
    "iiverl_core/controller/trainer.py",
    "iiverl_core/controller/worker_client.py",
}
"""Modules that still read the configuration in verl's shape. The set only shrinks."""


def test_the_section_of_the_policy_is_spelled_in_the_configuration_alone() -> None:
    spelling = {
        str(file.relative_to(source))
        for source in PACKAGES.glob("*/src")
        for file in source.rglob("*.py")
        if not file.is_relative_to(CONFIG) and SECTION in file.read_text("utf-8")
    }
    assert spelling == NOT_YET
