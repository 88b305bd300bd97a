"""The sections `reward_api`, `custom_reward_function` and `reward_model`: what scores responses."""

from typing import Annotated, Any, Literal

from pydantic import Field

from iiverl_core.config.sections.choices import ONLY_FSDP, Strategy, only_megatron
from iiverl_core.config.sections.model import RANDOM_WEIGHTS, FSDPConfig, MegatronConfig, ModelConfig
from iiverl_core.config.sections.section import (
    Count,
    Float,
    Fraction,
    Names,
    Natural,
    NoEffect,
    Nonnegative,
    OnlyWhen,
    PathStr,
    Positive,
    Section,
    follows,
)

WITH_API = OnlyWhen("reward_api.enable", (True,))


class RewardAPIConfig(Section):
    """A reward server, and the treatment of samples without a score."""

    enable: bool = False
    """Score responses on a reward server."""
    api_url: Annotated[Names | None, WITH_API] = None
    """URL of the server, or a list of them."""
    max_workers: Annotated[Count, WITH_API] = 10
    """Maximum concurrent requests."""
    timeout: Annotated[Positive, WITH_API] = 30.0
    """Timeout of a request, in seconds."""
    verification_info_column: Annotated[str, WITH_API] = "verification_info"
    """Column of the dataset to send with each response."""
    save_dir: Annotated[PathStr | None, WITH_API] = "debug_data"
    """Folder for scored samples, under `train/` and `val/`; null for none."""
    save_freq: Annotated[Count, WITH_API] = 1
    """Training steps between these files; validations are always saved."""
    protocol: Annotated[Literal["auto", "reward", "v1", "openrlhf", "slime"], WITH_API] = "auto"
    """Protocol of the server; `auto` asks the server, and uses `POST /reward` if it offers nothing better."""
    token_env: Annotated[str | None, WITH_API] = None
    """Environment variable with the bearer token of the server; null for none."""
    cache_dir: Annotated[PathStr | None, WITH_API] = None
    """Folder of a cache of scores, by content and server version; null for no cache."""
    outage_patience: Annotated[Nonnegative, WITH_API] = 600.0
    """Seconds to wait for the server while more than `max_failed_fraction` of the samples have no score."""
    on_failure: Literal["exclude", "fail", "constant"] = "exclude"
    """Exclude a sample without a score from its group and the loss, fail the run, or use the constant `failure_score`."""
    failure_score: Annotated[Float, OnlyWhen("reward_api.on_failure", ("constant",))] = 0.0
    """Score of a failed sample with `on_failure: constant`."""
    max_failed_fraction: Fraction = 0.1
    """Fraction of the samples of a step that may have no score before the run stops; applies to every reward source."""


REWARD_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""Keyword arguments of a reward function."""


class CustomRewardFunctionConfig(Section):
    """A Python function `compute_score(data_source, solution_str, ground_truth, extra_info)` that scores a response."""

    path: PathStr | None = None
    """Python file of the function; null for the built-in rules."""
    name: str = "compute_score"
    """Name of the function."""
    reward_kwargs: dict[str, Any] = Field(default={})
    """Additional keyword arguments of the function."""
    timeout: Positive = 120.0
    """Seconds that a call may take before it is ended, and the response has no score."""
    workers: Natural | None = None
    """Processes that call the function; null for one per CPU core, at most 8, or one for a coroutine function, which is
    awaited for up to 64 responses side by side; 0 calls it in the run's own process, without a time limit."""


WITH_MODEL = OnlyWhen("reward_model.enable", (True,))
WITH_OVERLONG = OnlyWhen("reward_model.overlong_buffer.enable", (True,))


class RewardModelModelConfig(ModelConfig):
    """The reward model, and its layout on the devices."""

    input_tokenizer: PathStr | None = follows("actor_rollout_ref.model.path")
    """Tokenizer of the policy, if it differs from the reward model's; null if they are the same."""
    path: PathStr = "~/models/FsfairX-LLaMA3-RM-v0.1"
    """Folder or Hub name of a sequence-classification model."""
    external_lib: str | None = follows("actor_rollout_ref.model.external_lib")
    """Python module to import first, for example to register a model with transformers."""
    fsdp_config: Annotated[FSDPConfig, ONLY_FSDP] = FSDPConfig()


class OverlongBufferConfig(Section):
    """DAPO's penalty on responses close to the maximum length, with or without a reward model.

    It decreases from 0 to `-penalty_factor` over the last `len` tokens of `data.max_response_length` (Yu et al. 2025,
    "DAPO: An open-source LLM reinforcement learning system at scale", section 3.4).
    """

    enable: bool = False
    """Add the penalty to the score."""
    len: Annotated[Natural, WITH_OVERLONG] = 0
    """Number of tokens before `data.max_response_length` over which the penalty grows."""
    penalty_factor: Annotated[Nonnegative, WITH_OVERLONG] = 0.0
    """Penalty of a response of maximum length."""
    log: Annotated[bool, NoEffect("the penalty is always a component of the reward")] = False
    """Log the penalty separately."""


class RewardModelConfig(Section):
    """A reward model, run on the devices of the run."""

    enable: bool = False
    """Score responses with this model."""
    strategy: Annotated[Strategy, WITH_MODEL] = "fsdp"
    """Backend that runs the model."""
    model: Annotated[RewardModelModelConfig, WITH_MODEL]
    micro_batch_size: Annotated[Count | None, WITH_MODEL] = None
    """Sequences per micro-batch, over all devices."""
    micro_batch_size_per_gpu: Annotated[Count | None, WITH_MODEL] = None
    """Sequences per micro-batch on each device; null fills micro-batches up to the token budget."""
    max_length: Annotated[Count | None, WITH_MODEL] = None
    """Maximum tokens of prompt and response together; null for no limit."""
    truncation: Annotated[Literal["left", "right", "error"], WITH_MODEL] = "right"
    """How to truncate longer sequences."""
    ulysses_sequence_parallel_size: Annotated[Count, WITH_MODEL, ONLY_FSDP] = 1
    """Devices over which each sequence is split (Ulysses); their token budgets add up."""
    use_dynamic_bsz: Annotated[bool, WITH_MODEL] = follows("critic.use_dynamic_bsz")
    """Fill micro-batches up to the token budget instead of counting sequences."""
    forward_max_token_len_per_gpu: Annotated[Count, WITH_MODEL] = follows(
        "critic.forward_max_token_len_per_gpu"
    )
    """Token budget of a micro-batch."""
    reward_manager: str = "naive"
    """Reward source of an installed package, by name; the names of verl's reward managers have no effect."""
    overlong_buffer: OverlongBufferConfig = OverlongBufferConfig()
    megatron: Annotated[MegatronConfig, WITH_MODEL, only_megatron()] = MegatronConfig()
    load_weight: Annotated[bool, WITH_MODEL, RANDOM_WEIGHTS, only_megatron()] = True
    """Load the weights of the model; false starts from random weights. Megatron only."""
    param_offload: Annotated[
        bool, WITH_MODEL, only_megatron("reward_model.model.fsdp_config.param_offload")
    ] = False
    """Keep weights in CPU memory while they are not used. Megatron only."""
