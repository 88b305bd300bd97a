"""The modules of a layer: Transformer Engine's on GPUs if it is installed, else megatron-core's own.

Two of megatron-core's own are replaced: its attention materialises the scores of all pairs of tokens and refuses packed
sequences, and its RMSNorm refuses sequence parallelism. Parameters have the same names either way, also in checkpoints.

Suffixes: `_SBHD` positions, rows, heads, features of a head; `_THD` tokens of packed sequences.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_decoder_block_spec
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from iiverl_megatron.context import gather_context
from iiverl_megatron.inputs import PackedRow
from iiverl_megatron.parallel import context_group

if not hasattr(moe_utils, "te_general_gemm"):
    # The router checks whether this is None, and 0.16 defines it only with Transformer Engine.
    moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def uses_transformer_engine(*, on_cpu: bool) -> bool:
    """Whether layers are made of its modules, which need a GPU."""
    return HAVE_TE and not on_cpu


def own_attention(config: TransformerConfig) -> bool:
    """Whether attention is `CausalAttention`, whose packed rows may share prompts.

    Transformer Engine's attention takes packed sequences, in half precision only.
    """
    engine = uses_transformer_engine(on_cpu=config.use_cpu_initialization)
    return not engine or config.params_dtype is torch.float32


def block_spec(config: TransformerConfig, chunk: int | None) -> TransformerBlockSubmodules:
    """Return the modules of one model chunk."""
    engine = uses_transformer_engine(on_cpu=config.use_cpu_initialization)
    spec: Any = get_gpt_decoder_block_spec(
        config, use_transformer_engine=engine, normalization="RMSNorm", vp_stage=chunk
    )
    if not engine:
        spec.layer_norm = RMSNorm
    for layer in spec.layer_specs or ():
        parts: Any = layer.submodules
        attention: Any = parts.self_attention.submodules
        if own_attention(config):
            attention.core_attention = CausalAttention
        if engine:
            continue
        parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
        if attention.q_layernorm is not IdentityOp:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        if issubclass(parts.mlp.module, MoELayer):
            # Transformer Engine does not fuse the norm before experts either, so its name in checkpoints stays.
            parts.sharded_state_dict_keys_map = {
                own: name
                for own, name in parts.sharded_state_dict_keys_map.items()
                if own != "pre_mlp_layernorm."
            }
    return spec


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square normalisation (Zhang and Sennrich 2019) over the last dimension.

    Under sequence parallelism each process sees a part of the positions, so the weight's gradient has to be summed over
    tensor-parallel processes; megatron-core does that for marked weights.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        """Create the weight on the device and in the dtype of the layer's others."""
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RotaryPositions(torch.nn.Module):
    """Angles of rotary positions, from zero in every row or packed sequence, or at the positions of a `PackedRow`.

    It takes the place of megatron-core's module in a model.
    """

    def __init__(self, made: RotaryEmbedding, inv_freq: Tensor) -> None:
        """Take megatron-core's module, and frequencies (head_dim / 2,)."""
        super().__init__()
        made.inv_freq = inv_freq
        self._made = made
        self._positions_L: Tensor | None = None

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Return the number of positions, and keep those of a packed row for `forward`, which is called next."""
        packed = args[4]
        self._positions_L = packed.positions_L if isinstance(packed, PackedRow) else None
        return self._made.get_rotary_seq_len(*args, **kwargs)

    def forward(self, max_seq_len: int, **kwargs: Any) -> Tensor:
        """Return the angles, (L, 1, 1, head_dim)."""
        angles = self._made(max_seq_len, **kwargs)
        return angles if self._positions_L is None else angles[self._positions_L]


class CausalAttention(MegatronModule):
    """Causal attention by torch's fused kernels, over rows or over packed sequences.

    Implements megatron-core's `CoreAttention`, with grouped queries. Under context parallelism each process gathers the
    keys and values of whole rows for its own queries.
    """

    _context: dist.ProcessGroup | None

    def __init__(
        self, *, config: TransformerConfig, softmax_scale: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(config=config)
        self._scale = softmax_scale
        self._context = context_group() if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedRow | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend: (S, B, H, D) → (S, B, H·D), or packed (T, H, D) → (T, H·D)."""
        if packed_seq_params is None:
            if self._context is not None:
                key, value = gather_context(key, self._context), gather_context(value, self._context)
            return self._rows(query, key, value)
        return packed_seq_params.attention.attend(query, key, value, scale=self._scale).flatten(1)

    def _rows(self, query_SBHD: Tensor, key_SBHD: Tensor, value_SBHD: Tensor) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHD, key_SBHD, value_SBHD))
        options: dict[str, Any] = {"scale": self._scale, "enable_gqa": query.shape[1] != key.shape[1]}
        if self._context is None:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        else:
            # Each of this process's two pieces attends to all columns before it, and causally to itself.
            front, back = query.chunk(2, 2)
            rank, size, length = self._context.rank(), self._context.size(), front.shape[2]
            attended = torch.cat(
                [
                    F.scaled_dot_product_attention(
                        piece, key[:, :, :end], value[:, :, :end], causal_lower_right(length, end), **options
                    )
                    for piece, end in (
                        (front, (rank + 1) * length),
                        (back, (2 * size - rank) * length),
                    )
                ],
                2,
            )
        return attended.permute(2, 0, 1, 3).flatten(2)
