"""Registries of everything that a run can name: algorithms, engines, rollouters, formats of tool calls, backends, reward sources, metrics and
trackers.

One module per kind, with the dataclass of its infos and the table of the built-in ones. They import neither the code
that they name, nor torch, nor the configuration: `config/` derives its choices and checks from these tables.
"""

from iiverl_core.registry.algorithms import (
    AGGREGATIONS,
    ESTIMATORS,
    KL_KINDS,
    POLICY_LOSSES,
    AggregationInfo,
    AlgorithmInfo,
    EstimatorInfo,
    KLInfo,
    PolicyLossInfo,
)
from iiverl_core.registry.backends import BACKENDS, BackendInfo
from iiverl_core.registry.engines import ENGINES, EngineInfo
from iiverl_core.registry.metrics import METRICS, Metric
from iiverl_core.registry.registry import Info, Registry, load_code
from iiverl_core.registry.rewards import REWARD_MODEL, REWARD_SOURCES, RewardSource
from iiverl_core.registry.rollouters import ROLLOUTERS, RollouterInfo
from iiverl_core.registry.tool_formats import TOOL_FORMATS, ToolFormatInfo
from iiverl_core.registry.trackers import TRACKERS, TrackerInfo

REGISTRIES = (
    ESTIMATORS,
    POLICY_LOSSES,
    AGGREGATIONS,
    KL_KINDS,
    ENGINES,
    ROLLOUTERS,
    TOOL_FORMATS,
    BACKENDS,
    REWARD_SOURCES,
    METRICS,
    TRACKERS,
)

__all__ = [
    "AGGREGATIONS",
    "BACKENDS",
    "ENGINES",
    "ESTIMATORS",
    "KL_KINDS",
    "METRICS",
    "POLICY_LOSSES",
    "REGISTRIES",
    "REWARD_MODEL",
    "REWARD_SOURCES",
    "ROLLOUTERS",
    "TOOL_FORMATS",
    "TRACKERS",
    "AggregationInfo",
    "AlgorithmInfo",
    "BackendInfo",
    "EngineInfo",
    "EstimatorInfo",
    "Info",
    "KLInfo",
    "Metric",
    "PolicyLossInfo",
    "Registry",
    "RewardSource",
    "RollouterInfo",
    "ToolFormatInfo",
    "TrackerInfo",
    "load_code",
]
