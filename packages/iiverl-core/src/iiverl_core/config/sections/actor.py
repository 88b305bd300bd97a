"""The sections `actor_rollout_ref.actor` and `actor_rollout_ref.ref`: the trained policy and its reference."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from iiverl_core.config.sections.choices import (
    FSDP,
    ONLY_FSDP,
    KLKind,
    LossAggMode,
    LossMode,
    Strategy,
    only_losses,
    only_megatron,
)
from iiverl_core.config.sections.model import RANDOM_WEIGHTS, FSDPConfig, MegatronConfig, OptimConfig
from iiverl_core.config.sections.profiler import ProfilerConfig
from iiverl_core.config.sections.section import (
    BACKEND,
    Count,
    Float,
    Fraction,
    NoEffect,
    Nonnegative,
    OnlyWhen,
    Positive,
    Section,
    follows,
    one_or_more,
)

Content = Literal["model", "optimizer", "extra", "hf_model"]


class PolicyLossConfig(Section):
    """The policy loss, and options that only some losses read."""

    loss_mode: LossMode = "vanilla"
    """Policy loss: a name (`vanilla` is PPO's clipped loss), or a user function, `path/to/file.py:name`."""
    clip_cov_ratio: Annotated[Fraction, only_losses("clip_cov_ratio")] = 0.0002
    """Fraction of the tokens of a mini-batch that Clip-Cov detaches from the gradient."""
    clip_cov_lb: Annotated[Float, only_losses("clip_cov_lb")] = 1.0
    """Lowest covariance of log-prob and advantage at which Clip-Cov selects a token."""
    clip_cov_ub: Annotated[Float, only_losses("clip_cov_ub")] = 5.0
    """Highest covariance at which Clip-Cov selects a token."""
    kl_cov_ratio: Annotated[Fraction, only_losses("kl_cov_ratio")] = 0.0002
    """Fraction of the tokens of a mini-batch, those of highest covariance, to which KL-Cov adds a KL penalty."""
    ppo_kl_coef: Annotated[Nonnegative, only_losses("ppo_kl_coef")] = 0.1
    """Coefficient of KL-Cov's KL penalty."""


class CheckpointConfig(Section):
    """Contents of a checkpoint."""

    save_contents: Annotated[
        tuple[Content, ...],
        BeforeValidator(one_or_more, json_schema_input_type=Content | tuple[Content, ...]),
    ] = (
        "model",
        "optimizer",
        "extra",
    )
    """Parts to save; a run resumes from the first three, and `hf_model` is a folder that transformers and vLLM read."""
    async_save: bool = True
    """Write a checkpoint while training continues."""


class ActorConfig(Section):
    """Training of the policy: loss, batches, optimizer, and layout on the devices."""

    strategy: Strategy = "fsdp"
    """Training backend; `fsdp` and `fsdp2` both mean FSDP2."""
    ppo_mini_batch_size: Count = 256
    """Prompts per optimizer step, each with `actor_rollout_ref.rollout.n` responses. Default 256, or the nearest divisor of `data.train_batch_size`."""
    ppo_micro_batch_size: Count | None = None
    """Sequences per micro-batch, over all devices."""
    ppo_micro_batch_size_per_gpu: Count | None = None
    """Sequences per micro-batch on each device; null fills micro-batches up to the token budget."""
    use_dynamic_bsz: bool = False
    """Fill micro-batches up to `ppo_max_token_len_per_gpu` tokens instead of counting sequences."""
    ppo_max_token_len_per_gpu: Count = 16384
    """Token budget of a micro-batch. Default at least one full sequence."""
    grad_clip: Annotated[
        Positive | None, OnlyWhen(BACKEND, FSDP, "actor_rollout_ref.actor.optim.clip_grad")
    ] = follows("actor_rollout_ref.actor.optim.clip_grad")
    """Maximum gradient norm; null disables clipping."""
    clip_ratio: Annotated[Fraction, only_losses("clip_low")] = 0.2
    """Clip range of the probability ratio, ε in PPO."""
    clip_ratio_low: Annotated[Nonnegative, only_losses("clip_low")] = follows(
        "actor_rollout_ref.actor.clip_ratio"
    )
    """Lower clip range; the ratio is clipped at 1 - clip_ratio_low."""
    clip_ratio_high: Annotated[Nonnegative, only_losses("clip_high")] = follows(
        "actor_rollout_ref.actor.clip_ratio"
    )
    """Upper clip range; the ratio is clipped at 1 + clip_ratio_high."""
    clip_ratio_c: Annotated[Float, Field(gt=1), only_losses("clip_dual")] = 3.0
    """Dual-clip bound of the ratio for negative advantages; for DPPO, the cap of the ratio."""
    tau_pos: Annotated[Positive, only_losses("tau_pos")] = 1.0
    """SAPO's temperature for positive advantages; a higher one closes the soft gate faster."""
    tau_neg: Annotated[Positive, only_losses("tau_neg")] = 1.05
    """SAPO's temperature for negative advantages."""
    tis_imp_ratio_cap: Float = -1.0
    """Cap of the importance weights in earlier verl; use `algorithm.rollout_correction` instead. -1 for none."""
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    loss_agg_mode: LossAggMode = "token-mean"
    """Aggregation of token losses into the loss of a batch."""
    loss_scale_factor: Positive | None = None
    """Divisor of `seq-mean-token-sum-norm`; null for `data.max_response_length`."""
    entropy_coeff: Float = 0.001
    """Coefficient of the entropy bonus in the loss."""
    use_kl_loss: bool = False
    """Add the KL divergence from the reference to the loss; by default it is then left out of the reward."""
    kl_loss_coef: Nonnegative = 0.001
    """Coefficient of the KL loss."""
    kl_loss_type: KLKind = "low_var_kl"
    """Estimator of the KL divergence in the loss; with `+`, its gradient is unbiased."""
    use_torch_compile: Annotated[
        bool, NoEffect("the loss is not compiled; fsdp_config.compile_blocks compiles transformer blocks")
    ] = True
    """Compile the loss."""
    ppo_epochs: Count = 1
    """Passes over the samples of a step."""
    shuffle: bool = False
    """Shuffle the mini-batches."""
    ulysses_sequence_parallel_size: Annotated[Count, ONLY_FSDP] = 1
    """Devices over which each sequence is split (Ulysses); their token budgets add up."""
    freeze_vision_tower: Annotated[bool, ONLY_FSDP] = False
    """Train a model that reads images without its vision tower, whose weights stay as they are."""
    optim: OptimConfig = OptimConfig()
    fsdp_config: Annotated[FSDPConfig, ONLY_FSDP] = FSDPConfig()
    megatron: Annotated[MegatronConfig, only_megatron()] = MegatronConfig()
    load_weight: Annotated[bool, RANDOM_WEIGHTS, only_megatron()] = True
    """Load the weights of the model; false starts from random weights. Megatron only."""
    param_offload: Annotated[bool, only_megatron("actor_rollout_ref.actor.fsdp_config.param_offload")] = False
    """Keep weights in CPU memory while they are not used. Megatron only."""
    grad_offload: Annotated[bool, only_megatron("actor_rollout_ref.actor.fsdp_config.param_offload")] = False
    """Keep gradients in CPU memory while they are not used. Megatron only."""
    optimizer_offload: Annotated[
        bool, only_megatron("actor_rollout_ref.actor.fsdp_config.optimizer_offload")
    ] = False
    """Keep the optimizer state in CPU memory while it is not used. Megatron only."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    profiler: ProfilerConfig = ProfilerConfig()


class RefConfig(Section):
    """The reference policy: the model before training."""

    strategy: Strategy = follows("actor_rollout_ref.actor.strategy")
    """Backend that runs the model."""
    fsdp_config: Annotated[FSDPConfig, ONLY_FSDP] = FSDPConfig()
    log_prob_micro_batch_size: Count | None = None
    """Sequences per micro-batch, over all devices."""
    log_prob_micro_batch_size_per_gpu: Count | None = None
    """Sequences per micro-batch on each device; null fills micro-batches up to the token budget."""
    log_prob_use_dynamic_bsz: bool = follows("actor_rollout_ref.actor.use_dynamic_bsz")
    """Fill micro-batches up to the token budget instead of counting sequences."""
    log_prob_max_token_len_per_gpu: Count = follows("actor_rollout_ref.actor.ppo_max_token_len_per_gpu")
    """Token budget of a micro-batch."""
    ulysses_sequence_parallel_size: Annotated[Count, ONLY_FSDP] = follows(
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
    )
    """Devices over which each sequence is split (Ulysses); their token budgets add up."""
    megatron: Annotated[MegatronConfig, only_megatron()] = MegatronConfig()
    load_weight: Annotated[bool, RANDOM_WEIGHTS, only_megatron()] = True
    """Load the weights of the model; false starts from random weights. Megatron only."""
    param_offload: Annotated[bool, only_megatron("actor_rollout_ref.ref.fsdp_config.param_offload")] = False
    """Keep weights in CPU memory while they are not used. Megatron only."""
