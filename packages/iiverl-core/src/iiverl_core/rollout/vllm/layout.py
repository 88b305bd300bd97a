"""Where a weight of the trained model lies in the engine, which joins some into one, and spreads them over processes.

Duck-typed against vLLM's layers: `packed_modules_mapping` of a model names what its joined modules consist of,
`output_partition_sizes` of a module says how many rows each part has here, `shard_indices` which tokens' rows are here,
and `quant_method.apply` is what its forward pass calls. Of everything else a process holds an even share, or all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROBES = 256  # unit vectors that go through a layer at a time


@dataclass(frozen=True)
class Part:
    """What one process of an engine holds of a weight: `cut`, a slice of each dimension, in `dtype`."""

    cut: tuple[slice, ...]
    dtype: torch.dtype

    def of(self, weight: Tensor) -> Tensor:
        """Cut it out of the whole weight."""
        return weight[self.cut].to(self.dtype)


@dataclass(frozen=True)
class Piece:
    """A part of a weight of the trained model, as `rows` of the parameter `parameter` of `module`."""

    module: nn.Module
    parameter: str
    rows: slice
    part: Part

    def values(self) -> Iterator[Tensor]:
        """Yield the part from every place where the engine computes with it.

        On a CPU, layers compute with a copy in their kernel's own layout, and some keep nothing else. What such a
        kernel holds is read off its answers to the unit vectors, which are exact: one term of each sum is not zero.
        """
        held = getattr(self.module, self.parameter)
        if held.numel():
            yield held[self.rows]
        method: Any = getattr(self.module, "quant_method", None)
        if (
            held.device.type == "cpu"
            and self.parameter == "weight"
            and hasattr(method, "apply")
            and len(self.part.cut) == 2
        ):
            columns = self.part.cut[1]
            yield _through_kernel(self.module, columns.stop - columns.start, self.part.dtype)[self.rows]


def _through_kernel(module: nn.Module, inputs: int, dtype: torch.dtype) -> Tensor:
    method: Any = module.quant_method
    parts = []
    for start in range(0, inputs, PROBES):
        size = min(PROBES, inputs - start)
        probe_BI = torch.zeros(size, inputs, dtype=dtype)
        probe_BI[torch.arange(size), torch.arange(start, start + size)] = 1
        parts.append(method.apply(module, probe_BI, None).t())
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Layout:
    """Each weight's places in this process, and the engine's parameters that are nobody's place."""

    pieces: Mapping[str, list[Piece]]
    unclaimed: list[str]

    @classmethod
    def of(cls, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> "Layout":
        """Find the places of the weights of these `shapes` in this process's share of an engine's model."""
        parameters = dict(model.named_parameters())
        places: dict[int, list[tuple[nn.Module, str]]] = {}  # a tied parameter has several
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                places.setdefault(id(parameter), []).append((module, name))
        pieces: dict[str, list[Piece]] = {}
        claimed: set[int] = set()
        for name, shape in shapes.items():
            engine_name, number = _engine_name(model, name)
            parameter = parameters.get(engine_name)
            if parameter is None:
                continue
            holders = places[id(parameter)]
            found = [p for module, last in holders if (p := _piece(module, last, number, shape))]
            if len(found) == len(holders):
                pieces[name] = found
                claimed.add(id(parameter))
        unclaimed = [name for name, parameter in parameters.items() if id(parameter) not in claimed]
        return cls(pieces, unclaimed)


def _engine_name(model: nn.Module, name: str) -> tuple[str, int | None]:
    """Give the engine's name for a weight, and its number among the parts of a joined module."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = mapper.get_rename_mapper().map_name(name) if mapper else name
    path, _, parameter = (mapped or name).rpartition(".")
    parent, _, module = path.rpartition(".")
    for joined, parts in getattr(model, "packed_modules_mapping", {}).items():
        if module in parts and len(parts) > 1:
            return f"{parent}.{joined}.{parameter}", parts.index(module)
    return mapped or name, None


def _piece(module: nn.Module, parameter: str, number: int | None, shape: Sequence[int]) -> Piece | None:
    """Find what a module holds of a weight of this whole `shape`; None where that cannot be told.

    That is so where it computes with other numbers than it is given: quantised ones.
    """
    held = getattr(module, parameter)
    method: Any = getattr(module, "quant_method", None)
    if method is not None and not type(method).__name__.startswith("Unquantized"):
        return None
    sizes = _sizes(module, held, shape)
    if not sizes or len(sizes) != len(shape):
        return None
    before = 0
    if number is not None:
        rows: list[int] = module.output_partition_sizes  # pyright: ignore[reportAssignmentType]
        before, sizes = sum(rows[:number]), [rows[number], *sizes[1:]]
    cut = [_share(module, whole, size) for whole, size in zip(shape, sizes, strict=True)]
    tokens: Any = getattr(module, "shard_indices", None)
    if tokens is not None:  # behind the rows of these tokens, vocabularies are padded
        cut[0] = slice(tokens.org_vocab_start_index, tokens.org_vocab_end_index)
    part = Part(tuple(each for each in cut if each), held.dtype)
    if len(part.cut) != len(shape):
        return None
    return Piece(module, parameter, slice(before, before + part.cut[0].stop - part.cut[0].start), part)


def _sizes(module: nn.Module, held: Tensor, shape: Sequence[int]) -> list[int]:
    """Give a parameter's shape, also where the kernel's copy is all there is."""
    rows: list[int] | None = getattr(module, "output_partition_sizes", None)
    if held.numel():
        return list(held.shape)
    return (
        list(shape) if rows is None else [sum(rows), getattr(module, "input_size_per_partition", shape[-1])]
    )


def _share(module: nn.Module, whole: int, size: int) -> slice | None:
    """Give which `size` of `whole` rows or columns a process holds; the same as others where there are fewer heads."""
    rank: int = getattr(module, "tp_rank", 0)  # pyright: ignore[reportAssignmentType]
    processes: int = getattr(module, "tp_size", 1)  # pyright: ignore[reportAssignmentType]
    if not size or whole % size or processes % (whole // size):
        return None
    start = rank // (processes // (whole // size)) * size
    return slice(start, start + size)
