"""Convert a micro-batch to megatron-core's inputs: core's layout, padded so that processes share it evenly.

Suffixes: `_BL` rows and columns of token ids, `_N` selected positions, `_T` trained tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from iiverl_core.training import LayoutKind, MicroBatch, Role
from iiverl_core.training.attention import PackedAttention
from iiverl_core.training.layout import lay_out
from iiverl_core.training.spans import Segment
from iiverl_core.training.support import Support
from iiverl_megatron.context import local_columns
from iiverl_megatron.heads import Positions


@dataclass(frozen=True)
class Sharing:
    """How the rows of a micro-batch are divided: over `tensor` × `context` processes, of which this one is `context_rank`."""

    tensor: int
    context: int
    context_rank: int

    @property
    def multiple(self) -> int:
        """The divisor of the length of rows."""
        return self.tensor * (2 * self.context if self.context > 1 else 1)


@dataclass
class PackedRow(PackedSeqParams):
    """megatron-core's parameters of a packed row, and attention within its segments.

    `positions_L` is the position of each token in its sequence if segments continue shared prefixes, otherwise None:
    positions then begin again in every segment. megatron-core knows the former row as one sequence.
    """

    attention: PackedAttention = field(kw_only=True)
    positions_L: Tensor | None = None

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "PackedRow":
        """Describe a row of `segments`."""
        attention = PackedAttention(segments, device)
        bounds_S, positions_L = attention.kernel.bounds, None
        if any(segment.prefix_length for segment in segments):
            bounds_S = bounds_S[[0, -1]]
            positions_L = torch.cat(
                [torch.arange(each.prefix_length, each.prefix_length + each.length) for each in segments]
            ).to(device)
        longest = max(segment.prefix_length + segment.length for segment in segments)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds_S,
            cu_seqlens_kv=bounds_S,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            attention=attention,
            positions_L=positions_L,
        )


@dataclass(frozen=True)
class Inputs:
    """Token ids, bounds of packed sequences, the positions for the head, and the trained tokens.

    If processes share rows, these are the local columns, and the positions and tokens for which `local_N` is true.
    """

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    packed: PackedRow | None
    positions: Positions
    targets_T: Tensor
    local_N: Tensor
    support: Support | None


def make_inputs(
    batch: MicroBatch, role: Role, kind: LayoutKind, *, sharing: Sharing, device: torch.device
) -> Inputs:
    """Lay a micro-batch out in rows that divide as `sharing`, or packed into one, perhaps with shared prompts."""
    layout = lay_out(batch.sequences, kind, device, batch.groups)
    fill = -layout.input_ids_BL.shape[1] % sharing.multiple
    input_ids_BL = F.pad(layout.input_ids_BL, (0, fill))
    rows_N, columns_N = (
        (layout.last_rows_S, layout.last_columns_S) if role == "reward" else (layout.rows_T, layout.columns_T)
    )
    local_N = torch.ones_like(columns_N, dtype=torch.bool)
    support = layout.support if role != "reward" else None
    targets_T, own = layout.targets_T, torch.arange(input_ids_BL.shape[1], device=device)
    if sharing.context > 1:
        own = local_columns(len(own), sharing.context_rank, sharing.context, device)
        place_of = torch.full((input_ids_BL.shape[1],), -1, device=device)
        place_of[own] = torch.arange(len(own), device=device)
        local_N = place_of[columns_N] >= 0
        rows_N, columns_N = rows_N[local_N], place_of[columns_N[local_N]]
        targets_T = targets_T[local_N] if role != "reward" else targets_T
        support = support.at(local_N) if support is not None else None
    packed = None
    if layout.segments is not None:
        # What fills the row up is a sequence of its own.
        filling = [Segment(layout.input_ids_BL.shape[1], fill)] if fill else []
        packed = PackedRow.of([*layout.segments, *filling], device)
    return Inputs(
        input_ids_BL=input_ids_BL[:, own],
        position_ids_BL=own.expand(len(input_ids_BL), -1),
        packed=packed,
        positions=Positions(rows_N, columns_N),
        targets_T=targets_T,
        local_N=local_N,
        support=support,
    )
