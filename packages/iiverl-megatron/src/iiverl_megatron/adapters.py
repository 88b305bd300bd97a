"""LoRA adapters beside megatron-core's linear layers: one per layer of transformers, several of which may be joined in one.

Matrices are split over tensor-parallel processes like the layer's own: B of a layer that splits its outputs, A of one that
splits its inputs. The others are replicated. Between A and B, positions have `rank` numbers, and these are what processes
exchange.

Suffixes: `_SBD` positions, rows, features, on this process; `_SBR` numbers between A and B.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from iiverl_core.config import ModelConfig
from iiverl_core.errors import ConfigError, WeightMismatchError
from iiverl_core.training import Role
from iiverl_core.training.adapter import (
    CHUNK,
    PROBES,
    ROUNDING,
    A,
    B,
    chosen_layers,
    is_adapter,
    merge_adapter,
    probe_inputs,
    wrong_merge,
)
from iiverl_megatron.architecture import Architecture
from iiverl_megatron.names import Attention, Sliced, WeightMapping, weight_mapping
from iiverl_megatron.parallel import tensor_group
from iiverl_megatron.weights import global_name

LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


class Adapter(nn.Module):
    """This process's part of an adapter, in fp32: `lora_A` (rank × inputs) and `lora_B` (outputs × rank)."""

    def __init__(self, inputs: int, outputs: int, rank: int, device: torch.device) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "device": device, "dtype": torch.float32}
        self.lora_A = nn.Linear(inputs, rank, **options)
        self.lora_B = nn.Linear(rank, outputs, **options)


class LayerAdapters(nn.Module):
    """The adapters of one linear layer, by the names that transformers has for the layers joined in it.

    `forward` takes the layer's input and returns what the adapters add to its output.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig) -> None:
        super().__init__()
        self.enabled, self.scale = True, model.lora_scale
        self._sequence_parallel = config.sequence_parallel

    def sum_over_positions(self, parameter: Tensor) -> None:
        """Mark a parameter that sees this process's positions only; megatron-core sums the gradients of such."""
        parameter.sequence_parallel = self._sequence_parallel  # type: ignore[attr-defined]


