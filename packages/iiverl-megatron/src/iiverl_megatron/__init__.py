"""A training backend on megatron-core: tensor, pipeline, virtual pipeline, sequence, expert and data parallel.

Imports neither torch nor megatron-core before the backend is used.
"""

from iiverl_core.registry.backends import BackendInfo

BACKEND = BackendInfo(
    name="megatron",
    title="Megatron",
    summary="megatron-core: tensor, pipeline, context and expert parallel",
    code="iiverl_megatron.backend:MegatronBackend",
    section="megatron",
    check_model="iiverl_megatron.support:model_problem",
)
