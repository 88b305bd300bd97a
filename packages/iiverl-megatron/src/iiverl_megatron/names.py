"""Map megatron-core's parameters to the tensors of a transformers checkpoint.

A parameter combines one or more tensors (queries, keys and values are one matrix), and each process that shares a layer
has a slice of it; a `Sharding` converts both ways. Names are global: layers and experts are numbered over the whole
model, whatever stage or process has them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from iiverl_core.training import Role
from iiverl_core.training.adapter import A
from iiverl_megatron.architecture import Architecture


class Sharding(Protocol):
    """Convert tensors of a checkpoint to the slices of the processes that share a parameter, and back."""

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Return the slice of process `rank` of `size`."""
        ...

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """Return the checkpoint's tensors from the slices of all processes."""
        ...


@dataclass(frozen=True)
class Replicated:
    """One tensor, the same on every process."""

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """See `Sharding.split`."""
        return tensors[0]

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """See `Sharding.join`."""
        return [slices[0]]


@dataclass(frozen=True)
class Sliced:
    """One tensor, split along `dim`."""

    dim: int

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """See `Sharding.split`."""
        return tensors[0].chunk(size, self.dim)[rank]

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """See `Sharding.join`."""
        return [torch.cat(list(slices), self.dim)]


@dataclass(frozen=True)
class Vocabulary:
    """A row per token, padded with zeros so that every process has the same number."""

    tokens: int

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """See `Sharding.split`."""
        rows, width = tensors[0], -(-self.tokens // size)
        own = rows[rank * width : (rank + 1) * width]
        return torch.cat([own, own.new_zeros(width - len(own), rows.shape[1])])

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """See `Sharding.join`."""
        return [torch.cat(list(slices))[: self.tokens]]


@dataclass(frozen=True)
class Gated:
    """Gate and up projection: each process has its rows of the gate above its rows of the up projection."""

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """See `Sharding.split`."""
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """See `Sharding.join`."""
        halves = [piece.chunk(2) for piece in slices]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values by group: the query heads that share a key head, then that, then its value head."""

    heads: int
    groups: int

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """See `Sharding.split`."""
        by_group = [tensor.reshape(self.groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(by_group, 1).flatten(0, 1).chunk(size)[rank]

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """See `Sharding.join`."""
        whole = torch.cat(list(slices))
        by_group = whole.reshape(self.groups, -1, *whole.shape[1:])
        width = by_group.shape[1] // (self.heads // self.groups + 2)
        parts = by_group.split([by_group.shape[1] - 2 * width, width, width], 1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class WeightMapping:
    """The names of a parameter's tensors in a checkpoint, and their sharding. An expert is whole on one process."""

    names: tuple[str, ...]
    sharding: Sharding
    expert: bool = False


ADAPTER = re.compile(r"(.*)\.adapters\.(\w+)\.(lora_[AB])\.weight")
EXPERT = re.compile(r"decoder\.layers\.\d+\.mlp\.experts\.\d+\.linear_fc[12]\.weight")


def weight_mapping(name: str, architecture: Architecture, role: Role) -> WeightMapping:
    """Return the mapping of a parameter by its global name.

    Raises:
        KeyError: the name is unknown.
    """
    if name in ("output_layer.weight", "output_layer.bias") and role in ("critic", "reward"):
        return WeightMapping((name.replace("output_layer", "score"),), Replicated())
    vocabulary = Vocabulary(architecture.vocabulary)
    ends = {
        "embedding.word_embeddings.weight": WeightMapping(("model.embed_tokens.weight",), vocabulary),
        "output_layer.weight": WeightMapping(
            ("model.embed_tokens.weight" if architecture.tied else "lm_head.weight",), vocabulary
        ),
        "decoder.final_layernorm.weight": WeightMapping(("model.norm.weight",), Replicated()),
    }
    if name in ends:
        return ends[name]
    if adapter := ADAPTER.fullmatch(name):
        layer = weight_mapping(f"{adapter[1]}.weight", architecture, role)
        return _adapter(layer, adapter[2], adapter[3])
    layer, rest = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
    prefix = f"model.layers.{layer}"
    if expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(linear_fc[12])\.weight", rest):
        return _mlp(expert[2], f"{prefix}.mlp.experts.{expert[1]}", expert=True)
    if mlp := re.fullmatch(r"mlp\.(linear_fc[12])\.weight", rest):
        return _mlp(mlp[1], f"{prefix}.mlp", expert=False)
    config = architecture.transformer
    qkv = Attention(config.num_attention_heads, config.num_query_groups or config.num_attention_heads)
    attention = f"{prefix}.self_attn"
    return {
        "self_attention.linear_qkv.weight": WeightMapping(_qkv(attention, "weight"), qkv),
        "self_attention.linear_qkv.bias": WeightMapping(_qkv(attention, "bias"), qkv),
        "self_attention.linear_proj.weight": WeightMapping((f"{attention}.o_proj.weight",), Sliced(1)),
        "self_attention.q_layernorm.weight": WeightMapping((f"{attention}.q_norm.weight",), Replicated()),
        "self_attention.k_layernorm.weight": WeightMapping((f"{attention}.k_norm.weight",), Replicated()),
        "mlp.router.weight": WeightMapping((f"{prefix}.mlp.gate.weight",), Replicated()),
        # Transformer Engine fuses a norm with the matrix after it, and names it after that.
        **dict.fromkeys(
            ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            WeightMapping((f"{prefix}.input_layernorm.weight",), Replicated()),
        ),
        **dict.fromkeys(
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            WeightMapping((f"{prefix}.post_attention_layernorm.weight",), Replicated()),
        ),
    }[rest]


def _adapter(layer: WeightMapping, part: str, matrix: str) -> WeightMapping:
    """Return the mapping of a matrix of an adapter beside `part` of a layer, split like the layer's own weight."""
    (own,) = (name for name in layer.names if name.endswith(f".{part}.weight"))
    splits_inputs = isinstance(layer.sharding, Sliced)
    split = Sliced(1) if splits_inputs else Sliced(0)
    name = f"{own.removesuffix('.weight')}.{matrix}.weight"
    return WeightMapping((name,), split if (matrix == A) == splits_inputs else Replicated())


def _qkv(attention: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{each}_proj.{kind}" for each in "qkv")


def _mlp(part: str, prefix: str, *, expert: bool) -> WeightMapping:
    if part == "linear_fc1":
        return WeightMapping((f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"), Gated(), expert)
    return WeightMapping((f"{prefix}.down_proj.weight",), Sliced(1), expert)


def sort_key(name: str) -> tuple[int, int, int, str]:
    """Sort global names from the embedding to the head, by layer and expert."""
    end = {"embedding.": 0, "decoder.final": 2, "output_layer": 3}
    place = next((rank for start, rank in end.items() if name.startswith(start)), 1)
    numbers = [int(number) for number in re.findall(r"\.(\d+)(?=\.)", name)]
    layer, expert = (*numbers, -1, -1)[:2]
    return place, layer, expert, name
