"""Attention over packed rows in models of transformers, under the name `PACKED` of their attention interface.

No function for masks is registered under that name, so transformers makes none. The segments of the row come once per
micro-batch as a keyword argument of the model, which its layers hand on to `packed_attention`.

A model with compiled blocks has one of two other names: `COMPILED` if attention can be a part of compiled code, since
torch's kernel computes it, or `APART` if it is called between compiled parts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from iiverl_core.training.attention import KernelAttention, PackedAttention, has_kernel
from iiverl_core.training.spans import Segment
from iiverl_core.training.vision import text_model
from iiverl_fsdp.ulysses import SequenceGroup, SplitAttention

PADDED = "sdpa"
PACKED = "iiverl_packed"
COMPILED = "iiverl_packed_compiled"
APART = "iiverl_packed_apart"
FLASH = "flash_attention_2"
ARGUMENT = "packed_attention"  # keyword argument of models and their layers
UNSUPPORTED = {
    "softcap": "caps its attention scores (softcap)",
    "s_aux": "has attention sinks",
    "position_bias": "adds a position bias to its attention scores",
    "head_mask": "masks attention heads",
}
"""Arguments of attention functions that change the result, and what a model does that passes them."""


class Observations:
    """What `packed_attention` was called with: what it cannot compute, windows, and keys of the last token.

    `kernels` says of each call whether torch's kernel computes it.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.windows: list[int | None] = []
        self.last_keys: list[Tensor] = []
        self.kernels: list[bool] = []


_OBSERVED: ContextVar[Observations | None] = ContextVar("_OBSERVED", default=None)


@contextmanager
def observe() -> Iterator[Observations]:
    """Collect what attention is asked for, instead of raising an error for what it cannot compute."""
    found = Observations()
    token = _OBSERVED.set(found)
    try:
        yield found
    finally:
        _OBSERVED.reset(token)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_attention: PackedAttention | KernelAttention | SplitAttention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within the segments of a row, as transformers calls it: query (1, H, T, D) to output (1, T, H, D).

    Raises:
        RuntimeError: the model asks for what cannot be computed here; `check_packing` finds that when it is built.
    """
    problems = [reason for name, reason in UNSUPPORTED.items() if options.get(name) is not None]
    if packed_attention is None:
        problems.append("does not hand keyword arguments on to its attention")
    if attention_mask is not None:
        problems.append("makes an attention mask of its own")
    if not options.get("is_causal", getattr(module, "is_causal", True)):
        problems.append("has attention that is not causal")
    observed = None if torch.compiler.is_compiling() else _OBSERVED.get()
    if observed is not None:
        observed.problems += problems
        observed.windows.append(sliding_window)
        observed.last_keys.append(key[0, :, -1])
        observed.kernels.append(has_kernel(query, value))
    if problems or packed_attention is None:
        if observed is None:
            raise RuntimeError(f"{type(module).__name__} {problems[0]}, unlike when the model was built")
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    return packed_attention.attend(*rows, scale=scaling, window=sliding_window)[None], None


def _apart(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
    """Call `packed_attention` between compiled parts, which would be specialized to the base of a view."""
    output, _ = packed_attention(*arguments, **options)
    return output.clone(), None


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(COMPILED, packed_attention)


def register_apart() -> None:
    """Register `APART`, which imports torch's compiler."""
    AttentionInterface.register(APART, torch.compiler.disable(_apart))


def attention_arguments(
    transformer: PreTrainedModel,
    segments: Sequence[Segment] | None,
    device: torch.device,
    group: SequenceGroup | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments of a model that tell its attention the segments of a packed row; none for padded rows.

    With a `group`, this process has a part of the row.
    """
    if segments is None:
        return {}
    packed, name = PackedAttention(segments, device), text_model(transformer).config._attn_implementation
    if name == COMPILED:
        return {ARGUMENT: packed.compiled}
    if name in (PACKED, APART):
        return {ARGUMENT: SplitAttention(packed, group) if group else packed}
    bounds, longest = packed.kernel.bounds, packed.kernel.longest
    lengths = {"max_length_q": longest, "max_length_k": longest}
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, **lengths}
