"""The whole configuration."""

from typing import Annotated, Any

from iiverl_core.config.sections.actor_rollout_ref import ActorRolloutRefConfig
from iiverl_core.config.sections.algorithm import WITH_CRITIC, AlgorithmConfig
from iiverl_core.config.sections.critic import CriticConfig
from iiverl_core.config.sections.custom_reward_function import CustomRewardFunctionConfig
from iiverl_core.config.sections.data import DataConfig
from iiverl_core.config.sections.reward_api import RewardAPIConfig
from iiverl_core.config.sections.reward_model import RewardModelConfig
from iiverl_core.config.sections.section import Section
from iiverl_core.config.sections.trainer import TrainerConfig


class Config(Section):
    """The whole configuration, one field a section of the YAML file."""

    data: DataConfig
    actor_rollout_ref: ActorRolloutRefConfig
    critic: Annotated[CriticConfig, WITH_CRITIC]
    reward_model: RewardModelConfig
    reward_api: RewardAPIConfig
    custom_reward_function: CustomRewardFunctionConfig
    algorithm: AlgorithmConfig
    trainer: TrainerConfig

    def at(self, key: str) -> Any:
        """Give the value of a key, or a section, by its full path."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name)
        return value

    @property
    def backend(self) -> str:
        """Name of the training backend: `fsdp` or `megatron`."""
        return "megatron" if self.actor_rollout_ref.actor.strategy == "megatron" else "fsdp"

    @property
    def uses_critic(self) -> bool:
        """Whether a critic is trained."""
        asked = self.critic.enable
        return self.algorithm.adv_estimator == "gae" if asked is None else asked

    @property
    def devices(self) -> int:
        """Devices in all, and so processes that train."""
        return self.trainer.nnodes * self.trainer.n_gpus_per_node

    @property
    def data_ranks(self) -> int:
        """Ranks that train on samples of their own: all devices or, under Megatron, copies of the model on them."""
        sizes = self.actor_rollout_ref.actor.megatron
        copy = (
            sizes.tensor_model_parallel_size
            * sizes.pipeline_model_parallel_size
            * sizes.context_parallel_size
        )
        return max(self.devices // copy, 1) if self.backend == "megatron" else self.devices

    @property
    def engine_devices(self) -> int:
        """Devices over which one rollout engine is spread."""
        rollout = self.actor_rollout_ref.rollout
        return rollout.tensor_model_parallel_size if rollout.name == "vllm" else 1

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL divergence from the reference is taken from the reward."""
        asked = self.algorithm.use_kl_in_reward
        return not self.actor_rollout_ref.actor.use_kl_loss if asked is None else asked

    @property
    def needs_reference(self) -> bool:
        """Whether anything in the run reads the reference policy's log-probs."""
        in_reward = self.kl_in_reward and self.algorithm.kl_ctrl.kl_coef != 0
        return in_reward or self.actor_rollout_ref.actor.use_kl_loss
