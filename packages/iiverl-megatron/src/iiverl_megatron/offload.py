"""Keep weights, gradients and the optimizer's state in CPU memory while they are not used.

Weights and gradients of trained models are in megatron-core's buffers, which move as a whole; other models move parameter
by parameter. Gradients are zero when their memory is freed, so nothing of them is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from iiverl_core.config import Offload


class Offloading:
    """Move the parts of one model that `offload` names to `device` while they are used, and back.

    megatron-core's buffers are moved within `compute_context`.
    """

    def __init__(
        self,
        offload: Offload,
        chunks: Sequence[Any],
        optimizer: Any,
        device: torch.device,
        compute_context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Move everything that is offloaded to the CPU."""
        self._offload, self._chunks, self._optimizer, self._device = offload, chunks, optimizer, device
        self._compute_context = compute_context
        self._trained = optimizer is not None
        self._here = True
        if offload.gradients and self._trained:
            self.free_gradients()
        if offload.optimizer and self._trained:
            self._move_optimizer(torch.device("cpu"))
        if offload.parameters:
            self._move_parameters(to_cpu=True)

    @contextmanager
    def parameters(self) -> Iterator[None]:
        """Keep the weights on the device within. May be nested."""
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
        """Keep the optimizer's state on the device within."""
        if not self._offload.optimizer:
            yield
            return
        self._move_optimizer(self._device)
        try:
            yield
        finally:
            self._move_optimizer(torch.device("cpu"))

    def allocate_gradients(self) -> None:
        """Allocate gradients, all zero, if they are not."""
        if self._offload.gradients:
            for buffer in self._buffers():
                if buffer.grad_data.untyped_storage().size() == 0:
                    buffer.reload_from_cpu(move_params=False, move_grads=True)

    def free_gradients(self) -> None:
        """Free the memory of gradients, which have been cleared."""
        if self._offload.gradients:
            for buffer in self._buffers():
                buffer.offload_to_cpu(move_params=False, move_grads=True)

    def _move_parameters(self, *, to_cpu: bool) -> None:
        self._here = not to_cpu
        if not self._trained:
            for chunk in self._chunks:
                chunk.to("cpu" if to_cpu else self._device)
        with self._compute_context():
            for buffer in self._buffers():
                move = buffer.offload_to_cpu if to_cpu else buffer.reload_from_cpu
                move(move_params=True, move_grads=False)
            torch.cuda.synchronize()

    def _move_optimizer(self, device: torch.device) -> None:
        """Move the moments, and the fp32 masters of weights in half precision, which are the optimizer's parameters.

        Its other parameters are parts of megatron-core's buffers of weights.
        """
        for part in self._optimizer.chained_optimizers:
            masters = {
                id(each)
                for group in part.shard_fp32_from_float16_groups
                for each in group
                if each is not None
            }
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in masters:
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
    """Move a tensor, but not the step number, which a fused AdamW reads on the device alone."""
    return value.to(device) if isinstance(value, torch.Tensor) and value.dim() else value
