"""How weights get into the engine: a backend of vLLM's weight transfer for an engine that lives in this process."""

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
    """Weights that are handed over together. The engine may hold on to the tensors until the update is finished."""

    names: list[str]
    tensors: list[Tensor]


def buckets(weights: Iterable[tuple[str, Tensor]], size: int) -> Iterator[dict[str, list]]:
    """Gather copies of weights until they have `size` bytes; the fields of a `Bucket` each time.

    Each tensor is copied before the next is asked for, since the one who gives them may use its memory again.
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
    """Loads what it is handed, layer by layer, into the memory that the engine computes with.

    vLLM keeps a layer's weights until all of it is there, so an update needs memory for a bucket and a layer.
    """

    init_info_cls = WeightTransferInitInfo
    update_info_cls = Bucket
    _open = False

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Make the layers ready; an update that broke off is closed first, or its remains would count as this one's."""
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
        """Bring every layer into the form that its kernel computes with."""
        finalize_layerwise_reload(self.model, self.model_config)
        self._open = False
        if self.device.type == "cpu":
            _repack_tied(self.model)
        else:  # weights may come on a thread of their own, and with it on another stream than what is generated next
            torch.cuda.synchronize(self.device)

    def shutdown(self) -> None:
        """Nothing to release."""


def _pack_experts_again(model: nn.Module) -> None:
    """Let the experts of a layer be brought into their kernel's layout after loading, as they were the first time.

    On a CPU the kernel does that when it is made, and it would not be made again: what is loaded would be read in a
    layout that it does not have.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _repack_tied(model: nn.Module) -> None:
    """Let layers that share a parameter with another one pack it again.

    A kernel on a CPU computes with a copy in its own layout. Loading renews the copy of the layer that the checkpoint
    names, and not that of a head tied to the embedding.
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
