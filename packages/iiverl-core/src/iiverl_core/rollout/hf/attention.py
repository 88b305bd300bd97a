"""Attention of single new tokens over a key-value cache, without repeating keys and values for grouped queries."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from iiverl_core.rollout.hf.prompts import SharedPrompts, attend

GROUPED_SDPA = "iiverl_grouped_sdpa"


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    shared_prompts: Sequence[SharedPrompts] = (),
    seen_layers: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention, query (B, H, Q, D) over key and value (B, G, K, D), as transformers calls it.

    With a mask, transformers' own function repeats keys and values for the H / G query heads of each group, which copies
    the whole cache at every step. For Q = 1 the heads of a group take the place of queries, without a copy. On a CPU, two
    matrix products take down to half the time of torch's fused kernel, which is made for many queries.

    `shared_prompts` have keys and values that come before those that are given. `seen_layers` takes note of the layers that
    could be given some.
    """
    biased = kwargs.get("position_bias") is not None
    if seen_layers is not None:
        seen_layers.append(-1 if biased else getattr(module, "layer_idx", -1))
    n_rows, n_heads, n_queries, width = query.shape
    n_groups = key.shape[1]
    if shared_prompts:
        query = query.reshape(n_rows, n_groups, n_heads // n_groups, width)
        scale = width**-0.5 if scaling is None else scaling
        own = attend(query, key, value, attention_mask, scale)
        layer = module.layer_idx
        assert isinstance(layer, int)  # as all of them when the prompts were run
        for prompts in shared_prompts:
            prompts.merge(layer, query, own, scale)
        return own.values.reshape(n_rows, 1, n_heads, value.shape[-1]), None
    if n_queries != 1 or n_heads == n_groups or biased:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query = query.reshape(n_rows, n_groups, n_heads // n_groups, width)
    if query.is_cpu and query.dtype is torch.float32:
        scores = (query @ key.mT).mul_(width**-0.5 if scaling is None else scaling)
        if attention_mask is not None and attention_mask.dtype is torch.bool:
            scores.masked_fill_(~attention_mask, float("-inf"))
        elif attention_mask is not None:
            scores += attention_mask
        output = scores.softmax(-1) @ value
    else:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(n_rows, 1, n_heads, value.shape[-1]), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


def use_grouped_sdpa(model: PreTrainedModel) -> bool:
    """Use `grouped_sdpa` in a model that would use plain SDPA; return whether it does."""
    functions = getattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS", None)
    if model.config._attn_implementation != "sdpa" or functions is not ALL_ATTENTION_FUNCTIONS:
        return False
    model.set_attn_implementation(GROUPED_SDPA)
    return model.config._attn_implementation == GROUPED_SDPA