class ColumnAdapters(LayerAdapters):
    """The adapters of a layer whose outputs are split: queries, keys and values, or gate and up projection."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        sizes: Mapping[str, tuple[int, int]],
        adapted: Sequence[str],
        groups: int | None,
        device: torch.device,
    ) -> None:
        """Create those `adapted` of the joined layers.

        `sizes` has the inputs and outputs of all of them, whole. Outputs are joined by `groups` of heads, or one after the other.
        """
        super().__init__(config, model)
        self._rank, self._adapted, self._groups = model.lora_rank, tuple(adapted), groups
        self._rows = {name: outputs // tensor_group().size() for name, (_, outputs) in sizes.items()}
        for name in adapted:
            adapter = Adapter(sizes[name][0], self._rows[name], model.lora_rank, device)
            self.sum_over_positions(adapter.lora_A.weight)
            self.add_module(name, adapter)

    def forward(self, input_SBD: Tensor) -> Tensor:
        """See `LayerAdapters`."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in self._adapted}
        a = torch.cat([part.lora_A.weight for part in parts.values()]).to(input_SBD.dtype)
        low_SBR = F.linear(input_SBD, a)
        if self._sequence_parallel:
            low_SBR = gather_from_sequence_parallel_region(low_SBR)
        else:  # each process has the gradient of its outputs; the backward pass of this copy sums them
            low_SBR = copy_to_tensor_model_parallel_region(low_SBR)
        lows = dict(zip(parts, low_SBR.split(self._rank, -1), strict=True))
        outputs = [
            F.linear(lows[name], parts[name].lora_B.weight.to(low_SBR.dtype))
            if name in parts
            else low_SBR.new_zeros(*low_SBR.shape[:-1], rows)
            for name, rows in self._rows.items()
        ]
        return self.scale * self._join(outputs)

    def _join(self, outputs: list[Tensor]) -> Tensor:
        """Join the outputs of this process's layers in the order of the layer that they are joined in."""
        if self._groups is None:
            return torch.cat(outputs, -1)
        size, rank = tensor_group().size(), tensor_group().rank()
        if self._groups >= size:
            return _by_group(outputs, self._groups // size)
        # Each process has a part of a group.
        whole = [all_gather_last_dim_from_tensor_parallel_region(each) for each in outputs]
        return _by_group(whole, self._groups).chunk(size, -1)[rank]


def _by_group(outputs: list[Tensor], groups: int) -> Tensor:
    return torch.cat([each.unflatten(-1, (groups, -1)) for each in outputs], -1).flatten(-2)


class RowAdapters(LayerAdapters):
    """The adapter of a layer whose inputs are split: the output of attention, or the down projection."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        name: str,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        """Create the adapter; `size` is the number of inputs and outputs of the whole layer."""
        super().__init__(config, model)
        self._name = name
        adapter = Adapter(size[0] // tensor_group().size(), size[1], model.lora_rank, device)
        self.sum_over_positions(adapter.lora_B.weight)
        self.add_module(name, adapter)

    def forward(self, input_SBD: Tensor) -> Tensor:
        """See `LayerAdapters`."""
        adapter: Any = getattr(self, self._name)
        low_SBR = F.linear(input_SBD, adapter.lora_A.weight.to(input_SBD.dtype))
        if self._sequence_parallel:
            low_SBR = reduce_scatter_to_sequence_parallel_region(low_SBR)
        else:
            low_SBR = reduce_from_tensor_model_parallel_region(low_SBR)
        return self.scale * F.linear(low_SBR, adapter.lora_B.weight.to(low_SBR.dtype))


def add_adapters(chunk: GPTModel, model: ModelConfig, architecture: Architecture, role: Role) -> None:
    """Freeze a chunk, but not a critic's head, and put adapters beside its linear layers; nothing happens at rank 0.

    Experts have none: in transformers, those of a layer are one tensor, which is not a linear layer.

    Raises:
        ConfigError: no layer of the model has a name that `target_modules` matches, or a name matches none.
    """
    if not model.lora_rank:
        return
    try:
        chosen = set(chosen_layers(model, architecture.linear_layers))
    except ValueError as error:
        raise ConfigError(f"no {role} model can be built from '{model.path}': {error}") from error
    chunk.requires_grad_(False)
    if role == "critic" and chunk.post_process:
        chunk.output_layer.requires_grad_(True)
    if chunk.pre_process:
        chunk.embedding.register_forward_hook(_start_gradient)
    for name, layer in list(chunk.named_modules()):
        if name.rpartition(".")[2] not in LINEAR or ".experts." in name:
            continue
        mapping = weight_mapping(global_name(f"{name}.weight", chunk), architecture, role)
        layers = [each.removesuffix(".weight") for each in mapping.names]
        adapted = [each for each in layers if each in chosen]
        if adapted:
            layer.adapters = _make_adapters(layer, layers, adapted, mapping, model, architecture)
            layer.register_forward_hook(_add_output)


def _make_adapters(
    layer: Any,
    layers: Sequence[str],
    adapted: Sequence[str],
    mapping: WeightMapping,
    model: ModelConfig,
    architecture: Architecture,
) -> LayerAdapters:
    config, device = architecture.transformer, layer.weight.device
    sizes = {each.rpartition(".")[2]: architecture.linear_layers[each] for each in layers}
    if isinstance(mapping.sharding, Sliced):
        ((name, size),) = sizes.items()
        return RowAdapters(config, model, name, size, device)
    groups = mapping.sharding.groups if isinstance(mapping.sharding, Attention) else None
    return ColumnAdapters(config, model, sizes, [each.rpartition(".")[2] for each in adapted], groups, device)


def _add_output(layer: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
    """Add what a layer's adapters do to its output."""
    if not layer.adapters.enabled:
        return None
    input_SBD = inputs[0]
    if (
        getattr(layer, "layer_norm_weight", None) is not None
    ):  # Transformer Engine's layer begins with the norm
        weight = layer.layer_norm_weight
        input_SBD = F.rms_norm(input_SBD, weight.shape, weight, layer.eps)
    return output[0] + layer.adapters(input_SBD), output[1]


def _start_gradient(embedding: Any, inputs: Any, output: Tensor) -> Tensor:
    """Let gradients flow from here on, as stages send them and recomputed layers ask for them."""
    return output.requires_grad_() if torch.is_grad_enabled() else output


def adapted_layers(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """Return this process's layers with adapters, by the global name of their weights."""
    return {
        global_name(f"{name}.weight", chunk): layer
        for chunk in chunks
        for name, layer in chunk.named_modules()
        if isinstance(getattr(layer, "adapters", None), LayerAdapters)
    }


def checked_merges(
    layers: Mapping[str, Any],
    weights: Iterator[tuple[str, WeightMapping, list[Tensor]]],
    scale: float,
    dtype: torch.dtype | None,
    context: Callable[[], Any],
) -> Iterator[tuple[str, Tensor]]:
    """Yield whole weights with adapters merged into them, once they are seen to compute what layers do.

    They are merged in fp32 or wider, and then converted to `dtype`, if given, or to the weight's own. The adapters of a
    weight precede it. `layers` are those of this process, which checks their weights within `context`. See
    `iiverl_core.training.adapter.checked_merges`.

    Raises:
        WeightMismatchError: a merged weight is another one than that with which its layer computes.
    """
    adapters: dict[str, Tensor] = {}
    left = set(layers)
    for name, mapping, tensors in weights:
        if is_adapter(name):
            adapters |= zip(mapping.names, tensors, strict=True)
            continue
        merged = [
            _merged(each, tensor, adapters, scale)
            for each, tensor in zip(mapping.names, tensors, strict=True)
        ]
        if name in layers:
            left.remove(name)
            with context(), torch.no_grad():
                _check_merged(layers[name], mapping, merged)
        for each, tensor, before in zip(mapping.names, merged, tensors, strict=True):
            yield each, tensor.to(dtype or before.dtype)
    if left or adapters:
        raise WeightMismatchError(
            f"no weights were merged for {', '.join(sorted(left | adapters.keys()))}, which have adapters"
        )


def _merged(name: str, weight: Tensor, adapters: dict[str, Tensor], scale: float) -> Tensor:
    layer = name.removesuffix(".weight")
    a, b = adapters.pop(f"{layer}.{A}.weight", None), adapters.pop(f"{layer}.{B}.weight", None)
    return weight if a is None or b is None else merge_adapter(weight, a, b, scale)


def _check_merged(layer: Any, mapping: WeightMapping, merged: Sequence[Tensor]) -> None:
    """Apply a layer and its merged weight to the same inputs in fp64; processes that share the layer do so together."""
    group, weight, adapters = tensor_group(), layer.weight.detach(), layer.adapters
    rank, size = group.rank(), group.size()
    splits_inputs = isinstance(mapping.sharding, Sliced)
    own = mapping.sharding.split(merged, rank, size)
    width = weight.shape[1] * (size if splits_inputs else 1)
    inputs_SBD = probe_inputs(mapping.names[0], PROBES * size, width)[:, None].to(weight.device)
    sequence_parallel = size > 1 and layer.config.sequence_parallel
    local_SBD = inputs_SBD.chunk(size, -1)[rank] if splits_inputs else inputs_SBD
    rows = max(1, CHUNK // weight.shape[1])
    off = torch.cat(
        [
            local_SBD @ (weight[i : i + rows].double() - own[i : i + rows].double()).t()
            for i in range(0, len(weight), rows)
        ],
        -1,
    )
    norms = [weight.double().square().sum(), off.new_zeros(())]
    for part in adapters.children():
        norms[1] += part.lora_A.weight.double().square().sum() * part.lora_B.weight.double().square().sum()
    bounds = torch.stack(norms)
    if splits_inputs:
        dist.all_reduce(off, group=group)
        dist.all_reduce(bounds, group=group)
    if sequence_parallel and splits_inputs:
        off = off.chunk(size)[rank]
    elif sequence_parallel:
        local_SBD = inputs_SBD.chunk(size)[rank]
    parameters = {name: each.detach().double() for name, each in adapters.named_parameters()}
    off += torch.func.functional_call(adapters, parameters, (local_SBD,))
    # Which of the joined layers each output is of.
    labels = [each.new_full((len(each), 1), i) for i, each in enumerate(merged)]
    owners = labels[0] if splits_inputs else mapping.sharding.split(labels, rank, size)
    errors = off.new_zeros(len(merged)).index_add(0, owners[:, 0].long(), off.square().sum((0, 1)))
    allowed = ROUNDING * (bounds[0].sqrt() + adapters.scale * bounds[1].sqrt())
    for name, error in zip(mapping.names, errors.sqrt(), strict=True):
        if error > allowed * len(inputs_SBD) ** 0.5:
            raise wrong_merge(name, error.item(), allowed.item())
