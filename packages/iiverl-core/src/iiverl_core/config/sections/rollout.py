"""The section `actor_rollout_ref.rollout`: how responses are generated, and how their log-probs are computed."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from iiverl_core.config.sections.choices import EngineName, RollouterName, only_engines
from iiverl_core.config.sections.multi_turn import MultiTurnConfig
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
    """Sample from the k most likely tokens; -1 (or 0) for all."""
    top_p: TopP = 1.0
    """Sample from the most likely tokens whose total probability is p."""
    temperature: Nonnegative = 0.0
    """Sampling temperature; 0 for greedy decoding."""
    n: Count = 1
    """Responses per prompt."""
    do_sample: bool = False
    """Sample; false for greedy decoding."""


class LayerNameMapConfig(Section):
    """Names of Megatron's fused layers."""

    qkv_layer_name: str = "qkv"
    """Name of the fused attention projection."""
    gate_proj_layer_name: str = "gate_up"
    """Name of the fused gate and up projection."""


class EngineKwargs(Section):
    """Arguments that are passed to the engine unchanged."""

    vllm: Annotated[dict[str, Any], only_engines("engine_kwargs.vllm")] = Field(default={})
    """Arguments of `vllm.LLM` that have no key of their own."""


class AgentConfig(Section):
    """The way from a prompt to a rollout."""

    default_agent_loop: RollouterName = "single_turn"
    """What answers the model: nothing (`single_turn`), functions that it calls (`tools`), a class of yours (`environment`), a
    program of yours that asks it (`agent`), or that of an installed package."""


class RolloutConfig(Section):
    """The rollout engine: sampling, memory, and micro-batches of log-probs."""

    name: EngineName = "vllm"
    """Rollout engine: `vllm`, `hf` (transformers, on any device), or one of an installed package."""
    mode: Annotated[Literal["sync", "async"], NoEffect("the engine decides")] = "sync"
    """Whether the engine is called per batch or per request."""
    n: Count = 1
    """Responses per prompt."""
    do_sample: bool = True
    """Sample; false for greedy decoding."""
    temperature: Nonnegative = 1.0
    """Sampling temperature."""
    top_k: TopK = -1
    """Sample from the k most likely tokens; -1 (or 0) for all. The trainer computes log-probs over the same tokens."""
    top_p: TopP = 1.0
    """Sample from the most likely tokens whose total probability is p. The trainer computes log-probs over the same tokens."""
    seed: Int = 0
    """Seed of the sampling."""
    partial: Annotated[bool, only_engines("partial")] = False
    """With `trainer.max_staleness`, let engines take new weights while they write responses, which they then continue.

    Responses of several steps are written side by side, so a long one holds up nothing."""
    min_engines: Count | None = None
    """Engines on `trainer.rollout_devices` that a run needs; others that cannot be started again are retired. Null for all."""
    use_fire_sampling: Annotated[bool, NotYet("FIRE sampling", (False,))] = False
    """Sample the first token at a very high temperature."""
    prompt_length: Count = follows("data.max_prompt_length")
    """Maximum tokens of a prompt."""
    response_length: Count = follows("data.max_response_length")
    """Maximum tokens of a response."""
    ignore_eos: bool = False
    """Continue to the maximum length after an end-of-sequence token."""
    dtype: Dtype = "bfloat16"
    """Dtype of the weights in the engine."""
    micro_batch_size: Annotated[Count | None, only_engines("micro_batch_size")] = None
    """Prompts per generation batch of `hf`; null for as many as `max_num_seqs` allows."""
    max_num_seqs: Count = 1024
    """Maximum concurrent sequences. Default 1024, with vLLM at most `max_num_batched_tokens`."""
    gpu_memory_utilization: Annotated[Float, Field(gt=0, le=1), only_engines("gpu_memory_utilization")] = 0.5
    """Fraction of the memory of a device that the engine may use."""
    enforce_eager: Annotated[bool, only_engines("enforce_eager")] = False
    """Run without CUDA graphs and compiled kernels, as always on a CPU: starts sooner, generates more slowly."""
    free_cache_engine: Annotated[bool, only_engines("free_cache_engine")] = True
    """Give the key-value cache's memory back after generating."""
    load_format: Annotated[str, only_engines("load_format")] = "dummy_dtensor"
    """Where the engine's initial weights come from; they are always replaced by the trained weights before generation."""
    tensor_model_parallel_size: Annotated[Count, only_engines("tensor_model_parallel_size")] = 1
    """Tensor-parallel size per engine. Default 1, or more if the weights do not fit into a device of 80 GB."""
    max_num_batched_tokens: Annotated[Count, only_engines("max_num_batched_tokens")] = 8192
    """Maximum tokens per engine step. Default at least `max_num_seqs` and, without chunked prefill, a full sequence."""
    max_model_len: Annotated[Count | None, only_engines("max_model_len")] = None
    """Maximum tokens of a sequence; null for prompt and response together."""
    disable_log_stats: Annotated[bool, only_engines("disable_log_stats")] = True
    """Do not log the statistics of the engine."""
    enable_chunked_prefill: Annotated[bool, only_engines("enable_chunked_prefill")] = True
    """Split long prompts into chunks that are computed together with decoding."""
    enable_prefix_caching: Annotated[bool, only_engines("enable_prefix_caching")] = True
    """Compute the keys and values of a prompt once for all its responses."""
    verify_weights: bool = False
    """Compare checksums of the weights in engine and trainer after every sync, not only until the weights have changed."""
    lora_sync: Literal["merged", "adapter"] = "merged"
    """What engines get of LoRA adapters: whole weights into which they are merged, or after the first sync the adapters alone."""
    update_weights_bucket_megabytes: Count = 512
    """Size of a bucket of weights in a weight sync, in MiB: the additional memory that it needs. Engines on devices of their own
    need two: the next bucket arrives while one is loaded."""
    engine_kwargs: EngineKwargs = EngineKwargs()
    agent: AgentConfig = AgentConfig()
    multi_turn: MultiTurnConfig = MultiTurnConfig()
    calculate_log_probs: Annotated[bool, NoEffect("log-probs of the sampled tokens are always kept")] = False
    """Keep the log-prob of each sampled token."""
    log_prob_micro_batch_size: Count | None = None
    """Sequences per micro-batch of old log-probs, over all devices."""
    log_prob_micro_batch_size_per_gpu: Count | None = None
    """Sequences per micro-batch of old log-probs on each device; null fills micro-batches up to the token budget."""
    log_prob_use_dynamic_bsz: bool = follows("actor_rollout_ref.actor.use_dynamic_bsz")
    """Fill micro-batches up to the token budget instead of counting sequences."""
    log_prob_max_token_len_per_gpu: Count = follows("actor_rollout_ref.actor.ppo_max_token_len_per_gpu")
    """Token budget of a micro-batch."""
    layer_name_map: Annotated[
        LayerNameMapConfig, NoEffect("the Megatron backend knows the names of its layers")
    ] = LayerNameMapConfig()
    val_kwargs: ValKwargs = ValKwargs()
