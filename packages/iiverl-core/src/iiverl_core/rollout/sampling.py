"""From logits to tokens: the distribution that is sampled from, and drawing from it.

A token is drawn by inverting the cumulative distribution at a number that the caller gives, so a sequence's tokens
are a function of its own numbers and logits. Suffixes: `_B` sequences, `_V` vocabulary, `_N` blocks of the vocabulary.
"""

import torch
from torch import Tensor

from iiverl_core.rollout.engine import SamplingParams

BLOCK = 256  # tokens in a block: about the root of a large vocabulary, so that both searches are short


def sample(logits_BV: Tensor, u_B: Tensor | None, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Choose a token for each row: the likeliest where `params.temperature` is 0, else one drawn with `u_B`.

    Args:
        logits_BV: (B, V), any floating dtype.
        u_B: (B,) float64 in [0, 1); not read where greedy.
        params: temperature, top-k and top-p.

    Returns:
        Tokens (B,) int64 and their log-probs (B,) fp32, in nats, under the distribution they were chosen from: 0 where
        greedy. A row whose logits hold NaN or infinity, or nothing above minus infinity, has log-prob NaN.
    """
    if params.temperature == 0:
        return greedy(logits_BV)
    if u_B is None:
        raise ValueError("sampling at a temperature above 0 needs a number for each row")
    return draw(warp_logits(logits_BV, params.temperature, params.top_k, params.top_p), u_B)


def greedy(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Take each row's likeliest token, the first of equals; its log-prob is 0, or NaN where the logits are broken."""
    top_B, token_B = logits_BV.max(-1)
    return token_B, (top_B * 0).float()


def warp_logits(logits_BV: Tensor, temperature: float, top_k: int = -1, top_p: float = 1.0) -> Tensor:
    """Give logits (B, V), at least fp32, whose softmax is the distribution that is sampled from.

    In this order: logits are divided by `temperature` (above 0); all but the `top_k` largest are excluded, equals of
    the k-th staying in (below 1: off); of what is left, renormalised, the smallest set of likeliest tokens whose mass
    reaches `top_p` stays, and of equals at its edge those with the lowest ids (1: off). At least one token always
    stays. Excluded tokens have minus infinity.
    """
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    # With each row's maximum at 0, a temperature near 0 cannot overflow.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
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
    """Draw a token for each row from the softmax of (B, V) logits: the first whose cumulative probability exceeds u.

    Tokens of probability zero are never drawn, whatever u. Returns what `sample` does.

    The search goes over blocks of the vocabulary, then within one. Sums over a block are fp32, as exact as the
    weights; running sums are float64, since in fp32 a token whose probability is below the rounding of the sum so far
    would never be drawn, and over 100 000 tokens the roundings add up.
    """
    n_rows, n_tokens = logits_BV.shape
    n_blocks = -(-n_tokens // BLOCK)
    top_B1 = logits_BV.amax(-1, keepdim=True)
    weights_BV = logits_BV.new_zeros(n_rows, n_blocks * BLOCK)
    torch.sub(logits_BV, top_B1, out=weights_BV[:, :n_tokens]).exp_()

    blocks_BNV = weights_BV.view(n_rows, n_blocks, BLOCK)
    mass_BN = blocks_BNV.sum(-1).double()
    total_B = mass_BN.sum(-1)
    block_B, rest_B = _first_above(mass_BN, u_B * total_B)
    within_BV = blocks_BNV[torch.arange(n_rows, device=block_B.device), block_B]
    token_B = block_B * BLOCK + _first_above(within_BV.double(), rest_B)[0]

    logit_B1 = logits_BV.gather(-1, token_B[:, None]) - top_B1
    return token_B, (logit_B1[:, 0].double() - total_B.log()).float()


def _first_above(weights_BN: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """Give the first place of positive weight where the running sum exceeds the target, and what it lacked before.

    Rounding may leave a target at or above the whole sum; then it is the last place of positive weight.
    """
    sum_BN = weights_BN.cumsum(-1)
    reach_BN = sum_BN.masked_fill(weights_BN == 0, -1.0)
    top_B = reach_BN.amax(-1)
    target_B = torch.minimum(target_B, torch.nextafter(top_B, torch.zeros_like(top_B)))
    index_B1 = (reach_BN > target_B[:, None]).int().argmax(-1, keepdim=True)
    before_B1 = sum_BN.gather(-1, index_B1) - weights_BN.gather(-1, index_B1)
    return index_B1[:, 0], (target_B - before_B1[:, 0]).clamp(min=0)
