"""The engine and the sampling that a configuration asks for."""

from typing import Literal, TypeAlias

import torch

from iiverl_core.config import Config
from iiverl_core.dtypes import torch_dtype
from iiverl_core.registry import ENGINES
from iiverl_core.rollout.engine import RolloutEngine, SamplingParams


def make_engine(config: Config, device: torch.device | str) -> RolloutEngine:
    """Build the engine that `actor_rollout_ref.rollout.name` names, on `device`, still without weights.

    Raises:
        ConfigError: the engine is not installed, or it cannot run the model.
    """
    return ENGINES[config.actor_rollout_ref.rollout.name].load()(config, torch.device(device))


def vllm_engine(config: Config, device: torch.device) -> RolloutEngine:
    """Build the engine `vllm`."""
    from iiverl_core.rollout.vllm import VLLMEngine, engine_arguments

    rollout = config.actor_rollout_ref.rollout
    return VLLMEngine(
        engine_arguments(config, device.type),
        colocated=not config.trainer.rollout_devices,
        tokenizer_path=config.data.tokenizer,
        verify_weights=rollout.verify_weights,
        bucket_bytes=rollout.update_weights_bucket_megabytes * 2**20,
    )


def hf_engine(config: Config, device: torch.device) -> RolloutEngine:
    """Build the engine `hf`."""
    from iiverl_core.rollout.hf import HFEngine  # importing transformers' models takes seconds

    rollout, model = config.actor_rollout_ref.rollout, config.actor_rollout_ref.model
    return HFEngine(
        model.path,
        dtype=torch_dtype(rollout.dtype),
        device=device,
        tokenizer_path=config.data.tokenizer,
        trust_remote_code=model.trust_remote_code,
        override_config=model.override_config,
        max_sequences=rollout.max_num_seqs,
        prompts_per_batch=rollout.micro_batch_size,
    )


Sampling: TypeAlias = Literal["train", "validate", "baseline"]
"""What responses are for: to learn from, to validate with, or to be the greedy baseline of the others."""


def sampling_params(config: Config, sampling: Sampling) -> SamplingParams:
    """How responses are sampled; greedy where `do_sample` is false, and one greedy response as a `baseline`."""
    rollout = config.actor_rollout_ref.rollout
    section = rollout.val_kwargs if sampling == "validate" else rollout
    greedy = sampling == "baseline" or not section.do_sample
    return SamplingParams(
        n=1 if sampling == "baseline" else section.n,
        temperature=0.0 if greedy else section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        max_tokens=rollout.response_length,
        ignore_eos=rollout.ignore_eos,
    )
