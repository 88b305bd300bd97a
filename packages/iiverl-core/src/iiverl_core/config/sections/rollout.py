"""The section `actor_rollout_ref.rollout`: how responses are generated, and how their log-probs are computed."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from iiverl_core.config.sections.choices import EngineName, only_engines
from iiverl_core.config.sections.section import (
    Count,
    Dtype,
    Float,
    Int,
    NoEffect,
    Nonnegative,
    NotYet,
    Section,
    follows,
)

ROLLOUT = "actor_rollout_ref.rollout"
TopK = Annotated[Int, Field(ge=-1), AfterValidator(lambda k: k or -1)]
TopP = Annotated[Float, Field(gt=0, le=1)]


class ValKwargs(Section):
    """How responses are sampled in validation."""

    top_k: TopK = -1
    """Sample from the k likeliest tokens; -1 (or 0) for all."""
    top_p: TopP = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    temperature: Nonnegative = 0.0
    """Divisor of the logits; 0 takes the likeliest token."""
    n: Count = 1
    """Responses to a prompt."""
    do_sample: bool = False
    """Sample; false takes the likeliest token."""


class LayerNameMapConfig(Section):
    """Names by which Megatron's fused layers are found."""

    qkv_layer_name: str = "qkv"
    """Name of the fused attention projection."""
    gate_proj_layer_name: str = "gate_up"
    """Name of the fused gate and up projection."""


class EngineKwargs(Section):
    """Arguments that are passed on to the engine as they are."""

    vllm: Annotated[dict[str, Any], only_engines("engine_kwargs.vllm")] = Field(default={})
    """Arguments of `vllm.LLM` that have no key of their own."""


class RolloutConfig(Section):
    """The rollout engine: sampling, memory, and the batches in which log-probs are computed."""

    name: EngineName = "vllm"
    """Engine that generates: `vllm`, or `hf` (transformers, on any device)."""
    mode: Annotated[Literal["sync", "async"], NoEffect("the engine decides")] = "sync"
    """Whether the engine is called for a batch or a request at a time."""
    n: Count = 1
    """Responses to a prompt."""
    do_sample: bool = True
    """Sample; false takes the likeliest token."""
    temperature: Nonnegative = 1.0
    """Divisor of the logits."""
    top_k: TopK = -1
    """Sample from the k likeliest tokens; -1 (or 0) for all."""
    top_p: TopP = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    seed: Int = 0
    """Seed of the sampling."""
    use_fire_sampling: Annotated[bool, NotYet("FIRE sampling", (False,))] = False
    """Sample the first token at a very high temperature."""
    prompt_length: Count = follows("data.max_prompt_length")
    """Tokens in a prompt at most."""
    response_length: Count = follows("data.max_response_length")
    """Tokens in a response at most."""
    ignore_eos: bool = False
    """Go on to the full length after an end-of-sentence token."""
    dtype: Dtype = "bfloat16"
    """Dtype of the engine's weights."""
    micro_batch_size: Annotated[Count | None, only_engines("micro_batch_size")] = None
    """Prompts that `hf` generates for at a time; null for as many as `max_num_seqs` allows."""
    max_num_seqs: Count = 1024
    """Sequences that the engine generates at a time; by default at most `max_num_batched_tokens` with vLLM."""
    gpu_memory_utilization: Annotated[Float, Field(gt=0, le=1), only_engines("gpu_memory_utilization")] = 0.5
    """Share of a device's memory that the engine may use."""
    enforce_eager: Annotated[bool, only_engines("enforce_eager")] = True
    """Run without CUDA graphs."""
    free_cache_engine: Annotated[bool, only_engines("free_cache_engine")] = True
    """Give the key-value cache's memory back after generating."""
    load_format: Annotated[str, only_engines("load_format")] = "dummy_dtensor"
    """Where the engine's first weights come from; it always gets the trained ones before it generates."""
    tensor_model_parallel_size: Annotated[Count, only_engines("tensor_model_parallel_size")] = 2
    """Tensor-parallel size per engine. Default 2, or 1 if the devices per node are odd or the model does not divide."""
    max_num_batched_tokens: Annotated[Count, only_engines("max_num_batched_tokens")] = 8192
    """Tokens that the engine computes at a time; by default at least `max_num_seqs` and, without chunked prefill, a whole sequence."""
    max_model_len: Annotated[Count | None, only_engines("max_model_len")] = None
    """Tokens in a sequence at most; null for prompt and response together."""
    disable_log_stats: Annotated[bool, only_engines("disable_log_stats")] = True
    """Leave out the engine's own statistics."""
    enable_chunked_prefill: Annotated[bool, only_engines("enable_chunked_prefill")] = True
    """Compute long prompts in pieces between the decoding of others."""
    verify_weights: Annotated[bool, only_engines("verify_weights")] = False
    """Compare a checksum of each weight in the engine with the trainer's after every update; the first is compared always."""
    update_weights_bucket_megabytes: Count = 512
    """Weights that are handed to the engine together, in MiB: the extra memory that an update needs."""
    engine_kwargs: EngineKwargs = EngineKwargs()
    calculate_log_probs: Annotated[bool, NoEffect("log-probs of the sampled tokens are always kept")] = False
    """Keep the log-prob of each sampled token."""
    log_prob_micro_batch_size: Count | None = None
    """Sequences that go through the actor together for old log-probs, counted over all devices."""
    log_prob_micro_batch_size_per_gpu: Count | None = None
    """Sequences that go through the actor together on one device; null fills up to the token budget."""
    log_prob_use_dynamic_bsz: bool = follows("actor_rollout_ref.actor.use_dynamic_bsz")
    """Fill micro-batches up to a token budget instead of counting sequences."""
    log_prob_max_token_len_per_gpu: Count = follows("actor_rollout_ref.actor.ppo_max_token_len_per_gpu")
    """Tokens in a micro-batch at most, where it is filled to a budget."""
    layer_name_map: Annotated[
        LayerNameMapConfig, NoEffect("the Megatron backend knows the names of its layers")
    ] = LayerNameMapConfig()
    val_kwargs: ValKwargs = ValKwargs()
