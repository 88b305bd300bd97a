"""Log-probs and entropy of tokens, from logits. Suffixes: `_T` tokens, `_TV` tokens by vocabulary."""

import torch
from torch import Tensor


def token_log_probs(
    logits_TV: Tensor, targets_T: Tensor, temperature: float, *, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target under the softmax of logits / temperature, and that softmax's entropy where asked.

    Both (T,), in nats, at least fp32 whatever the logits are in.
    """
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    logits_TV = logits_TV.to(dtype) / temperature
    log_total_T = logits_TV.logsumexp(-1)
    log_probs_T = logits_TV.gather(-1, targets_T[:, None]).squeeze(-1) - log_total_T
    if not entropy:
        return log_probs_T, None
    mean_logit_T = (logits_TV.softmax(-1) * logits_TV).sum(-1)
    return log_probs_T, log_total_T - mean_logit_T
