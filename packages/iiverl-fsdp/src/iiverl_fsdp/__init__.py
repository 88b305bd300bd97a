"""A training backend on torch FSDP2: every process is a data-parallel rank, and weights are sharded over all of them.

Imports no torch before the backend is used.
"""

from iiverl_core.registry.backends import BackendInfo

BACKEND = BackendInfo(
    name="fsdp",
    aliases=("fsdp2",),
    title="FSDP",
    summary="torch FSDP2: any causal LM of transformers, sharded over all devices",
    code="iiverl_fsdp.backend:FSDPBackend",
)
