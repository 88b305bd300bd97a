"""The sections `actor_rollout_ref.actor` and `actor_rollout_ref.ref`: the policy that is trained, and what it is held to."""

from typing import Annotated

from pydantic import Field

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
from iiverl_core.config.sections.optim import OptimConfig
from iiverl_core.config.sections.parallel import RANDOM_WEIGHTS, FSDPConfig, MegatronConfig
from iiverl_core.config.sections.section import (
    BACKEND,
    Count,
    Float,
    Names,
    NoEffect,
    Nonnegative,
    NotYet,
    OnlyWhen,
    Positive,
    Section,
    Share,
    follows,
)

SAVED = ("model", "optimizer", "extra")
ULYSSES = NotYet("sequence parallelism (Ulysses)", (1,))


class PolicyLossConfig(Section):
    """Which policy loss, and what only some of them read."""

    loss_mode: LossMode = "vanilla"
    """The policy loss: by name (`vanilla` is PPO's, clipped), or a function of one's own, `path/to/file.py:name`."""
    clip_cov_ratio: Annotated[Share, only_losses("clip_cov_ratio")] = 0.0002
    """Share of a mini-batch's tokens that Clip-Cov leaves out of the gradient."""
    clip_cov_lb: Annotated[Float, only_losses("clip_cov_lb")] = 1.0
    """Covariance of log-prob and advantage from which Clip-Cov chooses tokens."""
    clip_cov_ub: Annotated[Float, only_losses("clip_cov_ub")] = 5.0
    """Covariance up to which Clip-Cov chooses tokens."""
    kl_cov_ratio: Annotated[Share, only_losses("kl_cov_ratio")] = 0.0002
    """Share of a mini-batch's tokens, those of highest covariance, that KL-Cov puts a KL penalty on."""
    ppo_kl_coef: Annotated[Nonnegative, only_losses("ppo_kl_coef")] = 0.1
    """Weight of that KL penalty."""


class CheckpointConfig(Section):
    """What a checkpoint holds."""

    save_contents: Annotated[Names, NotYet("checkpoints", (SAVED,), blocks=False)] = SAVED
    """Parts that are saved."""


