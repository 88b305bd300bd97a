"""Weights, gradients and the optimizer's state on one device."""

from dataclasses import dataclass
from math import ceil

from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory.layout import Layout, Stage

MOMENTS = 2
"""AdamW's running means of the gradient and of its square, for each parameter."""
FP32 = 4


@dataclass(frozen=True)
class Held:
    """Parameters on one device: `dense`, and those of `experts`, whose copies lie on other devices."""

    dense: int
    experts: int = 0

    @property
    def all(self) -> int:
        """All of them."""
        return self.dense + self.experts


@dataclass(frozen=True)
class States:
    """Bytes on one device; `gathered` is what FSDP collects from other devices while a model is used."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0


def model_parameters(facts: ModelFacts, *, language: bool) -> int:
    """Parameters of a causal language model, or of a backbone whose head gives one number a token."""
    return facts.parameters if language else facts.parameters - _head(facts) + facts.hidden_size


def held(facts: ModelFacts, layout: Layout, stage: Stage, *, language: bool) -> Held:
    """Parameters on one device of a pipeline stage, under tensor, pipeline and expert parallelism.

    A stage has its share of the layers, as many with experts as any. Norms and routers are on each of its devices;
    experts are whole, on one device of an expert-parallel group. The vocabulary is filled up to a multiple of the tensor
    size.
    """
    layers = facts.layers // layout.pipeline
    sparse = ceil(len(facts.expert_layers) / layout.pipeline)
    dense = layers * (ceil(facts.attention_parameters / layout.tensor) + facts.norm_parameters)
    dense += (layers - sparse) * ceil(facts.mlp_parameters / layout.tensor) + sparse * facts.router_parameters
    embedding = ceil(facts.vocabulary / layout.tensor) * facts.hidden_size
    alone = layout.pipeline == 1
    if stage == "first" or alone:
        dense += embedding
    if stage == "last" or alone:
        dense += facts.hidden_size  # the last norm
        if not language:
            dense += facts.hidden_size
        elif not (alone and facts.tied_embeddings):  # tied, the last stage has a copy of its own
            dense += embedding
    return Held(dense, sparse * ceil(facts.experts / layout.expert) * facts.expert_parameters)


def states(facts: ModelFacts, layout: Layout, stage: Stage, *, language: bool, trained: bool) -> States:
    """Bytes of a model's states on one device, all of them on the device."""
    if layout.sharded:
        return _sharded(facts, layout, language=language, trained=trained)
    part = held(facts, layout, stage, language=language)
    weights = part.all * layout.weight_bytes
    if not trained:
        return States(weights)
    return States(weights, part.all * FP32, _distributed_optimizer(part, layout))


def _distributed_optimizer(part: Held, layout: Layout) -> int:
    """Bytes of Megatron's distributed optimizer: each replica of a parameter has a part of its state.

    Two moments and, where weights are not fp32 themselves, an fp32 copy.
    """
    each = FP32 * (MOMENTS + (layout.weight_bytes != FP32))
    replicas = layout.data * layout.context
    expert_replicas = max(layout.devices // (layout.pipeline * layout.expert), 1)
    return ceil(part.dense * each / replicas) + ceil(part.experts * each / expert_replicas)


def _sharded(facts: ModelFacts, layout: Layout, *, language: bool, trained: bool) -> States:
    """Bytes under FSDP2, which spreads weights, gradients and moments evenly and collects a layer at a time.

    Collected are embedding and head for a whole pass, a layer and, ahead of its turn, the next; in the backward pass
    their gradients besides, in the dtype of the weights. With offloading, the shards are in CPU memory, in use too.
    """
    experts = facts.router_parameters + facts.experts * facts.expert_parameters
    layer = facts.attention_parameters + facts.norm_parameters
    layer += experts if facts.expert_layers else facts.mlp_parameters
    head = _head(facts) if language else facts.hidden_size
    outside = facts.embedding_parameters + facts.hidden_size + head
    gathered = (outside + 2 * layer) * layout.weight_bytes * (2 if trained else 1)
    shard = ceil(model_parameters(facts, language=language) / layout.devices) * layout.master_bytes
    here = 0 if layout.offloaded else shard
    if not trained:
        return States(here, gathered=gathered)
    return States(here, here, MOMENTS * here, gathered)


def _head(facts: ModelFacts) -> int:
    return 0 if facts.tied_embeddings else facts.embedding_parameters
