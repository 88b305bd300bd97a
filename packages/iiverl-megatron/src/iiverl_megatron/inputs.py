"""A micro-batch as megatron-core takes it: core's layout, filled up to what the processes of a group can share evenly.

Suffixes: `_BL` rows and columns of token ids, `_N` positions that are asked for, `_T` trained tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from iiverl_core.training import MicroBatch, Role
from iiverl_core.training.layout import lay_out
from iiverl_megatron.context import own_columns
from iiverl_megatron.heads import Positions


@dataclass(frozen=True)
class Sharing:
    """Into what the rows of a micro-batch divide: `tensor` processes share activations, and `context` ones sequences."""

    tensor: int
    context: int
    context_rank: int

    @property
    def multiple(self) -> int:
        """What the length of rows is a multiple of."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)


@dataclass(frozen=True)
class Inputs:
    """Token ids, the bounds of sequences where they are packed, what the head is asked for, and the trained tokens.

    Of rows that several processes share, these are this one's columns, and of the positions and tokens, those that are
    `here_N` of all.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    packed: PackedSeqParams | None
    positions: Positions
    targets_T: Tensor
    here_N: Tensor


def make_inputs(
    batch: MicroBatch, role: Role, *, packed: bool, sharing: Sharing, device: torch.device
) -> Inputs:
    """Arrange a micro-batch in rows that divide as `sharing` says, or packed into one; rows that are shared are not packed."""
    packed = packed and sharing.context == 1
    layout = lay_out(batch.sequences, packed=packed, device=device)
    fill = -layout.input_ids_BL.shape[1] % sharing.multiple
    input_ids_BL = F.pad(layout.input_ids_BL, (0, fill))
    rows_N, columns_N = (
        (layout.last_rows_S, layout.last_columns_S) if role == "reward" else (layout.rows_T, layout.columns_T)
    )
    here_N = torch.ones_like(columns_N, dtype=torch.bool)
    targets_T, own = layout.targets_T, torch.arange(input_ids_BL.shape[1], device=device)
    if sharing.context > 1:
        own = own_columns(len(own), sharing.context_rank, sharing.context, device)
        place_of = torch.full((input_ids_BL.shape[1],), -1, device=device)
        place_of[own] = torch.arange(len(own), device=device)
        here_N = place_of[columns_N] >= 0
        rows_N, columns_N = rows_N[here_N], place_of[columns_N[here_N]]
        targets_T = targets_T[here_N] if role != "reward" else targets_T
    bounds = None
    if packed:
        lengths = [len(sequence.token_ids) for sequence in batch.sequences]
        bounds = _bounds(
            [*lengths, fill] if fill else lengths, device
        )  # what fills up is a sequence of its own
    return Inputs(
        input_ids_BL=input_ids_BL[:, own],
        position_ids_BL=own.expand(len(input_ids_BL), -1),
        packed=bounds,
        positions=Positions(rows_N, columns_N),
        targets_T=targets_T,
        here_N=here_N,
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
