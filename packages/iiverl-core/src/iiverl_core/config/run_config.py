"""`RunConfig`: a run in iiverl's own terms, built from a configuration in verl's terms.

`Config` has the structure of verl's YAML, in which the settings of a model are in up to four sections. `RunConfig` has them
by role. Only this package uses verl's key names: other messages get the name of a key from `RoleConfig.key`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from iiverl_core.config.model_facts import fold_rope
from iiverl_core.config.roles import ROLE_KEYS, MicroBatchKeys, Role, RoleKeys
from iiverl_core.config.sections.actor import CheckpointConfig
from iiverl_core.config.sections.algorithm import AlgorithmConfig
from iiverl_core.config.sections.data import DataConfig
from iiverl_core.config.sections.model import FSDPConfig, MegatronConfig, ModelConfig, OptimConfig
from iiverl_core.config.sections.ray import RayInitConfig
from iiverl_core.config.sections.rewards import (
    CustomRewardFunctionConfig,
    OverlongBufferConfig,
    RewardAPIConfig,
)
from iiverl_core.config.sections.rollout import RolloutConfig
from iiverl_core.config.sections.root import Config
from iiverl_core.config.sections.trainer import TrainerConfig
from iiverl_core.registry import ENGINES, ROLLOUTERS
from iiverl_core.registry.algorithms import estimator_info


@dataclass(frozen=True)
class Offload:
    """Parts of the state of a model that are kept in CPU memory while they are not used."""

    parameters: bool = False
    gradients: bool = False
    optimizer: bool = False


@dataclass(frozen=True)
class MicroBatching:
    """Size of a micro-batch on one data-parallel rank: `sequences` or, if that is None, at most `tokens` tokens."""

    sequences: int | None
    tokens: int


@dataclass(frozen=True)
class TrainingConfig:
    """Training of a model. `mini_batch_size` counts prompts, `epochs` counts passes over the samples of a step."""

    optimizer: OptimConfig
    grad_clip: float | None
    micro_batching: MicroBatching
    mini_batch_size: int
    epochs: int
    shuffle: bool


@dataclass(frozen=True)
class RoleConfig:
    """One model of a run.

    `default_dtype` is the dtype of the master weights if `parallel` has none. `forward` bounds the micro-batches of passes
    without gradients. `training` is None if the model is not trained. `data_ranks` counts the data-parallel ranks, each of
    `sequence_split` devices that share sequences under FSDP. `weights` is a folder of Hugging Face weights to
    start from in place of those at `model.path`. With `is_base`, the model is the actor's without its LoRA adapters, and is
    not built. With `freeze_vision_tower`, the vision tower of a model that reads images is not trained.
    """

    role: Role
    model: ModelConfig
    parallel: FSDPConfig | MegatronConfig
    offload: Offload
    default_dtype: Literal["fp32", "bf16"]
    forward: MicroBatching
    training: TrainingConfig | None
    sequence_split: int
    data_ranks: int
    _keys: Mapping[str, str] = field(repr=False)
    weights: Path | None = None
    is_base: bool = False
    freeze_vision_tower: bool = False

    def key(self, name: str) -> str:
        """Return the YAML key of a setting: `key("model.path")` of the critic is `critic.model.path`.

        Args:
            name: attributes of this object, joined by dots.

        Raises:
            KeyError: there is no key of this name.
        """
        head = name
        while head not in self._keys:
            head, dot, _ = head.rpartition(".")
            if not dot:
                raise KeyError(name)
        return self._keys[head] + name[len(head) :]


@dataclass(frozen=True)
class LossConfig:
    """The losses of actor and critic.

    `policy_loss` is a name or a user function, `path/to/file.py:name`. The options from `clip_low` to `tau_neg`
    are read by some policy losses only. `max_tokens_norm` divides the losses under `seq-mean-token-sum-norm`.
    """

    policy_loss: str
    clip_low: float
    clip_high: float
    clip_dual: float
    clip_cov_ratio: float
    clip_cov_lb: float
    clip_cov_ub: float
    kl_cov_ratio: float
    ppo_kl_coef: float
    tau_pos: float
    tau_neg: float
    loss_agg_mode: str
    max_tokens_norm: float
    entropy_coeff: float
    use_kl_loss: bool
    kl_loss_coef: float
    kl_loss_type: str
    value_clip: float


@dataclass(frozen=True)
class ConversationConfig:
    """The sequences that a reward model reads.

    If `input_tokenizer` is None, they have the policy's tokens; otherwise their text is tokenized for the reward model.
    """

    input_tokenizer: str | None
    max_length: int | None
    truncation: Literal["left", "right", "error"]


@dataclass(frozen=True)
class RewardsConfig:
    """The sources of scores.

    `source` is the name of the reward source; None if a reward model is the only one. With `adds_environment`, the rewards
    of the environment are added to it. `conversation` is None without a reward model.
    """

    source: str | None
    adds_environment: bool
    api: RewardAPIConfig
    function: CustomRewardFunctionConfig
    overlong: OverlongBufferConfig
    conversation: ConversationConfig | None

    @property
    def by_turn(self) -> bool:
        """Whether a part of the score is credited to the turns that earned it."""
        return self.adds_environment or self.source == "environment"


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of steps: those that are recorded, by which ranks (None for all), of what, and the folder for them."""

    steps: frozenset[int]
    ranks: frozenset[int] | None
    contents: frozenset[str]
    folder: Path


