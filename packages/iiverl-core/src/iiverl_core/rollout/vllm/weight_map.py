"""Locate weights of the trained model in vLLM's, which joins some into one parameter and shards them over processes.

Duck-typed against vLLM's layers: a model's `packed_modules_mapping` names the parts of its joined modules, a module's
`output_partition_sizes` is the number of rows per part in this process, `shard_indices` the tokens whose rows are here,
and `quant_method.apply` its forward pass. Of everything else a process holds an even share, or all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iiverl_core.training.adapter import A, B

PROBES = 256  # unit vectors that go through a layer at a time


@dataclass(frozen=True)
class Shard:
    """One process's part of a weight: `cut`, a slice per dimension, in `dtype`."""

    cut: tuple[slice, ...]
    dtype: torch.dtype

    def of(self, weight: Tensor) -> Tensor:
        """Cut the shard out of the whole weight."""
        return weight[self.cut].to(self.dtype)


@dataclass(frozen=True)
class Location:
    """Where a shard lies: `rows` of the parameter `parameter` of `module`."""

    module: nn.Module
    parameter: str
    rows: slice
    shard: Shard

    def values(self) -> Iterator[Tensor]:
        """Yield every copy of the shard that the engine computes with.

        On a CPU, layers compute with a copy in their kernel's own layout, and some keep nothing else. Such a copy is
        read by running the kernel on unit vectors, which is exact: only one term of each sum is not zero.
        """
        held = getattr(self.module, self.parameter)
        if held.numel():
            yield held[self.rows]
        method: Any = getattr(self.module, "quant_method", None)
        if (
            held.device.type == "cpu"
            and self.parameter == "weight"
            and hasattr(method, "apply")
            and len(self.shard.cut) == 2
        ):
            columns = self.shard.cut[1]
            yield _through_kernel(self.module, columns.stop - columns.start, self.shard.dtype)[self.rows]


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
class WeightMap:
    """The locations of each weight in this process, and the engine's parameters in which none was located."""

    locations: Mapping[str, list[Location]]
    unclaimed: list[str]

    @classmethod
    def of(cls, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> "WeightMap":
        """Locate the weights of these `shapes` in this process's part of an engine's model."""
        parameters = dict(model.named_parameters())
        holders: dict[int, list[tuple[nn.Module, str]]] = {}  # of each parameter; a tied one has several
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                holders.setdefault(id(parameter), []).append((module, name))
        locations: dict[str, list[Location]] = {}
        claimed: set[int] = set()
        for name, shape in shapes.items():
            engine_name, number = _engine_name(model, name)
            engine_name = engine_name if engine_name in parameters else below_adapter(engine_name)
            parameter = parameters.get(engine_name)
            if parameter is None:
                continue
            modules = holders[id(parameter)]
            found = [each for module, last in modules if (each := _location(module, last, number, shape))]
            if len(found) == len(modules):
                locations[name] = found
                claimed.add(id(parameter))
        unclaimed = [name for name, parameter in parameters.items() if id(parameter) not in claimed]
        return cls(locations, unclaimed)


def _engine_name(model: nn.Module, name: str) -> tuple[str, int | None]:
    """Return the engine's name for a weight, and its index among the parts of a joined module."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapped = mapper.get_rename_mapper().map_name(name) if mapper else name
    path, _, parameter = (mapped or name).rpartition(".")
    parent, _, module = path.rpartition(".")
    for joined, parts in getattr(model, "packed_modules_mapping", {}).items():
        if module in parts and len(parts) > 1:
            return f"{parent}.{joined}.{parameter}", parts.index(module)
    return mapped or name, None


def below_adapter(name: str) -> str:
    """Return the name of a parameter whose module vLLM has wrapped to add LoRA adapters."""
    path, _, parameter = name.rpartition(".")
    return f"{path}.base_layer.{parameter}"


def wrong_adapters(model: Any, weights: Mapping[str, Tensor], scale: float) -> list[str]:
    """Return the names of LoRA weights that are not those that this process's part of a layer computes with.

    vLLM's layers have `lora_a_stacked` and `lora_b_stacked`, one per joined layer, with a slot per adapter; B is scaled.
    """
    manager = model.lora_manager
    (slot,) = (i for i, adapter in enumerate(manager.lora_index_to_id) if adapter is not None)
    given = {_engine_layer(model, name): (name, value) for name, value in weights.items()}
    wrong = [name for name, _ in given.values()]
    for path, module in manager.modules.items():
        layers = manager.packed_modules.get(path, [path])
        for kind, factor in ((A, 1.0), (B, scale)):
            found = [given.get(f"{layer}.{kind}.weight") for layer in layers]
            if not any(found):
                continue
            stacked = module.lora_a_stacked if kind == A else module.lora_b_stacked
            parts: Any = [None if each is None else each[1].to(stacked[0]) * factor for each in found]
            if module.tp_size > 1:
                cut = module.slice_lora_a if kind == A else module.slice_lora_b
                parts = cut(parts) if len(parts) > 1 else [cut(parts[0])]
            for each, part, held in zip(found, parts, stacked, strict=True):
                if each is not None and torch.equal(held[slot, 0, : part.shape[0], : part.shape[1]], part):
                    wrong.remove(each[0])
    return wrong


def _engine_layer(model: nn.Module, name: str) -> str:
    """Return the engine's name of a LoRA weight, in which joined layers are apart."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return (mapper.get_rename_mapper().map_name(name) if mapper else name) or name


def _location(module: nn.Module, parameter: str, number: int | None, shape: Sequence[int]) -> Location | None:
    """Locate a weight of this whole `shape` in a module; None if it is unknown, as with quantised parameters."""
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
    shard = Shard(tuple(each for each in cut if each), held.dtype)
    if len(shard.cut) != len(shape):
        return None
    return Location(module, parameter, slice(before, before + shard.cut[0].stop - shard.cut[0].start), shard)


def _sizes(module: nn.Module, held: Tensor, shape: Sequence[int]) -> list[int]:
    """Return a parameter's shape, even if only the kernel's copy of it is left."""
    rows: list[int] | None = getattr(module, "output_partition_sizes", None)
    if held.numel():
        return list(held.shape)
    return (
        list(shape) if rows is None else [sum(rows), getattr(module, "input_size_per_partition", shape[-1])]
    )


def _share(module: nn.Module, whole: int, size: int) -> slice | None:
    """Return which `size` of `whole` rows or columns this process holds; processes share them if heads are too few."""
    rank: int = getattr(module, "tp_rank", 0)  # pyright: ignore[reportAssignmentType]
    processes: int = getattr(module, "tp_size", 1)  # pyright: ignore[reportAssignmentType]
    if not size or whole % size or processes % (whole // size):
        return None
    start = rank // (processes // (whole // size)) * size
    return slice(start, start + size)
