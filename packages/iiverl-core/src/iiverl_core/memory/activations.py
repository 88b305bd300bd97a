"""What the passes through a model keep on one device, beside its states.

After Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", whose count of the
tensors that a layer keeps for its backward pass is made here for RMS norms, rotary embeddings, grouped-query attention,
gated MLPs and experts, without dropout. Left out are what a kernel needs for a moment, fragmentation, and what the
driver and communication take (1-3 GB).
"""

from dataclasses import dataclass

from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory.layout import Layout, Stage

FP32 = 4


@dataclass(frozen=True)
class Work:
    """The largest micro-batch of one model.

    `tokens` in all, of which `responses` are response tokens. `checkpointing` computes activations again, `entropy` is
    part of the loss.
    """

    tokens: int
    responses: int
    checkpointing: bool = False
    entropy: bool = False


def kept_by_a_layer(facts: ModelFacts, layout: Layout, work: Work) -> int:
    """Bytes that one layer keeps for its backward pass, with transformers' modules under FSDP, else megatron-core's.

    Both keep the inputs and outputs of two norms, between the tensor-parallel parts; attention's input and output, and
    one fp32 number a head, since its kernels keep no scores; and what `_elements` counts. Experts are taken as evenly
    used. Angles of rotary embeddings (about a hundredth) are left out.
    """
    tokens = work.tokens / layout.context
    size, split = layout.weight_bytes, layout.tensor
    norm = FP32 if layout.sharded else 0  # transformers' norms keep an intermediate in fp32
    between = 2 * facts.hidden_size * (2 * size + norm) / layout.sequence_split
    attention, mlp = _elements(facts, megatron=not layout.sharded)
    inside = attention * size + facts.heads * FP32
    if (
        facts.qk_norm
    ):  # megatron-core copies the queries out of the joint projection, and keeps the keys within it
        inside += (
            (facts.query_size + facts.kv_size) * (size + norm) if layout.sharded else facts.query_size * size
        )
    if facts.expert_layers:
        chosen = (mlp * size + facts.experts * FP32) / layout.sequence_split
        return round(tokens * (between + inside / split + chosen))
    return round(tokens * (between + (inside + mlp * size) / split))


def _elements(facts: ModelFacts, *, megatron: bool) -> tuple[int, int]:
    """Numbers a token that attention and MLP keep.

    Queries, keys and values after the rotary embedding, and attention's output; megatron-core keeps the joint projection
    too. Gate, its activation, up and their product; megatron-core keeps up twice, and where there are experts the product
    before and after its weight. An expert also keeps what it gets, and transformers what it gives.
    """
    query, kv = facts.query_size, facts.kv_size
    attention = 3 * query + 3 * kv if megatron else 2 * query + 2 * kv
    if not facts.expert_layers:
        return attention, (5 if megatron else 4) * facts.intermediate_size
    inner = 6 * facts.expert_size if megatron else 4 * facts.expert_size
    return attention, facts.experts_per_token * (inner + (1 if megatron else 2) * facts.hidden_size)


def activations(facts: ModelFacts, layout: Layout, stage: Stage, work: Work, *, trained: bool) -> int:
    """Bytes of activations at their peak on one device of a pipeline stage.

    Without a backward pass: those of one layer. With one: those of all layers of all micro-batches that are on their
    way; the first stage has as many of them as there are stages, and with interleaved chunks (p - 1) / (p v) more. With
    checkpointing only the layers' inputs are kept, and one layer is computed again at a time.
    """
    layer = kept_by_a_layer(facts, layout, work)
    if not trained:
        return layer
    on_their_way = layout.pipeline if stage == "first" else 1
    layers = facts.layers / layout.pipeline * on_their_way
    if layout.chunks > 1 and stage == "first":
        layers *= 1 + (layout.pipeline - 1) / (layout.pipeline * layout.chunks)
    if not work.checkpointing:
        return round(layers * layer)
    tokens = work.tokens / layout.context
    inputs = tokens * facts.hidden_size * layout.weight_bytes / layout.sequence_split
    return round(layers * inputs) + layer


def logits(facts: ModelFacts, layout: Layout, stage: Stage, work: Work) -> int:
    """Bytes of the response tokens' logits, where the head is.

    As the model gives them, and in fp32 twice: scaled by the temperature, and on the way to their softmax or its
    gradient. With entropy in the loss, once more.
    """
    if layout.pipeline > 1 and stage == "first":
        return 0
    copies = layout.weight_bytes + FP32 * (2 + work.entropy)
    return round(work.responses / layout.context * facts.vocabulary / layout.tensor * copies)
