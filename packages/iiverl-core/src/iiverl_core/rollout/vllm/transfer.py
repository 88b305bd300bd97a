"""A backend of vLLM's weight transfer for an engine that lives in this process."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from iiverl_core.rollout.vllm.start import BACKEND


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """Weights that are handed over together; the engine may keep the tensors until the update is finished."""

    names: list[str]
    tensors: list[Tensor]


def buckets(weights: Iterable[tuple[str, Tensor]], size: int) -> Iterator[dict[str, list]]:
    """Copy weights and yield them as fields of a `Bucket` whenever they have `size` bytes.

    Each tensor is copied before the next is requested, since its memory may be reused then.
    """
    names: list[str] = []
    tensors: list[Tensor] = []
    held = 0
    for name, value in weights:
        names.append(name)
        tensors.append(value.detach().clone(memory_format=torch.contiguous_format))
        held += tensors[-1].nbytes
        if held >= size:
            yield {"names": names, "tensors": tensors}
            names, tensors, held = [], [], 0
    if names:
        yield {"names": names, "tensors": tensors}


class InProcessTransfer(WeightTransferEngine[WeightTransferInitInfo, Bucket]):
    """Load weights layer by layer into the memory that the engine computes with.

    vLLM loads a layer once it is complete, so an update needs memory for a bucket and a layer.
    """

    init_info_cls = WeightTransferInitInfo
    update_info_cls = Bucket
    _open = False

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Prepare the layers; an update that was interrupted is finished first, so that nothing of it is left."""
        if self._open:
            self.finish_weight_update()
        if self.device.type == "cpu":
            _pack_experts_again(self.model)
        initialize_layerwise_reload(self.model)
        self._open = True

    def receive_weights(self, update_info: Bucket) -> None:
        """Load a bucket."""
        self.model.load_weights(zip(update_info.names, update_info.tensors, strict=True))  # pyright: ignore[reportCallIssue]

    def finish_weight_update(self) -> None:
        """Convert every layer to the layout of its kernel."""
        finalize_layerwise_reload(self.model, self.model_config)
        self._open = False
        if self.device.type == "cpu":
            _repack_tied(self.model)
        else:  # weights may arrive on another thread, and so on another stream than generation
            torch.cuda.synchronize(self.device)

    def shutdown(self) -> None:
        """Nothing to release."""


def _pack_experts_again(model: nn.Module) -> None:
    """Convert the experts of a layer to their kernel's layout again after loading.

    On a CPU the kernel does that when it is built, so it has to be built again.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _repack_tied(model: nn.Module) -> None:
    """Pack parameters again that a layer shares with another one.

    On a CPU kernels compute with a packed copy. Loading updates the copy of the layer that the checkpoint names, but not
    that of a head tied to the embedding.
    """
    owners: set[int] = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        method = getattr(module, "quant_method", None)
        if id(weight) in owners and method is not None:
            method.process_weights_after_loading(module)
        owners.add(id(weight))


WeightTransferEngineFactory.register_engine(BACKEND, InProcessTransfer)
