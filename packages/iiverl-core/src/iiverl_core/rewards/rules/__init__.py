"""Built-in rules: one pure function per file that scores a response by the convention of its dataset."""

from iiverl_core.rewards.rules.by_data_source import (
    RULES,
    Rule,
    UnknownDataSource,
    check_data_sources,
    rule_for,
)

__all__ = ["RULES", "Rule", "UnknownDataSource", "check_data_sources", "rule_for"]
