"""What vLLM's workers can do for this engine beyond their own: tell what weights they compute with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import iiverl_core.rollout.vllm.transfer  # noqa: F401  # workers import this module before they ask for the backend
from iiverl_core.rollout.vllm.layout import Layout, Part
from iiverl_core.rollout.weights import digest


class WorkerExtension:
    """Mixed into vLLM's worker, and called by `collective_rpc`."""

    get_model: Any
    model_runner: Any

    def iiverl_weight_parts(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Part]:
        """Give what is held here of each of the weights of these `shapes`, of those that can be found."""
        return {name: places[0].part for name, places in Layout.of(self.get_model(), shapes).pieces.items()}

    def iiverl_unclaimed(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Give the engine's parameters in which none of the weights of these `shapes` was found."""
        return Layout.of(self.get_model(), shapes).unclaimed

    @torch.inference_mode()
    def iiverl_weight_digests(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Give the digests of what is held here of each weight, one for each place where it is computed with."""
        return {
            name: [digest(value) for piece in places for value in piece.values()]
            for name, places in Layout.of(self.get_model(), shapes).pieces.items()
        }

    @torch.inference_mode()
    def iiverl_clear_cache(self) -> None:
        """Overwrite all cached keys and values with zeros."""
        for cache in self.model_runner.kv_caches:
            cache.zero_()
