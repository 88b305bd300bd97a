"""A training backend on torch FSDP2: any causal LM of transformers, sharded over processes with `fully_shard`."""

from iiverl_fsdp.backend import FSDPBackend

__all__ = ["FSDPBackend"]
