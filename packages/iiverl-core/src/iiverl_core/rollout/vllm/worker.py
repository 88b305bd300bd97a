"""The executor and the worker extension that vLLM loads by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

import iiverl_core.rollout.vllm.transfer  # noqa: F401  # workers import this module before they ask for the backend
from iiverl_core.rollout.vllm.weight_map import Shard, WeightMap, wrong_adapters
from iiverl_core.rollout.weights import digest


class GroupExecutor(ExecutorWithExternalLauncher):
    """Run this process's part of the model, in the torch.distributed group that the process has joined.

    vLLM cuts that group into consecutive engines of `tensor_parallel_size` processes.
    """

    def _distributed_args(self) -> tuple[str, int, int]:
        """Return the init method, this process's rank, and its device, the only one that it sees.

        The processes have joined already, so vLLM uses the init method only to name shared memory on a CPU. A name for
        each process makes it use torch.distributed instead: under one name, engines of one machine, and what a killed
        one left behind, would share memory.
        """
        rank = dist.get_rank()
        return f"file:///process-{rank}", rank, 0


class WorkerExtension:
    """Methods that vLLM mixes into its worker, called by `collective_rpc`; `shapes` are those of whole weights."""

    get_model: Any
    model_runner: Any

    def iiverl_weight_shards(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Shard]:
        """Return this process's shard of each weight that can be located."""
        return {
            name: found[0].shard for name, found in WeightMap.of(self.get_model(), shapes).locations.items()
        }

    def iiverl_unclaimed(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Return the engine's parameters in which no weight was located."""
        return WeightMap.of(self.get_model(), shapes).unclaimed

    @torch.inference_mode()
    def iiverl_weight_digests(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return the digests of this process's shard of each weight, one per copy that the engine computes with."""
        return {
            name: [digest(value) for location in found for value in location.values()]
            for name, found in WeightMap.of(self.get_model(), shapes).locations.items()
        }

    @torch.inference_mode()
    def iiverl_wrong_adapters(self, weights: Mapping[str, Tensor], scale: float) -> list[str]:
        """Return the names of those LoRA weights that this process does not compute with."""
        return wrong_adapters(self.get_model(), weights, scale)

    @torch.inference_mode()
    def iiverl_clear_cache(self) -> None:
        """Overwrite all cached keys and values with zeros."""
        for cache in self.model_runner.kv_caches:
            cache.zero_()