class ActorConfig(Section):
    """The policy's training: loss, batches, optimizer, and its place on the devices."""

    strategy: Strategy = "fsdp"
    """Training backend; `fsdp` and `fsdp2` both mean FSDP2."""
    ppo_mini_batch_size: Count = 256
    """Prompts per optimizer step, each with its `actor_rollout_ref.rollout.n` responses; by default the divisor of `data.train_batch_size` nearest to 256."""
    ppo_micro_batch_size: Count | None = None
    """Sequences that go through the model together, counted over all devices."""
    ppo_micro_batch_size_per_gpu: Count | None = None
    """Sequences that go through the model together on one device; null fills up to the token budget."""
    use_dynamic_bsz: bool = False
    """Fill micro-batches up to `ppo_max_token_len_per_gpu` tokens instead of counting sequences."""
    ppo_max_token_len_per_gpu: Count = 16384
    """Tokens in a micro-batch at most, if it is filled to a budget; by default at least one whole sequence."""
    grad_clip: Annotated[
        Positive | None, OnlyWhen(BACKEND, FSDP, "actor_rollout_ref.actor.optim.clip_grad")
    ] = 1.0
    """Norm to which gradients are clipped; null for no clipping."""
    clip_ratio: Annotated[Share, only_losses("clip_low")] = 0.2
    """How far the probability ratio may move before PPO's loss stops following it."""
    clip_ratio_low: Annotated[Nonnegative, only_losses("clip_low")] = follows(
        "actor_rollout_ref.actor.clip_ratio"
    )
    """The same downwards; the ratio is clipped at 1 - clip_ratio_low."""
    clip_ratio_high: Annotated[Nonnegative, only_losses("clip_high")] = follows(
        "actor_rollout_ref.actor.clip_ratio"
    )
    """The same upwards; the ratio is clipped at 1 + clip_ratio_high."""
    clip_ratio_c: Annotated[Float, Field(gt=1), only_losses("clip_dual")] = 3.0
    """Dual clip: bound of the loss where the advantage is negative, in multiples of it; DPPO's cap of the ratio."""
    tau_pos: Annotated[Positive, only_losses("tau_pos")] = 1.0
    """SAPO's temperature where the advantage is positive; a higher one closes its soft gate faster."""
    tau_neg: Annotated[Positive, only_losses("tau_neg")] = 1.05
    """The same where the advantage is negative."""
    tis_imp_ratio_cap: Float = -1.0
    """Cap of the importance weights in earlier verl; `algorithm.rollout_correction` has them here. -1 for none."""
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    loss_agg_mode: LossAggMode = "token-mean"
    """How losses of tokens become the loss of a batch."""
    loss_scale_factor: Positive | None = None
    """Divisor of `seq-mean-token-sum-norm`; null for `data.max_response_length`."""
    entropy_coeff: Float = 0.001
    """Weight of the entropy bonus in the loss."""
    use_kl_loss: bool = False
    """Add the KL divergence from the reference to the loss (and, unless asked for, not to the reward)."""
    kl_loss_coef: Nonnegative = 0.001
    """Weight of that KL loss."""
    kl_loss_type: KLKind = "low_var_kl"
    """Estimator of that KL divergence; with `+`, its gradient is the unbiased one."""
    use_torch_compile: Annotated[bool, NoEffect("nothing is compiled")] = True
    """Compile the loss."""
    ppo_epochs: Count = 1
    """Passes over a step's samples."""
    shuffle: bool = False
    """Draw the mini-batches in a random order."""
    ulysses_sequence_parallel_size: Annotated[Count, ULYSSES, ONLY_FSDP] = 1
    """Devices over which a sequence is split."""
    optim: OptimConfig = OptimConfig()
    fsdp_config: Annotated[FSDPConfig, ONLY_FSDP] = FSDPConfig()
    megatron: Annotated[MegatronConfig, only_megatron()] = MegatronConfig()
    load_weight: Annotated[bool, RANDOM_WEIGHTS, only_megatron()] = True
    """Read the model's weights, under Megatron; false starts from random ones."""
    param_offload: Annotated[bool, only_megatron("actor_rollout_ref.actor.fsdp_config.param_offload")] = False
    """Keep weights in CPU memory while they are not used, under Megatron."""
    grad_offload: Annotated[bool, only_megatron("actor_rollout_ref.actor.fsdp_config.param_offload")] = False
    """Keep gradients in CPU memory while they are not used, under Megatron."""
    optimizer_offload: Annotated[
        bool, only_megatron("actor_rollout_ref.actor.fsdp_config.optimizer_offload")
    ] = False
    """Keep the optimizer's state in CPU memory while it is not used, under Megatron."""
    checkpoint: CheckpointConfig = CheckpointConfig()


class RefConfig(Section):
    """The reference policy: the model as it was before training."""

    fsdp_config: Annotated[FSDPConfig, ONLY_FSDP] = FSDPConfig()
    log_prob_micro_batch_size: Count | None = None
    """Sequences that go through the reference together, counted over all devices."""
    log_prob_micro_batch_size_per_gpu: Count | None = None
    """Sequences that go through the reference together on one device; null fills up to the token budget."""
    log_prob_use_dynamic_bsz: bool = follows("actor_rollout_ref.actor.use_dynamic_bsz")
    """Fill micro-batches up to a token budget instead of counting sequences."""
    log_prob_max_token_len_per_gpu: Count = follows("actor_rollout_ref.actor.ppo_max_token_len_per_gpu")
    """Tokens in a micro-batch at most, where it is filled to a budget."""
    ulysses_sequence_parallel_size: Annotated[Count, ULYSSES, ONLY_FSDP] = follows(
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
    )
    """Devices over which a sequence is split."""
    megatron: Annotated[MegatronConfig, only_megatron()] = MegatronConfig()
    load_weight: Annotated[bool, RANDOM_WEIGHTS, only_megatron()] = True
    """Read the model's weights, under Megatron; false starts from random ones."""
    param_offload: Annotated[bool, only_megatron("actor_rollout_ref.ref.fsdp_config.param_offload")] = False
    """Keep weights in CPU memory while they are not used, under Megatron."""
