"""The section `custom_reward_function`: a Python function that scores responses."""

from typing import Any

from pydantic import Field

from iiverl_core.config.sections.section import Path, Section

REWARD_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""What a reward function is given of each sample, by keyword."""


class CustomRewardFunctionConfig(Section):
    """A Python function `compute_score(data_source, solution_str, ground_truth, extra_info)` that scores a response."""

    path: Path | None = None
    """Python file that holds the function; null for the built-in rules."""
    name: str = "compute_score"
    """Name of the function."""
    reward_kwargs: dict[str, Any] = Field(default={})
    """Keyword arguments that the function gets besides."""
