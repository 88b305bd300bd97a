"""A micro-batch as megatron-core takes it: core's layout, filled up to what the processes of a group can share evenly.

Suffixes: `_BL` rows and columns of token ids, `_N` positions that are asked for, `_T` response tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from iiverl_core.training import MicroBatch, Role
from iiverl_core.training.layout import lay_out
from iiverl_megatron.heads import Positions


@dataclass(frozen=True)
class Inputs:
    """Token ids, the bounds of sequences where they are packed, what the head is asked for, and the response tokens."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    packed: PackedSeqParams | None
    positions: Positions
    targets_T: Tensor


def make_inputs(
    batch: MicroBatch, role: Role, *, packed: bool, multiple: int, device: torch.device
) -> Inputs:
    """Arrange a micro-batch in rows whose length is a multiple of `multiple`, or packed into one such row."""
    layout = lay_out(batch.prompts, batch.responses, packed=packed, device=device)
    fill = -layout.input_ids_BL.shape[1] % multiple
    input_ids_BL = F.pad(layout.input_ids_BL, (0, fill))
    rows_N, columns_N = (
        (layout.last_rows_S, layout.last_columns_S) if role == "reward" else (layout.rows_T, layout.columns_T)
    )
    bounds = None
    if packed:
        lengths = [len(p) + len(r) for p, r in zip(batch.prompts, batch.responses, strict=True)]
        bounds = _bounds(
            [*lengths, fill] if fill else lengths, device
        )  # what fills up is a sequence of its own
    columns = torch.arange(input_ids_BL.shape[1], device=device)
    return Inputs(
        input_ids_BL=input_ids_BL,
        position_ids_BL=columns.expand_as(input_ids_BL),
        packed=bounds,
        positions=Positions(rows_N, columns_N),
        targets_T=layout.targets_T,
    )


def _bounds(lengths: list[int], device: torch.device) -> PackedSeqParams:
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
