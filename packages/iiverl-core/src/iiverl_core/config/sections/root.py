"""The whole configuration."""

from typing import Annotated, Any

from iiverl_core.config.sections.actor_rollout_ref import ActorRolloutRefConfig
from iiverl_core.config.sections.algorithm import AlgorithmConfig
from iiverl_core.config.sections.choices import WITH_CRITIC
from iiverl_core.config.sections.critic import CriticConfig
from iiverl_core.config.sections.custom_reward_function import CustomRewardFunctionConfig
from iiverl_core.config.sections.data import DataConfig
from iiverl_core.config.sections.reward_api import RewardAPIConfig
from iiverl_core.config.sections.reward_model import RewardModelConfig
from iiverl_core.config.sections.section import Section
from iiverl_core.config.sections.trainer import TrainerConfig
from iiverl_core.registry import BACKENDS, ENGINES, ESTIMATORS, REWARD_SOURCES, RewardSource
from iiverl_core.registry.rewards import CHOOSER


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
        """Name of the training backend."""
        return BACKENDS[self.actor_rollout_ref.actor.strategy].name

    @property
    def splits_models(self) -> bool:
        """Whether the backend splits models by tensor, pipeline and context, as the sections `megatron` say."""
        return BACKENDS[self.backend].splits_models

    @property
    def uses_critic(self) -> bool:
        """Whether a critic is trained."""
        asked = self.critic.enable
        estimator = ESTIMATORS.get(self.algorithm.adv_estimator)  # None for a user's function
        return (estimator is not None and estimator.needs_critic) if asked is None else asked

    @property
    def reward_sources(self) -> tuple[RewardSource, ...]:
        """The reward sources that the file asks for, in the order of the registry."""
        return tuple(source for source in REWARD_SOURCES.values() if source.key and self._asks_for(source))

    @property
    def reward_source(self) -> RewardSource | None:
        """The source that scores without a model of the run's; None if a reward model is the only one."""
        asked = self.reward_sources
        if not asked:
            return next(source for source in REWARD_SOURCES.values() if source.key is None)
        return next((source for source in asked if not source.needs_workers), None)

    def _asks_for(self, source: RewardSource) -> bool:
        value: Any = self
        for name in (source.key or "").split("."):
            value = getattr(value, name)
        return value == source.name if source.key == CHOOSER else value not in (None, False)

    @property
    def devices(self) -> int:
        """Devices in all, and so processes that train."""
        return self.trainer.nnodes * self.trainer.n_gpus_per_node

    @property
    def data_ranks(self) -> int:
        """Ranks that train on samples of their own: all devices, or copies of a split model on them."""
        sizes = self.actor_rollout_ref.actor.megatron
        copy = (
            sizes.tensor_model_parallel_size
            * sizes.pipeline_model_parallel_size
            * sizes.context_parallel_size
        )
        return max(self.devices // copy, 1) if self.splits_models else self.devices

    @property
    def engine_devices(self) -> int:
        """Devices over which one rollout engine is spread."""
        rollout = self.actor_rollout_ref.rollout
        return rollout.tensor_model_parallel_size if ENGINES[rollout.name].spans_devices else 1

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
