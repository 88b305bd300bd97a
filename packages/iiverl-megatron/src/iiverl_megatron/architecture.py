"""Convert the `config.json` of a transformers model to megatron-core's `TransformerConfig`.

Llama, Qwen2 (and 2.5), Qwen3 and Qwen3 MoE differ in a few options: all are decoders with RMSNorm before attention and
MLP, rotary positions, and gated MLPs with SiLU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from iiverl_core.config import ROLE_KEYS, MegatronConfig
from iiverl_core.config.model_facts import facts_from
from iiverl_core.dtypes import torch_dtype
from iiverl_core.errors import ConfigError
from iiverl_core.training import ModelSpec
from iiverl_core.training.model_config import read_model_config
from iiverl_megatron.layers import uses_transformer_engine
from iiverl_megatron.support import family_problem, parts_problem


@dataclass(frozen=True)
class Architecture:
    """megatron-core's configuration of a model, and what it does not hold.

    `tied`: the embedding is the output layer too. `inv_freq`: the frequencies of rotary positions, (head_dim / 2,).
    `linear_layers`: inputs and outputs of each linear layer by its name in transformers, without head, routers and experts.
    """

    transformer: TransformerConfig
    vocabulary: int
    tied: bool
    max_positions: int
    inv_freq: torch.Tensor
    linear_layers: Mapping[str, tuple[int, int]]


def read_architecture(spec: ModelSpec, parallel: MegatronConfig) -> Architecture:
    """Read the `config.json` at `spec.model.path`.

    Raises:
        ConfigError: there is none, its family is not supported, or `parallel` does not divide it.
    """
    config = _model_config(spec)
    return Architecture(
        transformer=_transformer_config(spec, parallel, config),
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings) and spec.role in ("actor", "reference"),
        max_positions=config.max_position_embeddings,
        inv_freq=_rotary(config),
        linear_layers=facts_from(config.to_dict()).linear_layers,
    )


def _model_config(spec: ModelSpec) -> PreTrainedConfig:
    model = spec.model
    config = read_model_config(
        model.path,
        model.override_config,
        trust_remote_code=model.trust_remote_code,
        key=ROLE_KEYS[spec.role].model,
    )
    if problem := family_problem(config.model_type) or parts_problem(facts_from(config.to_dict())):
        raise ConfigError(f"the {spec.role} model '{model.path}' {problem}")
    return config


def _transformer_config(
    spec: ModelSpec, parallel: MegatronConfig, config: PreTrainedConfig
) -> TransformerConfig:
    dtype = torch_dtype(parallel.dtype)
    engine = uses_transformer_engine(on_cpu=spec.device.type == "cpu")
    family = config.model_type
    recompute = spec.model.enable_gradient_checkpointing and spec.optim is not None
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = config.num_hidden_layers // (pipeline * (parallel.virtual_pipeline_model_parallel_size or 1))
    if recompute and parallel.recompute_method == "uniform" and layers % parallel.recompute_num_layers:
        raise ConfigError(
            f"{ROLE_KEYS[spec.role].megatron}.recompute_num_layers: {parallel.recompute_num_layers} does not divide the "
            f"{layers} layers of a stage's part of '{spec.model.path}'"
        )
    options: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "qk_layernorm": family.startswith("qwen3"),
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": family == "qwen2",
        # Dropout is off: the log-probs of a response must not change from one pass to the next.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "perform_initialization": False,  # every weight is read
        "use_cpu_initialization": spec.device.type == "cpu",
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        # A dense model beside a mixture of experts is laid out on the same processes.
        "expert_model_parallel_size": parallel.expert_model_parallel_size if family == "qwen3_moe" else 1,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": parallel.sequence_parallel and tensor > 1,
        "variable_seq_lengths": pipeline > 1,  # each micro-batch has a shape of its own
        "moe_token_dispatcher_type": "alltoall",  # variable lengths require it of dense models too
        # Interleaved stages send both ways at once; in one batch, two stages would mistake one message for another.
        "overlap_p2p_comm": parallel.virtual_pipeline_model_parallel_size is not None,
        "batch_p2p_comm": parallel.virtual_pipeline_model_parallel_size is None,
        "calculate_per_token_loss": True,  # losses are summed, not divided by the number of micro-batches or ranks
        "recompute_granularity": "full" if recompute else None,
        "recompute_method": parallel.recompute_method if recompute else None,
        "recompute_num_layers": parallel.recompute_num_layers if recompute else None,
        # These fusions need apex or Transformer Engine.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": engine,
    }
    if family == "qwen3_moe":
        options |= _experts(config, engine)
    try:
        return TransformerConfig(**options)
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"megatron-core refuses this layout for '{spec.model.path}': {error}") from error


def _experts(config: PreTrainedConfig, engine: bool) -> dict[str, Any]:
    """Return the options of a mixture of experts, without auxiliary losses."""
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    every = getattr(config, "decoder_sparse_step", 1)
    return {
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_layer_freq": [
            int(i not in dense and (i + 1) % every == 0) for i in range(config.num_hidden_layers)
        ],
        # A softmax over the selected experts is the softmax over all, normalised over the selected ones.
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": engine,
    }


def _rotary(config: PreTrainedConfig) -> torch.Tensor:
    """Compute the frequencies of rotary positions, (head_dim / 2,), as transformers does."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    theta = rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
