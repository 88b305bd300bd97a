"""The engine, the rollouter and the sampling parameters of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from iiverl_core.config import ROLLOUT, RunConfig
from iiverl_core.config.model_facts import reads_images
from iiverl_core.data import load_image_processor
from iiverl_core.errors import ConfigError
from iiverl_core.registry import ENGINES, ROLLOUTERS
from iiverl_core.rollout.engine import RolloutEngine, SamplingParams
from iiverl_core.rollout.rollouter import Rollouter, SingleTurn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def make_engine(run: RunConfig, device: torch.device | str) -> RolloutEngine:
    """Build the engine `rollout.name` on `device`, without weights.

    Raises:
        ConfigError: the engine is not installed or cannot run the model.
    """
    import torch

    info, path = ENGINES[run.rollout.name], run.actor.model.path
    if not info.reads_images and reads_images(path):
        able = " or ".join(name for name, each in ENGINES.items() if each.reads_images)
        raise ConfigError(
            f"{ROLLOUT}.name: the model of {path} reads images, and the engine {info.name} does not; set it to {able}"
        )
    return info.load()(run, torch.device(device))


def vllm_engine(run: RunConfig, device: torch.device) -> RolloutEngine:
    """Build the engine `vllm`."""
    from iiverl_core.rollout.vllm import VLLMEngine, engine_arguments

    return VLLMEngine(
        engine_arguments(run, device.type),
        colocated=not run.trainer.rollout_devices,
        tokenizer_path=run.data.tokenizer,
        adapters=run.actor.model if run.syncs_adapters else None,
        bucket_bytes=run.rollout.update_weights_bucket_megabytes * 2**20,
        interruptible=run.interrupts_rollouts,
    )


def hf_engine(run: RunConfig, device: torch.device) -> RolloutEngine:
    """Build the engine `hf`."""
    from iiverl_core.dtypes import torch_dtype
    from iiverl_core.rollout.hf import HFEngine  # importing transformers' models takes seconds

    rollout, model = run.rollout, run.actor.model
    return HFEngine(
        model.path,
        dtype=torch_dtype(rollout.dtype),
        device=device,
        tokenizer_path=run.data.tokenizer,
        trust_remote_code=model.trust_remote_code,
        override_config=model.override_config,
        adapters=model if run.syncs_adapters else None,
        max_sequences=rollout.max_num_seqs,
        prompts_per_batch=rollout.micro_batch_size,
    )


def make_rollouter(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Rollouter:
    """Build the rollouter `rollout.agent.default_agent_loop`.

    Raises:
        ConfigError: its code cannot be imported, or it cannot do what the configuration asks for.
    """
    return ROLLOUTERS[run.rollout.agent.default_agent_loop].load()(run, tokenizer)


def single_turn(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> SingleTurn:
    """Build the rollouter `single_turn`."""
    return SingleTurn()


def tools(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Rollouter:
    """Build the rollouter `tools`."""
    from iiverl_core.rollout.tools import ToolRollouter

    return ToolRollouter(run, tokenizer, load_image_processor(run))


def environment(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Rollouter:
    """Build the rollouter `environment`."""
    from iiverl_core.rollout.environments import EnvironmentRollouter

    return EnvironmentRollouter(run, tokenizer, load_image_processor(run))


def agent(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Rollouter:
    """Build the rollouter `agent`."""
    from iiverl_core.rollout.agents import AgentRollouter  # needs FastAPI

    return AgentRollouter(run, tokenizer, load_image_processor(run))


Sampling: TypeAlias = Literal["train", "validate", "baseline"]
"""The purpose of responses: training, validation, or the greedy baseline of others."""


def sampling_params(run: RunConfig, sampling: Sampling) -> SamplingParams:
    """Return the sampling parameters: greedy if `do_sample` is false or for a `baseline`."""
    rollout = run.rollout
    section = rollout.val_kwargs if sampling == "validate" else rollout
    greedy = sampling == "baseline" or not section.do_sample
    return SamplingParams(
        temperature=0.0 if greedy else section.temperature,
        top_k=section.top_k,
        top_p=section.top_p,
        max_tokens=rollout.response_length,
        ignore_eos=rollout.ignore_eos,
    )
