"""A training backend on megatron-core: tensor, pipeline, virtual pipeline, sequence, expert and data parallel."""

from iiverl_megatron.backend import MegatronBackend

__all__ = ["MegatronBackend"]
