"""The rollout engines.

Packages add theirs under the entry-point group `iiverl.engines`.
"""

from dataclasses import dataclass
from typing import Literal

from iiverl_core.registry.registry import Info, Registry, load_code

GROUP = "iiverl.engines"


@dataclass(frozen=True, kw_only=True)
class EngineInfo(Info):
    """A rollout engine: `code` is a function of a `RunConfig` and a torch device that returns a `RolloutEngine`.

    `reads` names the keys of the section `rollout` that this engine reads but not all engines do. If `spans_devices`,
    an engine is split over `tensor_model_parallel_size` devices; otherwise it runs on one. With `memory` "pool" it
    takes `gpu_memory_utilization` of a device and releases it while it sleeps; with "sequences" its weights stay, and
    its cache grows with the sequences that it generates at a time. If `returns_kept`, it returns the tokens that top-k
    and top-p kept, over which the trainer then computes log-probs. Up to `max_lora_rank`, it takes the weights of LoRA
    adapters beside those of the base model, which come first (`rollout.lora_sync`). With `reads_images`, prompts may have
    images. `check_installation` is the code of a function
    without arguments that returns what is missing, or None. `check_model` is the code of a torch-free function of
    `ModelFacts` that returns why the installed engine cannot run a model, as the end of a sentence, or None.
    """

    reads: tuple[str, ...] = ()
    spans_devices: bool = False
    memory: Literal["pool", "sequences"] = "sequences"
    returns_kept: bool = False
    max_lora_rank: int = 0
    reads_images: bool = False
    check_installation: str | None = None
    check_model: str | None = None

    def missing(self) -> str | None:
        """See `Info.missing`."""
        return load_code(self.check_installation, self.name)() if self.check_installation else None


ENGINES = Registry(
    "rollout engine",
    GROUP,
    EngineInfo,
    (
        EngineInfo(
            name="vllm",
            summary="vLLM, on GPUs and CPUs, spread over as many devices as the model needs",
            code="iiverl_core.rollout.from_config:vllm_engine",
            reads_images=True,
            reads=(
                "gpu_memory_utilization",
                "enforce_eager",
                "free_cache_engine",
                "load_format",
                "tensor_model_parallel_size",
                "max_num_batched_tokens",
                "max_model_len",
                "disable_log_stats",
                "enable_chunked_prefill",
                "enable_prefix_caching",
                "engine_kwargs.vllm",
                "partial",
            ),
            spans_devices=True,
            memory="pool",
            max_lora_rank=512,
            check_installation="iiverl_core.config.vllm:missing_vllm",
            check_model="iiverl_core.config.vllm:model_problem",
        ),
        EngineInfo(
            name="hf",
            summary="transformers, on any device, for models that vLLM does not have and for small runs",
            code="iiverl_core.rollout.from_config:hf_engine",
            reads_images=True,
            returns_kept=True,
            max_lora_rank=2**31,
            reads=("micro_batch_size", "partial"),
        ),
    ),
)
