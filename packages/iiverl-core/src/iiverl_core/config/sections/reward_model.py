"""The section `reward_model`: a model that scores responses."""

from typing import Annotated, Literal

from iiverl_core.config.sections.actor import ULYSSES
from iiverl_core.config.sections.choices import ONLY_FSDP, Strategy, only_megatron
from iiverl_core.config.sections.model import ModelConfig
from iiverl_core.config.sections.parallel import RANDOM_WEIGHTS, FSDPConfig, MegatronConfig
from iiverl_core.config.sections.section import (
    Count,
    Natural,
    NoEffect,
    Nonnegative,
    OnlyWhen,
    Path,
    Section,
    follows,
)

WHEN_ENABLED = OnlyWhen("reward_model.enable", (True,))
WHEN_LONG = OnlyWhen("reward_model.overlong_buffer.enable", (True,))


class RewardModelModelConfig(ModelConfig):
    """The model that scores, and its place on the devices."""

    input_tokenizer: Path | None = follows("actor_rollout_ref.model.path")
    """Tokenizer that the responses were written with; null where it is the reward model's own."""
    path: Path = "~/models/FsfairX-LLaMA3-RM-v0.1"
    """Folder or Hub name of a sequence-classification model."""
    external_lib: str | None = follows("actor_rollout_ref.model.external_lib")
    """Python module that is imported first, to register a model that transformers does not have."""
    fsdp_config: Annotated[FSDPConfig, ONLY_FSDP] = FSDPConfig()


class OverlongBufferConfig(Section):
    """DAPO's penalty on responses that come near their greatest length, with or without a reward model.

    It falls from 0 to `-penalty_factor` over the last `len` tokens of `data.max_response_length` (Yu et al. 2025,
    "DAPO: An open-source LLM reinforcement learning system at scale", section 3.4).
    """

    enable: bool = False
    """Add the penalty to the score."""
    len: Annotated[Natural, WHEN_LONG] = 0
    """Tokens before `data.max_response_length` over which the penalty grows."""
    penalty_factor: Annotated[Nonnegative, WHEN_LONG] = 0.0
    """The penalty of a response of greatest length."""
    log: Annotated[bool, NoEffect("the penalty is always a component of the reward")] = False
    """Report the penalty by itself."""


class RewardModelConfig(Section):
    """A model that scores responses."""

    enable: bool = False
    """Score with this model."""
    strategy: Annotated[Strategy, WHEN_ENABLED] = "fsdp"
    """Backend that runs it."""
    model: Annotated[RewardModelModelConfig, WHEN_ENABLED]
    micro_batch_size: Annotated[Count | None, WHEN_ENABLED] = None
    """Sequences that go through the model together, counted over all devices."""
    micro_batch_size_per_gpu: Annotated[Count | None, WHEN_ENABLED] = None
    """Sequences that go through the model together on one device; null fills up to the token budget."""
    max_length: Annotated[Count | None, WHEN_ENABLED] = None
    """Tokens in prompt and response together at most; null for no bound."""
    truncation: Annotated[Literal["left", "right", "error"], WHEN_ENABLED] = "right"
    """End at which longer ones are cut off."""
    ulysses_sequence_parallel_size: Annotated[Count, ULYSSES, WHEN_ENABLED, ONLY_FSDP] = 1
    """Devices over which a sequence is split."""
    use_dynamic_bsz: Annotated[bool, WHEN_ENABLED] = follows("critic.use_dynamic_bsz")
    """Fill micro-batches up to a token budget instead of counting sequences."""
    forward_max_token_len_per_gpu: Annotated[Count, WHEN_ENABLED] = follows(
        "critic.forward_max_token_len_per_gpu"
    )
    """Tokens in a micro-batch at most, where it is filled to a budget."""
    reward_manager: str = "naive"
    """Source of rewards that an installed package offers under this name; the names of verl's managers do nothing."""
    overlong_buffer: OverlongBufferConfig = OverlongBufferConfig()
    megatron: Annotated[MegatronConfig, WHEN_ENABLED, only_megatron()] = MegatronConfig()
    load_weight: Annotated[bool, WHEN_ENABLED, RANDOM_WEIGHTS, only_megatron()] = True
    """Read the model's weights, under Megatron; false starts from random ones."""
    param_offload: Annotated[
        bool, WHEN_ENABLED, only_megatron("reward_model.model.fsdp_config.param_offload")
    ] = False
    """Keep weights in CPU memory while they are not used, under Megatron."""
