"""The names of verl's keys end in `config/`: other modules take them from a run's configuration."""

from pathlib import Path

PACKAGES = Path(__file__).parents[2] / "packages"
CONFIG = PACKAGES / "iiverl-core" / "src" / "iiverl_core" / "config"
SECTION = "actor_rollout_ref"


def test_the_section_of_the_policy_is_spelled_in_the_configuration_alone() -> None:
    spelling = {
        str(file.relative_to(source))
        for source in PACKAGES.glob("*/src")
        for file in source.rglob("*.py")
        if not file.is_relative_to(CONFIG) and SECTION in file.read_text("utf-8")
    }
    assert not spelling
