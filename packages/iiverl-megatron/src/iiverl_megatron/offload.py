"""What lies in CPU memory while it is not used: weights, gradients and the optimizer's state.

Weights and gradients that are trained lie in megatron-core's buffers, which move as a whole; what is only run forward
moves parameter by parameter. Gradients are zero whenever they leave, so that nothing of them is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from iiverl_core.config import Offload


class Offloading:
    """Moves the parts of one model that `offload` names to `device` for as long as they are used, and back.

    `arranged` gives what megatron-core's buffers have to be moved in.
    """

    def __init__(
        self,
        offload: Offload,
        chunks: Sequence[Any],
        optimizer: Any,
        device: torch.device,
        arranged: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Send everything that is offloaded to the CPU."""
        self._offload, self._chunks, self._optimizer, self._device = offload, chunks, optimizer, device
        self._arranged = arranged
        self._trained = optimizer is not None
        self._here = True
        if offload.gradients and self._trained:
            self.gradients_gone()
        if offload.optimizer and self._trained:
            self._move_optimizer(torch.device("cpu"))
        if offload.parameters:
            self._move_parameters(to_cpu=True)

    @contextmanager
    def parameters(self) -> Iterator[None]:
        """Have the weights on the device. May be nested."""
        if not self._offload.parameters or self._here:
            yield
            return
        self._move_parameters(to_cpu=False)
        try:
            yield
        finally:
            self._move_parameters(to_cpu=True)

    @contextmanager
    def optimizer(self) -> Iterator[None]:
        """Have the optimizer's state on the device."""
        if not self._offload.optimizer:
            yield
            return
        self._move_optimizer(self._device)
        try:
            yield
        finally:
            self._move_optimizer(torch.device("cpu"))

    def gradients_come(self) -> None:
        """Make room for gradients, which are zero, unless there is."""
        if self._offload.gradients:
            for buffer in self._buffers():
                if buffer.grad_data.untyped_storage().size() == 0:
                    buffer.reload_from_cpu(move_params=False, move_grads=True)

    def gradients_gone(self) -> None:
        """Give back the memory of gradients, which have been cleared."""
        if self._offload.gradients:
            for buffer in self._buffers():
                buffer.offload_to_cpu(move_params=False, move_grads=True)

    def _move_parameters(self, *, to_cpu: bool) -> None:
        self._here = not to_cpu
        if not self._trained:
            for chunk in self._chunks:
                chunk.to("cpu" if to_cpu else self._device)
        with self._arranged():
            for buffer in self._buffers():
                move = buffer.offload_to_cpu if to_cpu else buffer.reload_from_cpu
                move(move_params=True, move_grads=False)
            torch.cuda.synchronize()

    def _move_optimizer(self, device: torch.device) -> None:
        """Move the moments and, where weights are not fp32, their fp32 masters, which are the optimizer's parameters."""
        masters = self._chunks[0].config.params_dtype is not torch.float32
        for part in self._optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    if masters:
                        parameter.data = parameter.data.to(device)
                    state = part.optimizer.state[parameter]
                    state.update({name: _moved(value, device) for name, value in state.items()})

    def _buffers(self) -> list[Any]:
        if not self._trained:
            return []
        return [
            buffer for chunk in self._chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]


def _moved(value: Any, device: torch.device) -> Any:
    """Move a tensor; the number of the step stays where torch's AdamW wants it."""
    return value.to(device) if isinstance(value, torch.Tensor) and value.dim() else value
