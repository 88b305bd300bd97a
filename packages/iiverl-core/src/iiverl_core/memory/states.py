"""Weights, gradients and the optimizer's state on one device."""

from dataclasses import dataclass
from math import ceil

from iiverl_core.config import ModelConfig
from iiverl_core.config.model_facts import ModelFacts
from iiverl_core.memory.layout import Layout, Stage

MOMENTS = 2
"""AdamW's running means of the gradient and of its square, for each parameter."""
FP32 = 4


@dataclass(frozen=True)
class DeviceParameters:
    """Parameters on one device: `dense`, and those of `experts`, which are replicated over different devices."""

    dense: int
    experts: int = 0

    @property
    def all(self) -> int:
        """Sum of both."""
        return self.dense + self.experts


@dataclass(frozen=True)
class States:
    """Bytes on one device; `gathered` is what FSDP all-gathers while a model is used."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0


def model_parameters(facts: ModelFacts, *, language: bool) -> int:
    """Count the parameters of a causal language model, or of a backbone whose head returns one number per token."""
    return facts.parameters if language else facts.parameters - _head(facts) + facts.hidden_size


def held(facts: ModelFacts, layout: Layout, stage: Stage, *, language: bool) -> DeviceParameters:
    """Count the parameters on one device of a pipeline stage, under tensor, pipeline and expert parallelism.

    Layers are distributed evenly over stages; the stage with the most expert layers is counted. Norms and routers are
    replicated on each device of a stage; an expert is not split, and is on one device of an expert-parallel group. The
    vocabulary is padded to a multiple of the tensor-parallel size.
    """
    layers = facts.layers // layout.pipeline
    sparse = ceil(len(facts.expert_layers) / layout.pipeline)
    dense = layers * (ceil(facts.attention_parameters / layout.tensor) + facts.norm_parameters)
    dense += (layers - sparse) * ceil(facts.mlp_parameters / layout.tensor) + sparse * facts.router_parameters
    embedding = ceil(facts.vocabulary / layout.tensor) * facts.hidden_size
    single_stage = layout.pipeline == 1
    if stage == "first" or single_stage:
        dense += embedding + facts.vision_parameters
    if stage == "last" or single_stage:
        dense += facts.hidden_size  # the last norm
        if not language:
            dense += facts.hidden_size
        elif not (single_stage and facts.tied_embeddings):  # a separate last stage has its own copy
            dense += embedding
    return DeviceParameters(dense, sparse * ceil(facts.experts / layout.expert) * facts.expert_parameters)


def trained_parameters(facts: ModelFacts, model: ModelConfig, *, language: bool) -> int:
    """Count the parameters that are trained: all, or those of LoRA adapters and of a critic's head."""
    if not model.lora_rank:
        return model_parameters(facts, language=language)
    sizes = [sum(size) for name, size in facts.linear_layers.items() if model.adapts(name)]
    return model.lora_rank * sum(sizes) + (0 if language else facts.hidden_size)


def held_trained(
    facts: ModelFacts, model: ModelConfig, layout: Layout, stage: Stage, *, language: bool
) -> int:
    """Count the trained parameters beside frozen weights on one device of a pipeline stage, before FSDP shards them.

    Tensor parallelism divides the matrix of an adapter that is on the divided side of its layer, and copies the other.
    Adapters need not be distributed evenly over the stages: the stage with most is counted, and the head on the last.
    """
    per_stage = [0] * layout.pipeline
    for name, (inputs, outputs) in facts.linear_layers.items():
        if model.adapts(name):
            rows = name.endswith((".o_proj", ".down_proj"))
            divided, copied = (inputs, outputs) if rows else (outputs, inputs)
            layer = int(name.split(".")[2])
            chunk = layer * layout.pipeline * layout.chunks // facts.layers
            per_stage[chunk % layout.pipeline] += model.lora_rank * (ceil(divided / layout.tensor) + copied)
    head = 0 if language or (stage == "first" and layout.pipeline > 1) else facts.hidden_size
    return max(per_stage) + head


def states(
    facts: ModelFacts,
    layout: Layout,
    stage: Stage,
    *,
    language: bool,
    trained: bool,
    adapter: int | None = None,
) -> States:
    """Count the bytes of a model's states on one device, with none of them offloaded by Megatron.

    `adapter` is the number of trained parameters beside frozen weights (`held_trained`), or None if all are trained.
    """
    if layout.sharded:
        return _sharded(facts, layout, language=language, trained=trained, adapter=adapter)
    part = held(facts, layout, stage, language=language)
    weights = part.all * layout.weight_bytes
    if adapter is not None:
        own = adapter * FP32
        optimizer = ceil(adapter / (layout.data * layout.context)) * FP32 * MOMENTS
        return States(weights + own, own, optimizer) if trained else States(weights + own)
    if not trained:
        return States(weights)
    return States(weights, part.all * FP32, _distributed_optimizer(part, layout))


def _distributed_optimizer(part: DeviceParameters, layout: Layout) -> int:
    """Count the bytes of Megatron's distributed optimizer, whose state is sharded over the replicas of a parameter.

    The state is two moments and, if the weights are not fp32, an fp32 copy.
    """
    each = FP32 * (MOMENTS + (layout.weight_bytes != FP32))
    replicas = layout.data * layout.context
    expert_replicas = max(layout.devices // (layout.pipeline * layout.expert), 1)
    return ceil(part.dense * each / replicas) + ceil(part.experts * each / expert_replicas)


def _sharded(
    facts: ModelFacts, layout: Layout, *, language: bool, trained: bool, adapter: int | None
) -> States:
    """Count the bytes under FSDP2, which shards weights, gradients and moments evenly and gathers a layer at a time.

    Embedding and head are gathered for a whole pass, together with the current layer and the prefetched next one; in
    the backward pass their gradients in the dtype of the weights are added. If weights stay gathered after a forward
    pass, all layers are. With offloading, the shards are in CPU memory even while in use. Frozen weights have no
    gradients; an adapter beside them is in fp32. Whole gradients are on the device until they are reduced.
    """
    experts = facts.router_parameters + facts.experts * facts.expert_parameters
    layer = facts.attention_parameters + facts.norm_parameters
    layer += experts if facts.expert_layers else facts.mlp_parameters
    head = _head(facts) if language else facts.hidden_size
    outside = facts.embedding_parameters + facts.hidden_size + head
    parameters = model_parameters(facts, language=language)
    gradients = trained and adapter is None
    gathered = (outside + 2 * layer) * layout.weight_bytes * (2 if gradients else 1)
    if layout.stays_gathered:
        gathered += max(parameters - outside - 2 * layer, 0) * layout.weight_bytes
    shard = ceil(parameters / layout.devices) * layout.master_bytes
    on_device = 0 if layout.offloaded else shard
    if adapter is not None:
        own = 0 if layout.offloaded else ceil(adapter / layout.devices) * FP32
        whole = adapter * layout.whole_gradient_bytes
        return (
            States(on_device + own, own + whole, MOMENTS * own, gathered)
            if trained
            else States(on_device + own, gathered=gathered)
        )
    if not trained:
        return States(on_device, gathered=gathered)
    whole = parameters * layout.whole_gradient_bytes
    return States(on_device, on_device + whole, MOMENTS * on_device, gathered)


def _head(facts: ModelFacts) -> int:
    return 0 if facts.tied_embeddings else facts.embedding_parameters