@dataclass(frozen=True)
class RunConfig:
    """A run: immutable, picklable, made by `run_config`.

    `roles` has only the models of the run, the actor first: a reference, critic or reward model only if it is used.
    `devices` counts the devices that train, `engine_devices` the devices of one rollout engine. With `kl_in_reward`, the KL divergence from the reference is subtracted from the reward.
    Without `generates`, its responses are recorded, and it has no engine.
    """

    backend: str
    roles: Mapping[Role, RoleConfig]
    rollout: RolloutConfig
    algorithm: AlgorithmConfig
    loss: LossConfig
    rewards: RewardsConfig
    data: DataConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    devices: int
    engine_devices: int
    kl_in_reward: bool
    profile: ProfileConfig | None
    ray: RayInitConfig
    generates: bool = True

    @property
    def syncs_adapters(self) -> bool:
        """Whether engines keep the base model's weights and get LoRA adapters after every step."""
        return self.actor.model.lora_rank > 0 and self.rollout.lora_sync == "adapter"

    @property
    def interrupts_rollouts(self) -> bool:
        """Whether engines get newer weights while they are writing responses."""
        reads = ENGINES[self.rollout.name].reads
        return self.rollout.partial and self.trainer.max_staleness > 0 and "partial" in reads

    @property
    def trains_in_parts(self) -> bool:
        """Whether a mini-batch is trained as soon as its responses are there, while others of the step are written."""
        return self.interrupts_rollouts and self.has_independent_mini_batches

    @property
    def has_independent_mini_batches(self) -> bool:
        """Whether nothing of a mini-batch depends on the rest of the step, of which there is more.

        Neither the prompts that make it up, nor baselines, nor advantages, nor values and old log-probs, which the trainer
        would have to compute before the step's first update.
        """
        estimator = estimator_info(self.algorithm.adv_estimator)
        return (
            self.data.train_batch_size > self.training("actor").mini_batch_size
            and estimator.per_group
            and not estimator.greedy_baseline
            and not self.uses_critic
            and not self.algorithm.filter_groups.enable
            and not self.kl_in_reward
            and self.algorithm.rollout_correction.bypass_old_log_prob
        )

    @property
    def folder(self) -> Path:
        """The run's folder, which holds its metrics and checkpoints."""
        return Path(self.trainer.default_local_dir).absolute()

    @property
    def actor(self) -> RoleConfig:
        """The policy; every run has it."""
        return self.roles["actor"]

    def training(self, role: Role) -> TrainingConfig:
        """How a model is trained.

        Raises:
            ValueError: it is not.
        """
        if (training := self.roles[role].training) is None:
            raise ValueError(f"the {role} of this run is not trained")
        return training

    @property
    def needs_reference(self) -> bool:
        """Whether anything in the run reads the reference policy's log-probs."""
        return "reference" in self.roles

    @property
    def uses_critic(self) -> bool:
        """Whether a critic is trained."""
        return "critic" in self.roles

    @property
    def uses_reward_model(self) -> bool:
        """Whether a model scores the responses."""
        return "reward" in self.roles


