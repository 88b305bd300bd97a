"""The section `critic`: the value model of PPO."""

from typing import Annotated

from iiverl_core.config.sections.algorithm import KLControlConfig
from iiverl_core.config.sections.choices import FSDP, ONLY_FSDP, Strategy, only_megatron
from iiverl_core.config.sections.model import (
    RANDOM_WEIGHTS,
    FSDPConfig,
    MegatronConfig,
    ModelConfig,
    OptimConfig,
)
from iiverl_core.config.sections.section import (
    BACKEND,
    Count,
    NoEffect,
    Nonnegative,
    OnlyWhen,
    PathStr,
    Positive,
    Section,
    follows,
)


class CriticOptimConfig(OptimConfig):
    """AdamW and the learning-rate schedule of the critic."""

    lr: Nonnegative = 1e-5
    """Learning rate after the warm-up."""


class CriticModelConfig(ModelConfig):
    """The initial model of the critic, and its layout on the devices."""

    tokenizer_path: Annotated[PathStr, NoEffect("the critic reads the actor's tokens")] = follows(
        "actor_rollout_ref.model.path"
    )
    """Folder or Hub name of the critic's tokenizer."""
    external_lib: str | None = follows("actor_rollout_ref.model.external_lib")
    """Python module to import first, for example to register a model with transformers."""
    fsdp_config: Annotated[FSDPConfig, ONLY_FSDP] = FSDPConfig()


class CriticConfig(Section):
    """Training of the critic: loss, batches, optimizer, and layout on the devices."""

    enable: bool | None = None
    """Train a critic; null does so if `algorithm.adv_estimator` needs one, as `gae` does."""
    strategy: Strategy = "fsdp"
    """Training backend."""
    optim: CriticOptimConfig = CriticOptimConfig()
    model: CriticModelConfig
    ppo_mini_batch_size: Count = follows("actor_rollout_ref.actor.ppo_mini_batch_size")
    """Prompts per optimizer step."""
    ppo_micro_batch_size: Count | None = None
    """Sequences per micro-batch, over all devices."""
    ppo_micro_batch_size_per_gpu: Count | None = None
    """Sequences per micro-batch on each device; null fills micro-batches up to the token budget."""
    forward_micro_batch_size: Count | None = follows("critic.ppo_micro_batch_size")
    """Sequences per micro-batch of passes without gradients, over all devices."""
    forward_micro_batch_size_per_gpu: Count | None = follows("critic.ppo_micro_batch_size_per_gpu")
    """Sequences per micro-batch of passes without gradients, on each device."""
    use_dynamic_bsz: bool = follows("actor_rollout_ref.actor.use_dynamic_bsz")
    """Fill micro-batches up to the token budget instead of counting sequences."""
    ppo_max_token_len_per_gpu: Count = 32768
    """Token budget of a micro-batch. Default at least one full sequence."""
    forward_max_token_len_per_gpu: Count = follows("critic.ppo_max_token_len_per_gpu")
    """Token budget of a micro-batch of passes without gradients."""
    ulysses_sequence_parallel_size: Annotated[Count, ONLY_FSDP] = 1
    """Devices over which each sequence is split (Ulysses); their token budgets add up."""
    ppo_epochs: Count = follows("actor_rollout_ref.actor.ppo_epochs")
    """Passes over the samples of a step."""
    shuffle: bool = follows("actor_rollout_ref.actor.shuffle")
    """Shuffle the mini-batches."""
    grad_clip: Annotated[Positive | None, OnlyWhen(BACKEND, FSDP, "critic.optim.clip_grad")] = follows(
        "critic.optim.clip_grad"
    )
    """Maximum gradient norm; null disables clipping."""
    cliprange_value: Nonnegative = 0.5
    """Clip range of values around those before the update."""
    megatron: Annotated[MegatronConfig, only_megatron()] = MegatronConfig()
    load_weight: Annotated[bool, RANDOM_WEIGHTS, only_megatron()] = True
    """Load the weights of the model; false starts from random weights. Megatron only."""
    param_offload: Annotated[bool, only_megatron("critic.model.fsdp_config.param_offload")] = False
    """Keep weights in CPU memory while they are not used. Megatron only."""
    grad_offload: Annotated[bool, only_megatron("critic.model.fsdp_config.param_offload")] = False
    """Keep gradients in CPU memory while they are not used. Megatron only."""
    optimizer_offload: Annotated[bool, only_megatron("critic.model.fsdp_config.optimizer_offload")] = False
    """Keep the optimizer state in CPU memory while it is not used. Megatron only."""
    kl_ctrl: Annotated[KLControlConfig, NoEffect("algorithm.kl_ctrl controls the KL divergence")] = (
        KLControlConfig()
    )
