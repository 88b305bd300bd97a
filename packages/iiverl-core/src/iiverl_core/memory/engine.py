"""The rollout engine: its weights, and how much it can remember of the sequences that it writes."""

from dataclasses import dataclass
from math import ceil

from iiverl_core.config import RunConfig
from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory.layout import BYTES
from iiverl_core.registry import ENGINES

FP32 = 4


@dataclass(frozen=True)
class EngineMemory:
    """One engine on each of its devices, in bytes; `devices` is how many it is spread over.

    `work` is what computing takes beside weights and cache; `token` the keys and values of one token; `cache` all that
    the engine keeps of them, `tokens` of them, or `sequences` of full length.
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
        """Bytes while it generates."""
        return self.weights + self.work + self.cache

    @property
    def has_room(self) -> bool:
        """Whether a sequence of full length fits."""
        return self.sequences >= 1


def engine_memory(run: RunConfig, facts: ModelFacts, device_memory: int) -> EngineMemory:
    """Count an engine on devices of `device_memory` bytes.

    An engine with a pool, as vLLM, takes `gpu_memory_utilization` of the device; what weights and work leave of it is the cache. Its work is
    counted as the logits of `max_num_seqs` tokens in fp32 and one layer's activations of `max_num_batched_tokens`.
    Another, as `hf`, takes a cache as large as the sequences that it generates at a time at their full length.
    """
    rollout = run.rollout
    longest = run.data.max_prompt_length + run.data.max_response_length
    size, split = BYTES[rollout.dtype], run.engine_devices
    weights = ceil(facts.parameters * size / split)
    token = 2 * facts.layers * ceil(facts.kv_heads / split) * facts.head_dim * size
    engine = ENGINES[rollout.name]
    if engine.memory == "sequences":
        at_a_time = min(rollout.max_num_seqs, ceil(run.data.train_batch_size * rollout.n / run.devices))
        tokens = at_a_time * longest
        work = at_a_time * facts.vocabulary * FP32
        return EngineMemory(engine.name, 1, weights, work, token, tokens * token, tokens, at_a_time)
    wide = 4 * facts.hidden_size + (2 * facts.query_size + 2 * facts.kv_size + 4 * _inner(facts)) / split
    work = rollout.max_num_seqs * facts.vocabulary * FP32
    work += round(rollout.max_num_batched_tokens * wide * size)
    cache = max(int(rollout.gpu_memory_utilization * device_memory) - weights - work, 0)
    tokens = cache // token
    return EngineMemory(engine.name, split, weights, work, token, cache, tokens, tokens // longest)


def _inner(facts: ModelFacts) -> int:
    return facts.experts_per_token * facts.expert_size if facts.expert_layers else facts.intermediate_size
