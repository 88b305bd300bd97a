"""Weights of linear layers on CPUs, in the order in which a product with few rows reads them.

torch's products copy a weight into such an order at each call. For the few rows of decoding, that takes about as long as the
product. oneDNN takes weights that are in its order already. Products in fp32 differ in their last bits, since MKL computes
the others; those in bf16 are oneDNN's either way.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LEAST = 2**17  # elements of a weight; products with smaller ones gain little


class PackedWeights:
    """The packed weights of a model's linear layers, beside its own; for inference."""

    def __init__(self, model: nn.Module) -> None:
        """Let the model's large linear layers compute with packed weights, where torch can pack them."""
        self._packed: dict[nn.Linear, Tensor] = {}
        for layer in model.modules():
            if type(layer) is nn.Linear and layer.weight.numel() >= LEAST and _can_pack(layer.weight):
                layer.forward = partial(self._linear, layer)

    def clear(self) -> None:
        """Forget them, since the weights change; they are packed again when they are needed."""
        self._packed.clear()

    def _linear(self, layer: nn.Linear, input: Tensor) -> Tensor:
        packed = self._packed.get(layer)
        if packed is None:
            packed = self._packed[layer] = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
        product: Any = torch.ops.mkldnn._linear_pointwise(input, packed, layer.bias, "none", [], "")
        return product


def _can_pack(weight: Tensor) -> bool:
    if not weight.is_cpu or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if weight.dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype is torch.float32
