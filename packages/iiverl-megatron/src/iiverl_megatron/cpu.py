"""megatron-core on processes without CUDA.

megatron-core asks for CUDA by name in over two hundred places: `device="cuda"`, `torch.cuda.current_device()`, random
states of a CUDA generator, parameters whose type must be called `torch.cuda.FloatTensor`. None of it is needed to
compute on gloo, so `on_cpu()` replaces it:

- calls of torch that name a CUDA device, and `Tensor.cuda()`, use the CPU (a `TorchFunctionMode`, which sees each call);
- `Tensor.type()` returns `torch.cuda.FloatTensor` for `torch.FloatTensor`, which optimizers compare with;
- `torch.cuda.current_device`, `synchronize`, `Stream`, … return the CPU or do nothing;
- the tracker of random states saves and restores the CPU's generator;
- functions that megatron-core would compile run eagerly: compiling them takes longer than it saves.

Everything is restored on exit. This module is imported only if the device is the CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel import random as tracker
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let megatron-core compute on the CPU in this thread."""
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for place, name, replacement in _REPLACEMENTS:
            stack.enter_context(patch.object(place, name, replacement))
        stack.enter_context(_CudaIsCpu())
        yield


class _CudaIsCpu(TorchFunctionMode):
    """Replace `cuda` by `cpu` in the arguments of every call of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.pin_memory:
            return args[0].clone()  # pinning copies
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if any(_is_cuda(each) for each in args):
            args = tuple(torch.device("cpu") if _is_cuda(each) else each for each in args)
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **(kwargs or {}))


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: there are no kernels to wait for and no device to select."""


class _NoStream:
    """A CUDA stream or event on a CPU, where everything is done when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    record = wait = synchronize = wait_stream = wait_event = _nothing

    def record_event(self, *args: Any) -> "_NoStream":
        """Return an event that has happened."""
        return self


def _get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _read(tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return a tensor of the host as it is."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


_REPLACEMENTS: list[tuple[Any, str, Callable[..., Any]]] = [
    (torch.cuda, "current_device", lambda: torch.device("cpu")),
    (torch.cuda, "synchronize", _nothing),
    (torch.cuda, "set_device", _nothing),
    (torch.cuda, "empty_cache", _nothing),
    (torch.cuda, "Stream", _NoStream),
    (torch.cuda, "Event", _NoStream),
    (torch.cuda, "current_stream", _NoStream),
    (torch.cuda, "default_stream", _NoStream),
    (torch.cuda, "stream", nullcontext),
    (torch.cuda, "manual_seed", torch.manual_seed),
    (torch.cuda, "get_rng_state", _get_state),
    (torch.cuda, "set_rng_state", _set_state),
    (token_dispatcher, "maybe_move_tensor_to_cpu", _read),
    (tracker, "_get_cuda_rng_state", _get_state),
    (tracker, "_set_cuda_rng_state", _set_state),
]
