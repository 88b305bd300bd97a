"""Defaults that depend on the backend."""

from typing import Any

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
}
"""What II-VERL's Megatron file sets otherwise than its FSDP file."""
