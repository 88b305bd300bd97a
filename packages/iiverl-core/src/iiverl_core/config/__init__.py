"""The configuration: a typed model of every key of the YAML file, one file per section, with loading and checks."""

from iiverl_core.config.diagnostics import Problem, render
from iiverl_core.config.listing import show
from iiverl_core.config.loading import Loaded, build, load
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.run_config import (
    ConversationConfig,
    LossConfig,
    MicroBatching,
    Offload,
    ProfileConfig,
    RewardsConfig,
    RoleConfig,
    RunConfig,
    TrainingConfig,
    run_config,
)
from iiverl_core.config.sections.actor import ActorConfig, RefConfig
from iiverl_core.config.sections.algorithm import AlgorithmConfig, RolloutCorrectionConfig
from iiverl_core.config.sections.critic import CriticConfig
from iiverl_core.config.sections.data import DataConfig
from iiverl_core.config.sections.model import FSDPConfig, MegatronConfig, ModelConfig, OptimConfig
from iiverl_core.config.sections.rewards import CustomRewardFunctionConfig, RewardAPIConfig, RewardModelConfig
from iiverl_core.config.sections.rollout import ROLLOUT, RolloutConfig
from iiverl_core.config.sections.root import Config
from iiverl_core.config.sections.section import LOSS_MODE

__all__ = [
    "LOSS_MODE",
    "ROLE_KEYS",
    "ROLLOUT",
    "ActorConfig",
    "AlgorithmConfig",
    "Config",
    "ConversationConfig",
    "CriticConfig",
    "CustomRewardFunctionConfig",
    "DataConfig",
    "FSDPConfig",
    "Loaded",
    "LossConfig",
    "MegatronConfig",
    "MicroBatching",
    "ModelConfig",
    "Offload",
    "OptimConfig",
    "Problem",
    "ProfileConfig",
    "RefConfig",
    "RewardAPIConfig",
    "RewardModelConfig",
    "RewardsConfig",
    "Role",
    "RoleConfig",
    "RolloutConfig",
    "RolloutCorrectionConfig",
    "RunConfig",
    "TrainingConfig",
    "build",
    "load",
    "render",
    "run_config",
    "show",
]
