"""The engine `vllm`: its arguments, its start, and weights that are handed over in process and verified."""

from iiverl_core.rollout.vllm.arguments import engine_arguments
from iiverl_core.rollout.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine", "engine_arguments"]