def run_config(config: Config) -> RunConfig:
    """Build the run that a valid configuration describes."""
    there: dict[Role, bool] = {
        "actor": True,
        "reference": config.needs_reference,
        "critic": config.uses_critic,
        "reward": config.reward_model.enable,
    }
    return RunConfig(
        backend=config.backend,
        roles={role: _role(config, role) for role, needed in there.items() if needed},
        rollout=config.actor_rollout_ref.rollout,
        algorithm=config.algorithm,
        loss=_loss(config),
        rewards=_rewards(config),
        data=config.data,
        trainer=config.trainer,
        checkpoint=config.actor_rollout_ref.actor.checkpoint,
        devices=config.devices,
        engine_devices=config.engine_devices,
        kl_in_reward=config.kl_in_reward,
        profile=_profile(config),
        ray=config.ray_kwargs.ray_init,
    )


def _profile(config: Config) -> ProfileConfig | None:
    profiler, which = config.actor_rollout_ref.actor.profiler, config.global_profiler
    if not profiler.enable or which.tool is None or not which.steps:
        return None
    return ProfileConfig(
        steps=frozenset(which.steps),
        ranks=None if profiler.all_ranks else frozenset(profiler.ranks or (0,)),
        contents=frozenset(profiler.tool_config.torch.contents or ("cpu", "cuda")),
        folder=Path(which.save_path).absolute(),
    )


def _role(config: Config, role: Role) -> RoleConfig:
    keys = ROLE_KEYS[role]
    model: ModelConfig = config.at(keys.model)
    named = _named_keys(keys, megatron=config.splits_models)
    offload = {
        name: config.at(named[f"offload.{name}"])
        for name in ("parameters", "gradients", "optimizer")
        if f"offload.{name}" in named
    }
    if not config.splits_models and config.at(f"{keys.fsdp}.offload_policy"):
        offload |= {"parameters": True, "optimizer": True}
    is_base = role == "reference" and model.lora_rank > 0 and model.lora_adapter_path is None
    return RoleConfig(
        role=role,
        model=_model(model),
        parallel=config.at(named["parallel"]),
        offload=Offload(**offload),
        default_dtype="fp32" if keys.training and not model.lora_rank else "bf16",
        forward=_micro_batching(config, role, keys.forward),
        training=_training(config, role, named, keys.training) if keys.training else None,
        sequence_split=config.sequence_split("actor" if is_base else role),
        data_ranks=config.data_ranks("actor" if is_base else role),
        _keys=named,
        is_base=is_base,
        freeze_vision_tower=role == "actor" and config.actor_rollout_ref.actor.freeze_vision_tower,
    )


def _model(model: ModelConfig) -> ModelConfig:
    return model.model_copy(update={"override_config": fold_rope(model.path, model.override_config)})


