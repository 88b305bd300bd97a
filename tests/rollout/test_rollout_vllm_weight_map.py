"""Which of an engine's parameters can be compared with the weights it was given. Needs no vLLM."""

import pytest
import torch
from torch import nn

from iiverl_core.rollout.vllm.weight_map import WeightMap


class UnquantizedLinearMethod:
    """Stands for vLLM's."""


class Fp8LinearMethod:
    """Stands for vLLM's: its weights are scaled, and some are transposed."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_no_weight_is_located_in_quantised_parameters(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("plain", "quantised", "norm")})
    model["plain"].quant_method = UnquantizedLinearMethod()  # pyright: ignore[reportArgumentType]
    model["quantised"].quant_method = Fp8LinearMethod()  # pyright: ignore[reportArgumentType]
    model["quantised"].weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
    weights = WeightMap.of(model, {f"{name}.weight": (4, 4) for name in model})
    assert weights.locations.keys() == {"plain.weight", "norm.weight"}
    assert weights.unclaimed == ["quantised.weight"]
