"""Whether the head in tiles computes what the logits of all tokens do, in less memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_check_parts.setting import GIB, Numbers, Setting
from iiverl_core.training.head import head_log_probs
from iiverl_core.training.log_probs import token_log_probs

TOKENS, COMPARED = 32768, 2048  # with a vocabulary of 152 k; less with a small one
TOLERANCE = 1e-5  # of the largest entry of a gradient, in fp32
LARGE = 100_000  # entries of a vocabulary
LEAST_RATIO = 20.0  # of the memory that both ways need beyond their inputs and gradients


class _Inputs(NamedTuple):
    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor


def head(setting: Setting) -> Numbers:
    """Measure a forward and a backward pass of the head both ways in bf16, and compare gradients in fp32.

    Raises:
        ValueError: gradients differ, or a large vocabulary takes more than a twentieth of the memory.
    """
    shape = setting.size.shape
    large = shape["vocab_size"] >= LARGE
    compared = _inputs(setting, COMPARED if large else 256, torch.float32)
    gradients = {name: way(compared) for name, way in WAYS.items()}
    off = max(
        ((tiled - plain).abs().max() / plain.abs().max()).item()
        for tiled, plain in zip(gradients["in tiles"], gradients["at once"], strict=True)
    )
    if not off < TOLERANCE:
        raise ValueError(f"gradients of the head in tiles are off by {off:.2g} of the largest entry")
    del compared, gradients
    numbers: Numbers = {"gradients off by": off}
    inputs = _inputs(setting, TOKENS if large else 1024, torch.bfloat16)
    memory = {}
    for name, way in WAYS.items():
        numbers[f"{name} s"] = setting.seconds(lambda way=way: way(inputs))
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated() + sum(each.nbytes for each in inputs[:2])
            torch.cuda.reset_peak_memory_stats()
            way(inputs)
            memory[name] = torch.cuda.max_memory_allocated() - before
            numbers[f"{name} GiB"] = memory[name] / GIB
    if memory:
        numbers["memory ratio"] = memory["at once"] / memory["in tiles"]
        if large and numbers["memory ratio"] < LEAST_RATIO:
            raise ValueError(f"the head in tiles takes 1/{numbers['memory ratio']:.1f} of the memory")
    return numbers


def _inputs(setting: Setting, tokens: int, dtype: torch.dtype) -> _Inputs:
    shape = setting.size.shape
    width, vocabulary = shape["hidden_size"], shape["vocab_size"]
    random = torch.Generator(setting.device).manual_seed(0)
    options = {"device": setting.device, "dtype": dtype, "generator": random}
    return _Inputs(
        torch.randn(tokens, width, **options),
        torch.randn(vocabulary, width, **options) * width**-0.5,
        torch.randint(vocabulary, (tokens,), device=setting.device, generator=random),
    )


def _at_once(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    return _gradients(
        inputs,
        lambda hidden_TD, weight_VD: token_log_probs(
            F.linear(hidden_TD, weight_VD), inputs.targets_T, 1.0, entropy=False
        )[0],
    )


def _in_tiles(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    return _gradients(
        inputs,
        lambda hidden_TD, weight_VD: head_log_probs(
            hidden_TD, weight_VD, inputs.targets_T, 1.0, entropy=False
        )[0],
    )


def _gradients(inputs: _Inputs, log_probs: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a sum of log-probs whose weights differ."""
    hidden_TD, weight_VD = (each.detach().requires_grad_() for each in inputs[:2])
    log_probs_T = log_probs(hidden_TD, weight_VD)
    weights_T = torch.cos(torch.arange(len(log_probs_T), device=hidden_TD.device))
    (weights_T @ log_probs_T.float()).backward()
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    return hidden_TD.grad, weight_VD.grad


WAYS: dict[str, Callable[[_Inputs], tuple[Tensor, Tensor]]] = {"at once": _at_once, "in tiles": _in_tiles}
