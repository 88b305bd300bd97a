"""From logits to tokens: warp the distribution and draw from it.

A token is drawn by inverting the cumulative distribution at a number from the caller, so a sequence's tokens are a
function of its own numbers and logits. Suffixes: `_B` sequences, `_V` vocabulary, `_N` blocks of the vocabulary.
"""

import torch
from torch import Tensor

from iiverl_core.rollout.engine import SamplingParams

BLOCK = 256  # tokens in a block: about the root of a large vocabulary, so that both searches are short
PARTS = 2.0**40  # the largest weight; sums stay below 2^63 for 2^23 tokens


def sample(logits_BV: Tensor, u_B: Tensor | None, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Sample a token per row: the likeliest if `params.temperature` is 0, else one drawn with `u_B`.

    Args:
        logits_BV: (B, V), any floating dtype.
        u_B: (B,) float64 in [0, 1); unused if greedy.
        params: temperature, top-k and top-p.

    Returns:
        Tokens (B,) int64 and their log-probs (B,) fp32, in nats, under the distribution they were sampled from: 0 if
        greedy. A row whose logits hold NaN or infinity, or nothing above minus infinity, has log-prob NaN.
    """
    if params.temperature == 0:
        return greedy(logits_BV)
    if u_B is None:
        raise ValueError("sampling at a temperature above 0 needs a number for each row")
    return draw(warp_logits(logits_BV, params.temperature, params.top_k, params.top_p), u_B)


def sample_kept(
    logits_BV: Tensor, u_B: Tensor | None, params: SamplingParams
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sample as `sample` does; the third is (B, V) bool, the tokens that top-k and top-p kept, or None if they are off."""
    if u_B is None or not params.truncates:
        return *sample(logits_BV, u_B, params), None
    warped_BV = warp_logits(logits_BV, params.temperature, params.top_k, params.top_p)
    return *draw(warped_BV, u_B), warped_BV > float("-inf")


def greedy(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Take each row's likeliest token, the first of equals; its log-prob is 0, or NaN if the logits are not finite."""
    top_B, token_B = logits_BV.max(-1)
    return token_B, (top_B * 0).float()


def warp_logits(logits_BV: Tensor, temperature: float, top_k: int = -1, top_p: float = 1.0) -> Tensor:
    """Return logits (B, V), at least fp32, whose softmax is the distribution to sample from.

    In this order: divide by `temperature` (above 0); keep the `top_k` largest and equals of the k-th (below 1: off);
    renormalise and keep the smallest set of likeliest tokens whose mass reaches `top_p`, of equals at its edge those with
    the lowest ids (1: off). At least one token is kept. Excluded tokens have minus infinity.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    # With each row's maximum at 0, a temperature near 0 cannot overflow.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).div_(temperature)
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, float("-inf"))
    if top_p < 1:
        sorted_BV, order_BV = torch.sort(logits_BV, dim=-1, descending=True, stable=True)
        # float64: over a large vocabulary an fp32 running sum is off by more than a rare token's probability.
        mass_BV = sorted_BV.softmax(-1, dtype=torch.float64).cumsum(-1)
        excluded_BV = torch.zeros_like(mass_BV, dtype=torch.bool)
        excluded_BV[:, 1:] = mass_BV[:, :-1] >= top_p
        logits_BV = logits_BV.masked_fill(excluded_BV.scatter(-1, order_BV, excluded_BV), float("-inf"))
    return logits_BV


def draw(logits_BV: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token per row from the softmax of (B, V) logits: the first whose cumulative probability exceeds u.

    Never draws tokens of probability zero, nor those some 10^12 times rarer than the likeliest. Returns as `sample`.

    Searches blocks of the vocabulary first, then one block, so most of the vocabulary is only summed.
    """
    n_rows, n_tokens = logits_BV.shape
    n_blocks = -(-n_tokens // BLOCK)
    top_B1 = logits_BV.amax(-1, keepdim=True)
    weights_BV = logits_BV.new_zeros(n_rows, n_blocks * BLOCK)
    torch.sub(logits_BV, top_B1, out=weights_BV[:, :n_tokens]).exp_()

    blocks_BNV = weights_BV.view(n_rows, n_blocks, BLOCK)
    mass_BN = blocks_BNV.sum(-1)
    block_B1, within_B = _invert(mass_BN, u_B)
    block_BV = blocks_BNV[torch.arange(n_rows, device=block_B1.device), block_B1[:, 0]]
    token_B1 = (block_B1 * BLOCK + _invert(block_BV, within_B)[0]).clamp(max=n_tokens - 1)

    log_total_B = mass_BN.sum(-1, dtype=torch.float64).log()
    logit_B1 = logits_BV.gather(-1, token_B1) - top_B1
    return token_B1[:, 0], (logit_B1[:, 0] - log_total_B).float()


def _invert(weights_BN: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index (B, 1) at which each row's cumulative sum exceeds u of its total, and u's position within it (B,).

    The sums are of integers: weights as multiples of 2^-40 of the row's largest, below which they count as zero. So they
    are exact in any order of addition, unlike fp32 sums over a large vocabulary, and do not change at a weight of zero,
    as even float64 sums on a GPU may.
    """
    parts_BN = (weights_BN / weights_BN.amax(-1, keepdim=True) * PARTS).long()
    sum_BN = parts_BN.cumsum(-1)
    total_B1 = sum_BN[:, -1:]
    goal_B1 = u_B[:, None] * total_B1
    # Rounding may lift a u near 1 to the total, and NaN weights may give any index.
    whole_B1 = goal_B1.long().minimum(total_B1 - 1)
    index_B1 = torch.searchsorted(sum_BN, whole_B1, right=True).clamp(max=weights_BN.shape[-1] - 1)
    parts_B1 = parts_BN.gather(-1, index_B1)
    before_B1 = sum_BN.gather(-1, index_B1) - parts_B1
    return index_B1, ((goal_B1 - before_B1) / parts_B1).clamp(0, 1)[:, 0]