def _named_keys(keys: RoleKeys, *, megatron: bool) -> dict[str, str]:
    """Map the settings of a `RoleConfig`, or what contains them, to YAML keys."""
    named = {
        "model": keys.model,
        "parallel": keys.megatron if megatron else keys.fsdp,
        "offload.parameters": f"{keys.section if megatron else keys.fsdp}.param_offload",
        "forward.sequences": keys.forward.per_device,
        "forward.tokens": keys.forward.tokens,
    }
    if not megatron:  # FSDP has an offloading key for the optimizer of every model, and none for gradients
        named["offload.optimizer"] = f"{keys.fsdp}.optimizer_offload"
        named["sequence_split"] = keys.sequence_split
    if keys.training is None:
        return named
    if megatron:
        named["offload.gradients"] = f"{keys.section}.grad_offload"
        named["offload.optimizer"] = f"{keys.section}.optimizer_offload"
    optimizer = f"{keys.section}.optim"
    return named | {
        "training.optimizer": optimizer,
        "training.grad_clip": f"{optimizer}.clip_grad" if megatron else f"{keys.section}.grad_clip",
        "training.micro_batching.sequences": keys.training.per_device,
        "training.micro_batching.tokens": keys.training.tokens,
        "training.mini_batch_size": f"{keys.section}.ppo_mini_batch_size",
        "training.epochs": f"{keys.section}.ppo_epochs",
        "training.shuffle": f"{keys.section}.shuffle",
    }


def _training(config: Config, role: Role, named: Mapping[str, str], bounds: MicroBatchKeys) -> TrainingConfig:
    return TrainingConfig(
        micro_batching=_micro_batching(config, role, bounds),
        **{
            name: config.at(named[f"training.{name}"])
            for name in ("optimizer", "grad_clip", "mini_batch_size", "epochs", "shuffle")
        },
    )


def _micro_batching(config: Config, role: Role, bounds: MicroBatchKeys) -> MicroBatching:
    """Read the size of a micro-batch; a number of sequences takes precedence unless `dynamic` is set."""
    tokens = config.at(bounds.tokens) * config.sequence_split(role)
    per_device, in_all = config.at(bounds.per_device), config.at(bounds.sequences)
    if config.at(bounds.dynamic):
        return MicroBatching(None, tokens)
    if per_device is None and in_all is not None:
        per_device = max(in_all // config.data_ranks(role), 1)
    return MicroBatching(per_device, tokens)


def _loss(config: Config) -> LossConfig:
    actor = config.actor_rollout_ref.actor
    options = actor.policy_loss
    return LossConfig(
        policy_loss=options.loss_mode,
        clip_low=actor.clip_ratio_low,
        clip_high=actor.clip_ratio_high,
        clip_dual=actor.clip_ratio_c,
        clip_cov_ratio=options.clip_cov_ratio,
        clip_cov_lb=options.clip_cov_lb,
        clip_cov_ub=options.clip_cov_ub,
        kl_cov_ratio=options.kl_cov_ratio,
        ppo_kl_coef=options.ppo_kl_coef,
        tau_pos=actor.tau_pos,
        tau_neg=actor.tau_neg,
        loss_agg_mode=actor.loss_agg_mode,
        max_tokens_norm=actor.loss_scale_factor or config.data.max_response_length,
        entropy_coeff=actor.entropy_coeff,
        use_kl_loss=actor.use_kl_loss,
        kl_loss_coef=actor.kl_loss_coef,
        kl_loss_type=actor.kl_loss_type,
        value_clip=config.critic.cliprange_value,
    )


def _rewards(config: Config) -> RewardsConfig:
    model = config.reward_model
    conversation = ConversationConfig(model.model.input_tokenizer, model.max_length, model.truncation)
    source = config.reward_source
    rollout = config.actor_rollout_ref.rollout
    brings = ROLLOUTERS[rollout.agent.default_agent_loop].reward_source == "environment"
    alone = source is not None and source.name == "environment" and not model.enable
    turns = rollout.multi_turn
    is_agent = ROLLOUTERS[rollout.agent.default_agent_loop].name == "agent"
    section = turns.agent if is_agent else turns.environment
    return RewardsConfig(
        source=source.name if source else None,
        adds_environment=brings and not alone and section.add_reward,
        api=config.reward_api,
        function=config.custom_reward_function,
        overlong=model.overlong_buffer,
        conversation=conversation if model.enable else None,
    )
