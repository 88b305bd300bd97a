"""The sections `optim`: the optimizer and its learning rate."""

from typing import Annotated, Literal

from pydantic import Field

from iiverl_core.config.sections.choices import only_megatron
from iiverl_core.config.sections.section import (
    Float,
    Int,
    Nonnegative,
    Positive,
    Section,
    Share,
)

Beta = Annotated[Float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Nonnegative = 1e-6
    """Learning rate after the warm-up."""
    lr_warmup_steps: Annotated[Int, Field(ge=-1)] = -1
    """Training steps over which the rate rises from 0; -1 takes `lr_warmup_steps_ratio`."""
    lr_warmup_steps_ratio: Share = 0.0
    """The warm-up's share of all training steps."""
    min_lr_ratio: Share | None = None
    """What is left of the rate at the end of a cosine schedule; null for 0."""
    warmup_style: Literal["constant", "cosine"] = "constant"
    """The schedule after the warm-up."""
    total_training_steps: Int = -1
    """Training steps that the schedule spans; -1 for the whole run."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments."""
    weight_decay: Nonnegative = 0.01
    """AdamW's weight decay."""
    clip_grad: Annotated[Positive | None, only_megatron("actor_rollout_ref.actor.grad_clip")] = 1.0
    """Norm to which gradients are clipped, under Megatron."""
