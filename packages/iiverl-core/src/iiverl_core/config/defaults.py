"""Defaults that depend on the backend."""

from typing import Any

from iiverl_core.config.sections.parallel import MegatronConfig
from iiverl_core.config.sections.section import follows

MEGATRON_DEFAULTS: dict[str, Any] = {
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "actor_rollout_ref.actor.strategy": "megatron",
    "actor_rollout_ref.actor.shuffle": True,
    "actor_rollout_ref.rollout.load_format": "dummy_megatron",
    "actor_rollout_ref.rollout.enable_chunked_prefill": False,
    "critic.strategy": "megatron",
    "critic.model.enable_gradient_checkpointing": False,
    "reward_model.strategy": "megatron",
    "trainer.resume_mode": "disable",
    "trainer.test_freq": 2,
    **{
        f"{role}.megatron.{name}": follows(f"actor_rollout_ref.actor.megatron.{name}")
        for role in ("actor_rollout_ref.ref", "critic", "reward_model")
        for name in MegatronConfig.model_fields
    },
}
"""What II-VERL's Megatron file sets otherwise than its FSDP file, and one layout for all models: the actor's."""
