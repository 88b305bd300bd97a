"""The built-in rules: one pure function a file, which scores a response by its data set's own convention."""

from iiverl_core.rewards.rules.by_data_source import (
    RULES,
    Rule,
    UnknownDataSource,
    check_data_sources,
    rule_for,
)

__all__ = ["RULES", "Rule", "UnknownDataSource", "check_data_sources", "rule_for"]
