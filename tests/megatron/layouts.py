"""Tiny models, layouts over four processes, and one batch: what tests of the Megatron backend compute on."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from iiverl_core.algorithms import find_policy_loss
from iiverl_core.algorithms.rollout_correction import RolloutCorrection
from iiverl_core.config import FSDPConfig, MegatronConfig, ModelConfig, OptimConfig
from iiverl_core.samples import TokenSequence
from iiverl_core.training import Loss, MicroBatch, ModelSpec, Role
from iiverl_core.training.aggregation import token_weights
from iiverl_core.training.batching import dummy_micro_batch, make_micro_batch
from iiverl_core.training.losses import actor_loss, critic_loss
from iiverl_core.training.planning import Packing, SequenceSize, balance, micro_batches
from ranks import rejoin
from rollouts import loss_config, mixed_sequences

CPU = torch.device("cpu")
GROUP = 3  # samples that begin alike
SAMPLES = 9  # odd, so that ranks get unequal numbers
SIZES = {
    "vocab_size": 323,  # divides over no two processes
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "dtype": "float32",
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": False},
    "qwen3_moe": {"head_dim": 16, **EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]},
}


def layout(
    tensor: int = 1,
    pipeline: int = 1,
    experts: int = 1,
    *,
    context: int = 1,
    chunks: int | None = None,
    sequence: bool = False,
    **recompute: Any,
) -> MegatronConfig:
    return MegatronConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
        expert_model_parallel_size=experts,
        context_parallel_size=context,
        sequence_parallel=sequence,
        dtype="fp32",
        **recompute,
    )


def make_model(folder: Path, family: str, head: str = "CausalLM", **more: Any) -> Path:
    """Save a tiny random model whose weights are all different from zero and one."""
    import transformers
    from transformers import AutoConfig

    labels = {} if head == "CausalLM" else {"num_labels": 1}
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **labels, **more})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=float(bool(parameter.min() > 0)), std=0.2)
    path = folder / f"{family}-{head}"
    model.save_pretrained(path)
    return path


def model_spec(
    path: Path, parallel: MegatronConfig | FSDPConfig, role: Role = "actor", **model: Any
) -> ModelSpec:
    trained = role in ("actor", "critic")
    return ModelSpec(
        role=role,
        model=ModelConfig(path=str(path), **{"enable_gradient_checkpointing": False, **model}),
        parallel=parallel,
        device=CPU,
        default_dtype="fp32",
        optim=OptimConfig(lr=1e-3, weight_decay=0.1) if trained else None,
        grad_clip=1.0,
    )


def in_layout(spec: ModelSpec) -> Any:
    """Build a Megatron backend on these processes, whatever layout they had before."""
    from megatron.core import parallel_state

    from iiverl_megatron.backend import MegatronBackend

    parallel_state.destroy_model_parallel()
    if dist.get_world_size() > 1:
        gc.collect()
        rejoin()
    return MegatronBackend(spec)


def data(*, alike: bool = False) -> tuple[list[TokenSequence], dict[str, list[np.ndarray]]]:
    """Sequences of which half have trained tokens anywhere, with arrays that make every part of the losses count.

    With `alike`, those of a group have the beginning in common.
    """
    rng = np.random.default_rng(0)
    tokens = mixed_sequences(rng, SAMPLES, 0, 320)
    for i in range(SAMPLES if alike else 0):
        first, own = tokens[i - i % GROUP].token_ids, tokens[i].token_ids
        common = min(len(first), len(own)) * 2 // 3
        own[:common] = first[:common]
    middles = {"advantages": 0.0, "old_log_probs": -5.8, "ref_log_probs": -5.8, "values": 0.0, "returns": 0.0}
    arrays = {
        name: [rng.normal(middle, 0.5, t.trained).astype(np.float32) for t in tokens]
        for name, middle in middles.items()
    }
    return tokens, arrays


def batches(
    rank: int, size: int, sequences: int = 2, *, alike: bool = False, grouped: bool = False
) -> list[MicroBatch]:
    """The micro-batches of data-parallel rank `rank` of `size`; `grouped`, they share what a group has in common."""
    tokens, arrays = data(alike=alike)
    sizes = [SequenceSize(len(t.token_ids)) for t in tokens]
    weights = token_weights("token-mean", [t.trained for t in tokens], max_tokens_norm=20)
    mine = micro_batches(sizes, balance(sizes, size), Packing(sequences=sequences))[rank]
    share = 1 / sum(t.trained for t in tokens)
    return [
        make_micro_batch(
            [tokens[i] for i in batch],
            {name: [array[i] for i in batch] for name, array in arrays.items()},
            [weights[i] for i in batch],
            inv_num_tokens=share,
            temperature=0.8,
            groups=[i // GROUP for i in batch] if grouped else (),
            device=CPU,
        )
        if batch
        else dummy_micro_batch(tuple(arrays), CPU)
        for batch in mine
    ]


def loss_of(role: Role) -> Loss:
    if role == "critic":
        return critic_loss(loss_config(cliprange_value=0.5))
    loss = loss_config(
        clip_ratio_low=0.2, clip_ratio_high=0.28, use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.05
    )
    return actor_loss(loss, find_policy_loss("vanilla"), RolloutCorrection())


def by_sample(outputs: list[Any], batches: list[MicroBatch]) -> dict[tuple[int, ...], list[torch.Tensor]]:
    """What a model says of each sequence, by its tokens, so that it does not matter who had it."""
    found = {}
    for output, batch in zip(outputs, batches, strict=True):
        if not batch.inv_num_tokens:
            continue
        keys = [tuple(sequence.token_ids.tolist()) for sequence in batch.sequences]
        for name in ("log_probs_T", "entropy_T", "values_T"):
            x_T = getattr(output, name)
            if x_T is not None:
                for key, part in zip(keys, batch.segments.split(x_T), strict=True):
                    found.setdefault(key, []).append(part)
        if output.scores_B is not None:
            for key, score in zip(keys, output.scores_B, strict=True):
                found.setdefault(key, []).append(score)
    return found


def gradients(backend: Any) -> dict[str, torch.Tensor]:
    """The whole gradient by checkpoint name; it is gone afterwards."""
    return {name: tensor.clone() for name, tensor in backend.named_gradients()}
