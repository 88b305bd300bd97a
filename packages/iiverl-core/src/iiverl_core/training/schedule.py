"""The learning rate as a function of the step, so that a resumed run only needs its step number."""

import math

from iiverl_core.config import OptimConfig


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Compute the learning rate of training step `step`, counted from 0.

    It rises linearly from 0 over the warm-up (`lr_warmup_steps`, or, if that is negative, `lr_warmup_steps_ratio`
    of all steps), then is constant (`constant`) or decays along half a cosine to `min_lr_ratio` of its maximum or, if
    that is None, to `min_lr` (`cosine`). `optim.total_training_steps`, if positive, replaces `total_steps`.
    """
    total = optim.total_training_steps if optim.total_training_steps > 0 else total_steps
    warmup = optim.lr_warmup_steps if optim.lr_warmup_steps >= 0 else int(optim.lr_warmup_steps_ratio * total)
    if step < warmup:
        return optim.lr * step / warmup
    if optim.warmup_style == "constant":
        return optim.lr
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    min_ratio = optim.min_lr_ratio
    if min_ratio is None:
        min_ratio = optim.min_lr / optim.lr if optim.lr else 0.0
    return optim.lr * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2)
