"""Which models a run has, and what a backend needs to build each."""

import importlib
from dataclasses import replace

import torch

from iiverl_core.config import (
    ActorConfig,
    Config,
    CriticConfig,
    FSDPConfig,
    ModelConfig,
    RefConfig,
    RewardModelConfig,
)
from iiverl_core.registry import BACKENDS
from iiverl_core.training import ModelSpec, Offload, Role, TrainingBackend


def build_models(config: Config, device: torch.device) -> dict[Role, TrainingBackend]:
    """Build this process's share of every model that the run needs, always in the same order.

    Raises:
        ConfigError: the backend is not installed, or a model cannot be read.
    """
    backend: type[TrainingBackend] = BACKENDS[config.backend].load()
    models: dict[Role, TrainingBackend] = {}
    for spec in model_specs(config, device):
        if spec.model.external_lib:
            importlib.import_module(spec.model.external_lib)
        models[spec.role] = backend(spec)
    return models


def model_specs(config: Config, device: torch.device) -> list[ModelSpec]:
    """Say what the run's models are: the actor, and those of reference, critic and reward model that something reads."""
    megatron = config.splits_models
    policy, critic, reward = config.actor_rollout_ref, config.critic, config.reward_model

    def fixed(
        role: Role,
        model: ModelConfig,
        section: ActorConfig | CriticConfig | RefConfig | RewardModelConfig,
        fsdp: FSDPConfig,
    ) -> ModelSpec:
        return ModelSpec(
            role=role,
            model=model,
            parallel=section.megatron if megatron else fsdp,
            device=device,
            default_dtype="bf16",
            offload=Offload(section.param_offload) if megatron else _fsdp_offload(fsdp),
        )

    def trained(
        role: Role, model: ModelConfig, section: ActorConfig | CriticConfig, fsdp: FSDPConfig
    ) -> ModelSpec:
        spec = fixed(role, model, section, fsdp)
        offload = Offload(section.param_offload, section.grad_offload, section.optimizer_offload)
        return replace(
            spec,
            default_dtype="fp32",
            optim=section.optim,
            grad_clip=section.optim.clip_grad if megatron else section.grad_clip,
            offload=offload if megatron else spec.offload,
        )

    specs = [trained("actor", policy.model, policy.actor, policy.actor.fsdp_config)]
    if config.needs_reference:
        specs.append(fixed("reference", policy.model, policy.ref, policy.ref.fsdp_config))
    if config.uses_critic:
        specs.append(trained("critic", critic.model, critic, critic.model.fsdp_config))
    if reward.enable:
        specs.append(fixed("reward", reward.model, reward, reward.model.fsdp_config))
    return specs


def _fsdp_offload(fsdp: FSDPConfig) -> Offload:
    return Offload(parameters=fsdp.param_offload, optimizer=fsdp.optimizer_offload)
