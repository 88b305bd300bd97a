"""Build this process's part of a model: one chunk, or several with a virtual pipeline."""

from typing import Any, cast

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel

from iiverl_core.config import MegatronConfig
from iiverl_core.training import ModelSpec
from iiverl_megatron.adapters import add_adapters
from iiverl_megatron.architecture import Architecture
from iiverl_megatron.heads import PolicyHead, ValueHead
from iiverl_megatron.layers import RotaryPositions, block_spec


def build_chunks(spec: ModelSpec, parallel: MegatronConfig, architecture: Architecture) -> list[GPTModel]:
    """Build this pipeline stage's chunks, without weights; beside frozen ones are LoRA adapters.

    The last chunk of the last stage has a head for the model's role: log-probs, or one number.

    Raises:
        ConfigError: no layer of the model has a name that `target_modules` matches.
    """
    count = parallel.virtual_pipeline_model_parallel_size
    return [_chunk(spec, architecture, chunk if count else None) for chunk in range(count or 1)]


def _chunk(spec: ModelSpec, architecture: Architecture, chunk: int | None) -> GPTModel:
    config = architecture.transformer
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk)
    width = config.tensor_model_parallel_size
    padded_vocabulary = -(-architecture.vocabulary // width) * width
    model = GPTModel(
        config=config,
        transformer_layer_spec=cast(Any, block_spec(config, chunk)),
        vocab_size=padded_vocabulary,
        max_sequence_length=architecture.max_positions,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        vp_stage=chunk,
    )
    rotary = RotaryPositions(cast(Any, model.rotary_pos_emb), architecture.inv_freq.to(spec.device))
    model.rotary_pos_emb = cast(Any, rotary)
    if last:
        head = (
            PolicyHead(config, model.output_layer, architecture.vocabulary)
            if spec.role in ("actor", "reference")
            else ValueHead(config, bias=spec.role == "critic")
        )
        model.output_layer = cast(Any, head)
    model.to(spec.device)
    add_adapters(model, spec.model, architecture, spec.role)
    return model


def distribute(model: GPTModel) -> DistributedDataParallel:
    """Wrap a chunk so that its gradients are reduce-scattered in fp32 over data-parallel processes."""
    return DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        model,
    )
