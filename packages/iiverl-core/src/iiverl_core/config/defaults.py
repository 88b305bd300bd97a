"""Defaults that depend on the backend."""

from typing import Any

from iiverl_core.config.sections.parallel import MegatronConfig
from iiverl_core.config.sections.section import BACKEND, follows
from iiverl_core.registry import BackendInfo

SPLIT_DEFAULTS: dict[str, Any] = {
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "actor_rollout_ref.actor.shuffle": True,
    "actor_rollout_ref.rollout.load_format": "dummy_megatron",
    "actor_rollout_ref.rollout.enable_chunked_prefill": False,
    "critic.model.enable_gradient_checkpointing": False,
    "trainer.resume_mode": "disable",
    "trainer.test_freq": 2,
    **{
        f"{role}.megatron.{name}": follows(f"actor_rollout_ref.actor.megatron.{name}")
        for role in ("actor_rollout_ref.ref", "critic", "reward_model")
        for name in MegatronConfig.model_fields
    },
}
"""What II-VERL's Megatron file sets otherwise than its FSDP file, and one layout for all models: the actor's."""


def backend_defaults(backend: BackendInfo) -> dict[str, Any]:
    """Give the defaults by key that are other ones under this backend."""
    if backend.name == "fsdp":
        return {}
    strategies = dict.fromkeys((BACKEND, "critic.strategy", "reward_model.strategy"), backend.name)
    return {**strategies, **(SPLIT_DEFAULTS if backend.splits_models else {})}
