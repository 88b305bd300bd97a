"""Log-probs and entropy over a vocabulary that is split over processes, without gathering logits.

Processes exchange three numbers per token: the largest logit, the sum of exponentials, and the target's logit; with
entropy, a fourth. Follows Shoeybi et al. 2019 (Megatron-LM), section 3. Arrays as large as the logits are changed in place:
there is at most one in fp32 in the forward pass and two in the backward pass, three with entropy.

Suffixes: `_T` tokens, `_TV` tokens by this process's part of the vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

PADDING_LOGIT = -1e30  # zero in any softmax, and finite when multiplied by a gradient


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
    """Return the log-prob of each target under the softmax of logits / temperature, and with `entropy` its entropy.

    Both are (T,), in nats, at least fp32, and the same on every process of `group`. Each process holds the same number of
    logits per token, in the order of ranks; those past `vocabulary` are padding. Without `entropy_gradient`, the entropy
    has no gradient, and the backward pass keeps no memory for it.
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
        local_T = (targets_T >= 0) & (targets_T < own)
        targets_T = targets_T.where(local_T, 0)
        target_logit_T = scaled_TV.gather(-1, targets_T[:, None]).squeeze(-1).where(local_T, 0)
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
            ctx.save_for_backward(softmax_TV, targets_T, local_T, entropy_T, log_total_T, scaled_TV)
        else:
            ctx.save_for_backward(softmax_TV, targets_T, local_T)
            ctx.mark_non_differentiable(entropy_T)
        ctx.temperature, ctx.dtype = temperature, logits_TV.dtype
        ctx.entropy = entropy and entropy_gradient
        return target_logit_T - log_total_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_log_probs_T, grad_entropy_T = grad_outputs
        softmax_TV, targets_T, local_T, *more = ctx.saved_tensors
        # d log p(y) / d z_v = 1[v = y] - p_v
        if ctx.entropy:
            # d H / d z_v = -p_v (log p_v + H)
            entropy_T, log_total_T, scaled_TV = more
            grad_TV = scaled_TV - (log_total_T - entropy_T)[:, None]
            grad_TV.mul_(grad_entropy_T[:, None]).add_(grad_log_probs_T[:, None]).mul_(softmax_TV).neg_()
        else:
            grad_TV = softmax_TV * -grad_log_probs_T[:, None]
        grad_TV.scatter_add_(-1, targets_T[:, None], (grad_log_probs_T * local_T)[:, None])
        return grad_TV.div_(ctx.temperature).to(ctx.dtype), None, None, None, None, None, None
