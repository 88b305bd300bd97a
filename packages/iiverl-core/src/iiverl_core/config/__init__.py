"""The configuration: a typed model of every key of the YAML file, one file a section, and what loads and checks it."""

from iiverl_core.config.listing import show
from iiverl_core.config.loading import Loaded, Origin, build, load
from iiverl_core.config.problems import Problem, render
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.run_config import (
    ConversationConfig,
    LossConfig,
    MicroBatching,
    Offload,
    RewardsConfig,
    RoleConfig,
    RunConfig,
    TrainingConfig,
    run_config,
)
from iiverl_core.config.sections.actor import ActorConfig, PolicyLossConfig, RefConfig
from iiverl_core.config.sections.actor_rollout_ref import ActorRolloutRefConfig
from iiverl_core.config.sections.algorithm import (
    AlgorithmConfig,
    FilterGroupsConfig,
    KLControlConfig,
    RolloutCorrectionConfig,
)
from iiverl_core.config.sections.critic import CriticConfig, CriticModelConfig
from iiverl_core.config.sections.custom_reward_function import CustomRewardFunctionConfig
from iiverl_core.config.sections.data import DataConfig
from iiverl_core.config.sections.model import ModelConfig
from iiverl_core.config.sections.optim import OptimConfig
from iiverl_core.config.sections.parallel import FSDPConfig, MegatronConfig
from iiverl_core.config.sections.reward_api import RewardAPIConfig
from iiverl_core.config.sections.reward_model import OverlongBufferConfig, RewardModelConfig
from iiverl_core.config.sections.rollout import ROLLOUT, RolloutConfig, ValKwargs
from iiverl_core.config.sections.root import Config
from iiverl_core.config.sections.section import LOSS_MODE
from iiverl_core.config.sections.trainer import TrainerConfig

__all__ = [
    "LOSS_MODE",
    "ROLE_KEYS",
    "ROLLOUT",
    "ActorConfig",
    "ActorRolloutRefConfig",
    "AlgorithmConfig",
    "Config",
    "ConversationConfig",
    "CriticConfig",
    "CriticModelConfig",
    "CustomRewardFunctionConfig",
    "DataConfig",
    "FSDPConfig",
    "FilterGroupsConfig",
    "KLControlConfig",
    "Loaded",
    "LossConfig",
    "MegatronConfig",
    "MicroBatching",
    "ModelConfig",
    "Offload",
    "OptimConfig",
    "Origin",
    "OverlongBufferConfig",
    "PolicyLossConfig",
    "Problem",
    "RefConfig",
    "RewardAPIConfig",
    "RewardModelConfig",
    "RewardsConfig",
    "Role",
    "RoleConfig",
    "RolloutConfig",
    "RolloutCorrectionConfig",
    "RunConfig",
    "TrainerConfig",
    "TrainingConfig",
    "ValKwargs",
    "build",
    "load",
    "render",
    "run_config",
    "show",
]
