"""Log-probs and entropy over a vocabulary that is split over processes, without gathering a logit.

What crosses between the processes is three numbers a token: the largest logit, the sum of exponentials, and the logit
of the target, which one of them has; with entropy, a fourth. Follows Shoeybi et al. 2019 (Megatron-LM), section 3. What is
as large as the logits is changed in place: there is at most one such array in fp32 going forward and two going backward,
with entropy three.

Suffixes: `_T` tokens, `_TV` tokens by this process's part of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

PADDING_LOGIT = -1e30  # no share in any softmax, and finite when it is multiplied by a gradient


def split_token_log_probs(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature: float,
    *,
    vocabulary: int,
    group: dist.ProcessGroup,
    entropy: bool,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target under the softmax of logits / temperature over all processes, and its entropy if asked for.

    Without `entropy_gradient`, the entropy has no gradient and its backward pass no memory. Both (T,), in nats, at least fp32 whatever the logits are in, and the same on every process of `group`, each of which
    holds equally many logits a token, in the order of ranks. Those past `vocabulary` are padding and have no share.
    """
    width, rank = logits_TV.shape[-1], dist.get_rank(group)
    own = slice(0, min(max(vocabulary - rank * width, 0), width))
    log_probs_T, entropy_T = _SplitLogProbs.apply(
        logits_TV, targets_T - rank * width, temperature, own.stop, group, entropy, entropy_gradient
    )
    return log_probs_T, entropy_T if entropy else None


class _SplitLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        targets_T: Tensor,
        temperature: float,
        own: int,
        group: dist.ProcessGroup,
        entropy: bool,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits_TV.dtype, torch.float32)
        scaled_TV = logits_TV.to(dtype, copy=True).div_(temperature)
        scaled_TV[:, own:] = PADDING_LOGIT
        largest_T = scaled_TV.amax(-1)
        dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
        here_T = (targets_T >= 0) & (targets_T < own)
        targets_T = targets_T.where(here_T, 0)
        target_logit_T = scaled_TV.gather(-1, targets_T[:, None]).squeeze(-1).where(here_T, 0)
        softmax_TV = scaled_TV.clone() if entropy else scaled_TV
        softmax_TV.sub_(largest_T[:, None]).exp_()
        sums = torch.stack([softmax_TV.sum(-1), target_logit_T])
        dist.all_reduce(sums, group=group)
        total_T, target_logit_T = sums
        softmax_TV /= total_T[:, None]
        log_total_T = total_T.log() + largest_T
        entropy_T = torch.zeros_like(log_total_T)
        if entropy:
            mean_logit_T = (softmax_TV * scaled_TV).sum(-1)
            dist.all_reduce(mean_logit_T, group=group)
            entropy_T = log_total_T - mean_logit_T
        if entropy and entropy_gradient:
            ctx.save_for_backward(softmax_TV, targets_T, here_T, entropy_T, log_total_T, scaled_TV)
        else:
            ctx.save_for_backward(softmax_TV, targets_T, here_T)
            ctx.mark_non_differentiable(entropy_T)
        ctx.temperature, ctx.dtype = temperature, logits_TV.dtype
        ctx.entropy = entropy and entropy_gradient
        return target_logit_T - log_total_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_log_probs_T, grad_entropy_T = grad_outputs
        softmax_TV, targets_T, here_T, *more = ctx.saved_tensors
        # d log p(y) / d z_v = 1[v = y] - p_v
        if ctx.entropy:
            # d H / d z_v = -p_v (log p_v + H)
            entropy_T, log_total_T, scaled_TV = more
            grad_TV = scaled_TV - (log_total_T - entropy_T)[:, None]
            grad_TV.mul_(grad_entropy_T[:, None]).add_(grad_log_probs_T[:, None]).mul_(softmax_TV).neg_()
        else:
            grad_TV = softmax_TV * -grad_log_probs_T[:, None]
        grad_TV.scatter_add_(-1, targets_T[:, None], (grad_log_probs_T * here_T)[:, None])
        return grad_TV.div_(ctx.temperature).to(ctx.dtype), None, None, None, None, None, None
