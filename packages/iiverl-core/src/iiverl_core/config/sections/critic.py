"""The section `critic`: the value model of PPO."""

from typing import Annotated

from iiverl_core.config.sections.actor import ULYSSES
from iiverl_core.config.sections.algorithm import KLControlConfig
from iiverl_core.config.sections.choices import FSDP, ONLY_FSDP, Strategy, only_megatron
from iiverl_core.config.sections.model import ModelConfig
from iiverl_core.config.sections.optim import OptimConfig
from iiverl_core.config.sections.parallel import RANDOM_WEIGHTS, FSDPConfig, MegatronConfig
from iiverl_core.config.sections.section import (
    BACKEND,
    Count,
    NoEffect,
    Nonnegative,
    OnlyWhen,
    Path,
    Positive,
    Section,
    follows,
)


class CriticOptimConfig(OptimConfig):
    """AdamW and the learning-rate schedule of the critic."""

    lr: Nonnegative = 1e-5
    """Learning rate after the warm-up."""
    clip_grad: Annotated[Positive | None, only_megatron("critic.grad_clip")] = 1.0
    """Norm to which gradients are clipped, under Megatron."""


class CriticModelConfig(ModelConfig):
    """The model that the critic starts from, and its place on the devices."""

    tokenizer_path: Annotated[Path, NoEffect("the critic reads the actor's tokens")] = follows(
        "actor_rollout_ref.model.path"
    )
    """Folder or Hub name of the critic's tokenizer."""
    external_lib: str | None = follows("actor_rollout_ref.model.external_lib")
    """Python module that is imported first, to register a model that transformers does not have."""
    fsdp_config: Annotated[FSDPConfig, ONLY_FSDP] = FSDPConfig()


class CriticConfig(Section):
    """The critic's training: loss, batches, optimizer, and its place on the devices."""

    enable: bool | None = None
    """Train a critic; null does where `algorithm.adv_estimator` needs one, as `gae` does."""
    strategy: Strategy = "fsdp"
    """Training backend."""
    optim: CriticOptimConfig = CriticOptimConfig()
    model: CriticModelConfig
    ppo_mini_batch_size: Count = follows("actor_rollout_ref.actor.ppo_mini_batch_size")
    """Prompts to one optimizer step."""
    ppo_micro_batch_size: Count | None = None
    """Sequences that go through the model together, counted over all devices."""
    ppo_micro_batch_size_per_gpu: Count | None = None
    """Sequences that go through the model together on one device; null fills up to the token budget."""
    forward_micro_batch_size: Count | None = follows("critic.ppo_micro_batch_size")
    """The same where values are only computed, counted over all devices."""
    forward_micro_batch_size_per_gpu: Count | None = follows("critic.ppo_micro_batch_size_per_gpu")
    """The same where values are only computed, on one device."""
    use_dynamic_bsz: bool = follows("actor_rollout_ref.actor.use_dynamic_bsz")
    """Fill micro-batches up to a token budget instead of counting sequences."""
    ppo_max_token_len_per_gpu: Count = 32768
    """Tokens in a micro-batch at most, if it is filled to a budget; by default at least one whole sequence."""
    forward_max_token_len_per_gpu: Count = follows("critic.ppo_max_token_len_per_gpu")
    """The same where values are only computed."""
    ulysses_sequence_parallel_size: Annotated[Count, ULYSSES, ONLY_FSDP] = 1
    """Devices over which a sequence is split."""
    ppo_epochs: Count = follows("actor_rollout_ref.actor.ppo_epochs")
    """Passes over a step's samples."""
    shuffle: bool = follows("actor_rollout_ref.actor.shuffle")
    """Draw the mini-batches in a random order."""
    grad_clip: Annotated[Positive | None, OnlyWhen(BACKEND, FSDP, "critic.optim.clip_grad")] = 1.0
    """Norm to which gradients are clipped; null for no clipping."""
    cliprange_value: Nonnegative = 0.5
    """How far a value may move from the one before the update."""
    megatron: Annotated[MegatronConfig, only_megatron()] = MegatronConfig()
    load_weight: Annotated[bool, RANDOM_WEIGHTS, only_megatron()] = True
    """Read the model's weights, under Megatron; false starts from random ones."""
    param_offload: Annotated[bool, only_megatron("critic.model.fsdp_config.param_offload")] = False
    """Keep weights in CPU memory while they are not used, under Megatron."""
    grad_offload: Annotated[bool, only_megatron("critic.model.fsdp_config.param_offload")] = False
    """Keep gradients in CPU memory while they are not used, under Megatron."""
    optimizer_offload: Annotated[bool, only_megatron("critic.model.fsdp_config.optimizer_offload")] = False
    """Keep the optimizer's state in CPU memory while it is not used, under Megatron."""
    kl_ctrl: Annotated[KLControlConfig, NoEffect("algorithm.kl_ctrl controls the KL divergence")] = (
        KLControlConfig()
    )
