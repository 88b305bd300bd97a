"""The section `reward_model`: a model that scores responses."""

from typing import Annotated, Literal

from iiverl_core.config.sections.actor import Strategy
from iiverl_core.config.sections.model import ModelConfig
from iiverl_core.config.sections.parallel import FSDPConfig, MegatronConfig
from iiverl_core.config.sections.section import (
    ONLY_FSDP,
    Count,
    NoEffect,
    NotYet,
    Path,
    Section,
    follows,
    only_megatron,
)


class RewardModelModelConfig(ModelConfig):
    """The model that scores, and its place on the devices."""

    input_tokenizer: Path | None = follows("actor_rollout_ref.model.path")
    """Tokenizer that the responses were written with; null where it is the reward model's own."""
    path: Path = "~/models/FsfairX-LLaMA3-RM-v0.1"
    """Folder or Hub name of a sequence-classification model."""
    external_lib: str | None = follows("actor_rollout_ref.model.external_lib")
    """Python module that is imported first, to register a model that transformers does not have."""
    fsdp_config: Annotated[FSDPConfig, ONLY_FSDP] = FSDPConfig()


class RewardModelConfig(Section):
    """A model that scores responses."""

    enable: Annotated[bool, NotYet("reward models", (False,))] = False
    """Score with this model."""
    strategy: Strategy = "fsdp"
    """Backend that runs it."""
    model: RewardModelModelConfig
    micro_batch_size: Count | None = None
    """Sequences that go through the model together, counted over all devices."""
    micro_batch_size_per_gpu: Count | None = None
    """Sequences that go through the model together on one device; null fills up to the token budget."""
    max_length: Count | None = None
    """Tokens in prompt and response together at most; null for no bound."""
    truncation: Literal["left", "right", "error"] = "right"
    """End at which longer ones are cut off."""
    ulysses_sequence_parallel_size: Annotated[Count, ONLY_FSDP] = 1
    """Devices over which a sequence is split."""
    use_dynamic_bsz: bool = follows("critic.use_dynamic_bsz")
    """Fill micro-batches up to a token budget instead of counting sequences."""
    forward_max_token_len_per_gpu: Count = follows("critic.forward_max_token_len_per_gpu")
    """Tokens in a micro-batch at most, where it is filled to a budget."""
    reward_manager: Annotated[
        str, NoEffect("the rules, custom_reward_function and reward_api score each response on its own")
    ] = "naive"
    """How the rewards of a batch are gathered."""
    megatron: Annotated[MegatronConfig, only_megatron()] = MegatronConfig()
    load_weight: Annotated[bool, only_megatron()] = True
    """Read the model's weights, under Megatron; false starts from random ones."""
    param_offload: Annotated[bool, only_megatron("reward_model.model.fsdp_config.param_offload")] = False
    """Keep weights in CPU memory while they are not used, under Megatron."""
