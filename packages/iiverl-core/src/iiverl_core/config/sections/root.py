"""The whole configuration."""

from typing import Annotated, Any

from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.sections.actor import ActorConfig, RefConfig
from iiverl_core.config.sections.algorithm import AlgorithmConfig
from iiverl_core.config.sections.choices import WITH_CRITIC
from iiverl_core.config.sections.critic import CriticConfig
from iiverl_core.config.sections.data import DataConfig
from iiverl_core.config.sections.model import ModelConfig
from iiverl_core.config.sections.profiler import GlobalProfilerConfig
from iiverl_core.config.sections.ray import RayConfig
from iiverl_core.config.sections.rewards import CustomRewardFunctionConfig, RewardAPIConfig, RewardModelConfig
from iiverl_core.config.sections.rollout import RolloutConfig
from iiverl_core.config.sections.section import NotYet, Section
from iiverl_core.config.sections.trainer import TrainerConfig
from iiverl_core.registry import (
    BACKENDS,
    ENGINES,
    ESTIMATORS,
    REWARD_MODEL,
    REWARD_SOURCES,
    ROLLOUTERS,
    RewardSource,
)
from iiverl_core.registry.rewards import MANAGER_KEY


class ActorRolloutRefConfig(Section):
    """The trained model: as actor, in the rollout engine, as reference."""

    hybrid_engine: Annotated[
        bool, NotYet("this key (trainer.rollout_devices counts the devices that only generate)", (True,))
    ] = True
    """Train and generate on the same devices."""
    model: ModelConfig = ModelConfig()
    actor: ActorConfig
    ref: RefConfig
    rollout: RolloutConfig


class Config(Section):
    """The whole configuration, one field per section of the YAML file."""

    data: DataConfig
    actor_rollout_ref: ActorRolloutRefConfig
    critic: Annotated[CriticConfig, WITH_CRITIC]
    reward_model: RewardModelConfig
    reward_api: RewardAPIConfig
    custom_reward_function: CustomRewardFunctionConfig
    algorithm: AlgorithmConfig
    trainer: TrainerConfig
    global_profiler: GlobalProfilerConfig = GlobalProfilerConfig()
    ray_kwargs: RayConfig = RayConfig()

    def at(self, key: str) -> Any:
        """Return the value of a key or a section by its full path."""
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
        """Whether the backend splits models by tensor, pipeline and context, according to the sections `megatron`."""
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
        """The reward source beside a reward model; None if a reward model is the only one."""
        asked = self.reward_sources
        if not asked:
            loop = self.actor_rollout_ref.rollout.agent.default_agent_loop
            return REWARD_SOURCES[ROLLOUTERS[loop].reward_source]
        return next((source for source in asked if source is not REWARD_MODEL), None)

    def _asks_for(self, source: RewardSource) -> bool:
        value = self.at(source.key or "")
        return value == source.name if source.key == MANAGER_KEY else value not in (None, False)

    @property
    def devices(self) -> int:
        """Number of devices that train."""
        return self.trainer.nnodes * self.trainer.n_gpus_per_node

    def sequence_split(self, role: Role) -> int:
        """Count the devices over which FSDP splits each sequence of a model."""
        return 1 if self.splits_models else self.at(ROLE_KEYS[role].sequence_split)

    def data_ranks(self, role: Role) -> int:
        """Count the data-parallel ranks of a model: groups of devices that share a sequence, or copies of a split model."""
        sizes = self.actor_rollout_ref.actor.megatron
        copy = (
            sizes.tensor_model_parallel_size
            * sizes.pipeline_model_parallel_size
            * sizes.context_parallel_size
        )
        return max(self.devices // (copy if self.splits_models else self.sequence_split(role)), 1)

    @property
    def engine_devices(self) -> int:
        """Number of devices per rollout engine."""
        rollout = self.actor_rollout_ref.rollout
        return rollout.tensor_model_parallel_size if ENGINES[rollout.name].spans_devices else 1

    @property
    def kl_in_reward(self) -> bool:
        """Whether the reward includes a KL penalty."""
        asked = self.algorithm.use_kl_in_reward
        return not self.actor_rollout_ref.actor.use_kl_loss if asked is None else asked

    @property
    def needs_reference(self) -> bool:
        """Whether anything in the run reads the reference policy's log-probs."""
        in_reward = self.kl_in_reward and self.algorithm.kl_ctrl.kl_coef != 0
        return in_reward or self.actor_rollout_ref.actor.use_kl_loss
