"""What each parameter of megatron-core is called and how it lies in a checkpoint of transformers.

A parameter is made of one or more tensors there (queries, keys and values are one matrix here), and each of the
processes that share a layer has a slice of it. A `Form` knows both ways. Names here are global: layers and experts are
counted over the whole model, whatever stage or process has them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from iiverl_core.training import Role
from iiverl_megatron.architecture import Architecture


class Form(Protocol):
    """How tensors of a checkpoint become the slices of the processes that share a parameter, and back."""

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """Make the slice of process `rank` of `size`."""
        ...

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """Make the checkpoint's tensors out of the slices of all processes."""
        ...


@dataclass(frozen=True)
class Whole:
    """One tensor, the same on every process."""

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """See `Form.split`."""
        return tensors[0]

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """See `Form.join`."""
        return [slices[0]]


@dataclass(frozen=True)
class Sliced:
    """One tensor, cut along `dim`."""

    dim: int

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """See `Form.split`."""
        return tensors[0].chunk(size, self.dim)[rank]

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """See `Form.join`."""
        return [torch.cat(list(slices), self.dim)]


@dataclass(frozen=True)
class Vocabulary:
    """A row a token, with rows of zeros at the end so that every process has equally many."""

    tokens: int

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """See `Form.split`."""
        rows, width = tensors[0], -(-self.tokens // size)
        own = rows[rank * width : (rank + 1) * width]
        return torch.cat([own, own.new_zeros(width - len(own), rows.shape[1])])

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """See `Form.join`."""
        return [torch.cat(list(slices))[: self.tokens]]


@dataclass(frozen=True)
class Gated:
    """Gate and up projection: each process has its rows of the one above its rows of the other."""

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """See `Form.split`."""
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """See `Form.join`."""
        halves = [piece.chunk(2) for piece in slices]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]


@dataclass(frozen=True)
class Attention:
    """Queries, keys and values by group: the heads of queries that share a head of keys, then that, then its values."""

    heads: int
    groups: int

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        """See `Form.split`."""
        by_group = [tensor.reshape(self.groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(by_group, 1).flatten(0, 1).chunk(size)[rank]

    def join(self, slices: Sequence[Tensor]) -> list[Tensor]:
        """See `Form.join`."""
        whole = torch.cat(list(slices))
        by_group = whole.reshape(self.groups, -1, *whole.shape[1:])
        width = by_group.shape[1] // (self.heads // self.groups + 2)
        parts = by_group.split([by_group.shape[1] - 2 * width, width, width], 1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class Entry:
    """The tensors of a checkpoint that a parameter is made of, and how. An expert's lie on one process, whole."""

    names: tuple[str, ...]
    form: Form
    expert: bool = False


EXPERT = re.compile(r"decoder\.layers\.\d+\.mlp\.experts\.\d+\.linear_fc[12]\.weight")


def entry(name: str, architecture: Architecture, role: Role) -> Entry:
    """Find a parameter by its global name.

    Raises:
        KeyError: the table does not know it.
    """
    if name in ("output_layer.weight", "output_layer.bias") and role in ("critic", "reward"):
        return Entry((name.replace("output_layer", "score"),), Whole())
    vocabulary = Vocabulary(architecture.vocabulary)
    ends = {
        "embedding.word_embeddings.weight": Entry(("model.embed_tokens.weight",), vocabulary),
        "output_layer.weight": Entry(
            ("model.embed_tokens.weight" if architecture.tied else "lm_head.weight",), vocabulary
        ),
        "decoder.final_layernorm.weight": Entry(("model.norm.weight",), Whole()),
    }
    if name in ends:
        return ends[name]
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
        "self_attention.linear_qkv.weight": Entry(_qkv(attention, "weight"), qkv),
        "self_attention.linear_qkv.bias": Entry(_qkv(attention, "bias"), qkv),
        "self_attention.linear_proj.weight": Entry((f"{attention}.o_proj.weight",), Sliced(1)),
        "self_attention.q_layernorm.weight": Entry((f"{attention}.q_norm.weight",), Whole()),
        "self_attention.k_layernorm.weight": Entry((f"{attention}.k_norm.weight",), Whole()),
        "mlp.router.weight": Entry((f"{prefix}.mlp.gate.weight",), Whole()),
        # Transformer Engine fuses a norm with the matrix after it, and calls it by that.
        **dict.fromkeys(
            ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            Entry((f"{prefix}.input_layernorm.weight",), Whole()),
        ),
        **dict.fromkeys(
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            Entry((f"{prefix}.post_attention_layernorm.weight",), Whole()),
        ),
    }[rest]


def _qkv(attention: str, kind: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{each}_proj.{kind}" for each in "qkv")


def _mlp(part: str, prefix: str, *, expert: bool) -> Entry:
    if part == "linear_fc1":
        return Entry((f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"), Gated(), expert)
    return Entry((f"{prefix}.down_proj.weight",), Sliced(1), expert)


def order(name: str) -> tuple[int, int, int, str]:
    """Sort global names from the embedding to the head, layer by layer, expert by expert."""
    end = {"embedding.": 0, "decoder.final": 2, "output_layer": 3}
    place = next((rank for start, rank in end.items() if name.startswith(start)), 1)
    numbers = [int(number) for number in re.findall(r"\.(\d+)(?=\.)", name)]
    layer, expert = (*numbers, -1, -1)[:2]
    return place, layer, expert, name
