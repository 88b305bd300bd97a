"""Memory of activations on one device, in addition to a model's states.

After Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", whose count of the
tensors that a layer keeps for its backward pass is adapted to RMS norms, rotary embeddings, grouped-query attention,
gated MLPs and experts, without dropout. Temporary buffers of kernels, fragmentation, and the memory of the driver and
of communication (1-3 GB) are left out.
"""

from dataclasses import dataclass
from math import lcm

from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory.layout import Layout, Stage

FP32 = 4


@dataclass(frozen=True)
class Work:
    """The largest micro-batch of one model.

    `tokens` in total, of which `responses` are response tokens. With `checkpointing`, activations are recomputed: of
    groups of `recomputed` layers or, if `only_first`, of that many at the beginning of a stage's chunk.
    """

    tokens: int
    responses: int
    checkpointing: bool = False
    recomputed: int = 1
    only_first: bool = False


def kept_by_a_layer(facts: ModelFacts, layout: Layout, work: Work) -> int:
    """Count the bytes that a layer of transformers (under FSDP) or megatron-core keeps for its backward pass.

    Both keep the inputs and outputs of two norms, outside the tensor-parallel regions; attention's input and output,
    and one fp32 number per head, since its kernels keep no scores; and the numbers that `_elements` counts. Experts are
    assumed to be used evenly. Angles of rotary embeddings (about 1%) are left out.
    """
    tokens = work.tokens / layout.context
    size, split = layout.weight_bytes, layout.tensor
    norm = FP32 if layout.sharded else 0  # transformers' norms keep an intermediate in fp32
    between = 2 * facts.hidden_size * (2 * size + norm) / layout.sequence_split
    attention, mlp = _elements(facts, megatron=not layout.sharded)
    if (
        layout.sharded
    ):  # heads of keys and values are repeated if there are too few for the devices of a sequence
        copies = lcm(facts.kv_heads, layout.context) // facts.kv_heads
        attention += 2 * facts.kv_size * (copies - 1)
    inside = attention * size + facts.heads * FP32
    if (
        facts.qk_norm
    ):  # megatron-core copies the queries out of the fused projection, and keeps the keys in it
        inside += (
            (facts.query_size + facts.kv_size) * (size + norm) if layout.sharded else facts.query_size * size
        )
    if facts.expert_layers:
        routed = (mlp * size + facts.experts * FP32) / layout.sequence_split
        return round(tokens * (between + inside / split + routed))
    return round(tokens * (between + (inside + mlp * size) / split))


def _elements(facts: ModelFacts, *, megatron: bool) -> tuple[int, int]:
    """Count the numbers per token that attention and MLP keep.

    Attention keeps queries, keys and values after the rotary embedding, and its output; megatron-core also keeps the
    fused projection. The MLP keeps the gate, its activation, the up projection and their product; megatron-core keeps
    the up projection twice, and with experts the product before and after its routing weight. An expert also keeps its
    input, and in transformers its output.
    """
    query, kv = facts.query_size, facts.kv_size
    attention = 3 * query + 3 * kv if megatron else 2 * query + 2 * kv
    if not facts.expert_layers:
        return attention, (5 if megatron else 4) * facts.intermediate_size
    inner = 6 * facts.expert_size if megatron else 4 * facts.expert_size
    return attention, facts.experts_per_token * (inner + (1 if megatron else 2) * facts.hidden_size)


def layer_work(facts: ModelFacts, layout: Layout, work: Work, *, trained: bool) -> int:
    """Count the bytes that exist only while a layer is at work, under FSDP: not during the head's work.

    Without a backward pass these are its activations. In the backward pass they are the gradients of two tensors of the
    MLP's width at a time and, with checkpointing, the activations that are computed again.
    """
    layer = kept_by_a_layer(facts, layout, work)
    if not trained:
        return layer
    tokens, width = work.tokens / layout.context, facts.intermediate_size / layout.tensor
    if facts.expert_layers:
        width = facts.experts_per_token * facts.expert_size / layout.sequence_split
    return round(2 * tokens * width * layout.weight_bytes) + (layer if work.checkpointing else 0)


def activations(facts: ModelFacts, layout: Layout, stage: Stage, work: Work, *, trained: bool) -> int:
    """Count the peak bytes of activations on one device of a pipeline stage.

    Without a backward pass, these are the activations of one layer. With one, they are those of all layers and all
    micro-batches in flight; the first stage has one micro-batch in flight per stage, and with interleaved chunks
    (p - 1) / (p v) more. With checkpointing only the inputs of what is recomputed at a time are kept, and its activations
    exist once more while it is. Under FSDP `layer_work` is included.
    """
    layer = kept_by_a_layer(facts, layout, work)
    if not trained:
        return layer
    if layout.sharded:
        kept = (
            work.tokens / layout.context * facts.hidden_size * layout.weight_bytes
            if work.checkpointing
            else layer
        )
        return round(facts.layers * kept) + layer_work(facts, layout, work, trained=True)
    in_flight = layout.pipeline if stage == "first" else 1
    layers = facts.layers / layout.pipeline * in_flight
    if layout.chunks > 1 and stage == "first":
        layers *= 1 + (layout.pipeline - 1) / (layout.pipeline * layout.chunks)
    if not work.checkpointing:
        return round(layers * layer)
    tokens = work.tokens / layout.context
    inputs = tokens * facts.hidden_size * layout.weight_bytes / layout.sequence_split
    chunk = max(facts.layers // (layout.pipeline * layout.chunks), 1)
    recomputed = min(work.recomputed, chunk)
    if not work.only_first:
        return round(layers * inputs / recomputed) + recomputed * layer
    share = recomputed / chunk
    return round(layers * (share * inputs + (1 - share) * layer)) + layer
