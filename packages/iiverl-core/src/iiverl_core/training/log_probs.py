"""Log-probs and entropy of tokens, from logits. Suffixes: `_T` tokens, `_TV` tokens by vocabulary."""

import torch
from torch import Tensor

from iiverl_core.training.support import LOWEST, Support


def token_log_probs(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature: float,
    *,
    support: Support | None = None,
    entropy: bool,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute the log-prob of each target under the softmax of logits / temperature, and that softmax's entropy.

    The entropy is computed only if requested. Without `entropy_gradient` it keeps nothing for a backward pass. Both are
    (T,), in nats, in fp32 or the dtype of the logits if that is more precise. With a `support`, the softmax is over its tokens
    alone.
    """
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    logits_TV = logits_TV.to(dtype) / temperature
    if support is not None:
        excluded_TV = support.excluded(slice(0, len(targets_T)), 0, logits_TV.shape[-1])
        logits_TV = logits_TV.masked_fill(excluded_TV, LOWEST)
    log_total_T = logits_TV.logsumexp(-1)
    log_probs_T = logits_TV.gather(-1, targets_T[:, None]).squeeze(-1) - log_total_T
    if not entropy:
        return log_probs_T, None
    if not entropy_gradient:
        logits_TV, log_total_T = logits_TV.detach(), log_total_T.detach()
    mean_logit_T = (logits_TV.softmax(-1) * logits_TV).sum(-1)
    return log_probs_T, log_total_T - mean_logit_T
