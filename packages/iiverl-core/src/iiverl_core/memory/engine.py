"""The rollout engine: its weights, and the size of its cache of keys and values."""

from dataclasses import dataclass
from math import ceil

from iiverl_core.config import RunConfig
from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory.layout import BYTES
from iiverl_core.registry import ENGINES

FP32 = 4
GRAPHS = 1_500_000_000
"""Estimate of what vLLM's CUDA graphs take: 1 to 2 GB, depending on the model."""


@dataclass(frozen=True)
class EngineMemory:
    """One engine on each of its devices, in bytes; `devices` is the number that it spans.

    `work` is the memory of computation, in addition to weights and cache; `token` the keys and values of one token;
    `cache` all keys and values, those of `tokens` tokens, or of `sequences` of full length.
    """

    name: str
    devices: int
    weights: int
    work: int
    token: int
    cache: int
    tokens: int
    sequences: int

    @property
    def total(self) -> int:
        """Bytes while generating."""
        return self.weights + self.work + self.cache

    @property
    def has_room(self) -> bool:
        """Whether a sequence of full length fits."""
        return self.sequences >= 1


def engine_memory(run: RunConfig, facts: ModelFacts, device_memory: int) -> EngineMemory:
    """Count the memory of an engine on devices of `device_memory` bytes.

    An engine with a pool, such as vLLM, takes `gpu_memory_utilization` of the device; its cache is what remains of this
    after weights and work. Its work is counted as the logits of `max_num_seqs` tokens in fp32, one layer's activations of
    `max_num_batched_tokens`, and `GRAPHS` unless it is eager. Other engines, such as `hf`, have a cache for the sequences that they
    generate at a time, at full length.
    """
    rollout = run.rollout
    longest = run.data.max_prompt_length + run.data.max_response_length
    size, split = BYTES[rollout.dtype], run.engine_devices
    weights = ceil(facts.parameters * size / split)
    token = 2 * facts.layers * ceil(facts.kv_heads / split) * facts.head_dim * size
    engine = ENGINES[rollout.name]
    if engine.memory == "sequences":
        concurrent = min(rollout.max_num_seqs, ceil(run.data.train_batch_size * rollout.n / run.devices))
        tokens = concurrent * longest
        work = concurrent * facts.vocabulary * FP32
        return EngineMemory(engine.name, 1, weights, work, token, tokens * token, tokens, concurrent)
    layer_width = (
        4 * facts.hidden_size + (2 * facts.query_size + 2 * facts.kv_size + 4 * _inner(facts)) / split
    )
    work = rollout.max_num_seqs * facts.vocabulary * FP32
    work += round(rollout.max_num_batched_tokens * layer_width * size)
    if not rollout.enforce_eager:
        work += GRAPHS
    cache = max(int(rollout.gpu_memory_utilization * device_memory) - weights - work, 0)
    tokens = cache // token
    return EngineMemory(engine.name, split, weights, work, token, cache, tokens, tokens // longest)


def _inner(facts: ModelFacts) -> int:
    return facts.experts_per_token * facts.expert_size if facts.expert_layers else facts.intermediate_size
