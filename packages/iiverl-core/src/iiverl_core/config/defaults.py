"""Defaults that depend on the backend, and defaults that are derived from other values.

A default never contradicts a value that the user set: a smaller batch, a longer response or fewer devices can be set
alone. Values that the user set are never changed; if they contradict each other, that is an error.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from math import ceil, gcd
from typing import Any

from iiverl_core.config.interpolation import reference
from iiverl_core.config.model_facts import read_model_facts, splits
from iiverl_core.config.roles import Role
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.algorithm import CORRECTION
from iiverl_core.config.sections.model import MegatronConfig
from iiverl_core.config.sections.root import Config
from iiverl_core.config.sections.section import BACKEND, follows
from iiverl_core.registry import BACKENDS, ENGINES, POLICY_LOSSES, BackendInfo

SPLIT_DEFAULTS: dict[str, Any] = {
    "actor_rollout_ref.actor.shuffle": True,
    **{
        f"{role}.megatron.{name}": follows(f"actor_rollout_ref.actor.megatron.{name}")
        for role in ("actor_rollout_ref.ref", "critic", "reward_model")
        for name in MegatronConfig.model_fields
    },
}
"""Defaults of backends that split models, where they differ from those of other backends.

Mini-batches are shuffled because II-VERL's Megatron trainer does so, and their order is part of the result. All models
have the actor's layout. The other differences between II-VERL's Megatron and FSDP files (validation, resuming, gradient
checkpointing, the engine) are left out: none of its files depends on them.
"""

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
BATCH, MINI_BATCH = "data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size"
STRATEGIES = (BACKEND, "actor_rollout_ref.ref.strategy", "critic.strategy", "reward_model.strategy")
DEVICE_MEMORY = 80e9  # bytes, as `iiverl plan` assumes
WEIGHTS_SHARE = 0.75  # of an engine's memory; the rest is for its cache and its work
LENGTHS = "data.max_prompt_length + data.max_response_length"


def backend_defaults(backend: BackendInfo) -> dict[str, Any]:
    """Return the defaults, by key, that this backend changes."""
    written = {key: keys()[key].default for key in STRATEGIES}
    strategies = {
        key: backend.name
        for key, name in written.items()
        if reference(name) is None and BACKENDS.get(name) is not backend
    }
    return strategies | (SPLIT_DEFAULTS if backend.splits_models else {})


@dataclass(frozen=True)
class DerivedDefault:
    """A default that is derived from other values.

    `derive` is a function of the configuration and the default as written; `source` names the values that it reads. With
    `when`, it applies only if the user set that key.
    """

    key: str
    source: str
    derive: Callable[[Config, Any], Any]
    when: str | None = None


def _mini_batch(config: Config, default: int) -> int:
    """Return the divisor of the batch whose ratio to the default is nearest to 1."""
    batch = config.data.train_batch_size
    below = next(n for n in range(min(default, batch), 0, -1) if batch % n == 0)
    nearer = range(default + 1, default**2 // below + 1)
    return below if below == default else next((n for n in nearer if batch % n == 0), below)


def _holds_a_sequence(role: Role) -> Callable[[Config, int], int]:
    def derive(config: Config, default: int) -> int:
        longest = config.data.max_prompt_length + config.data.max_response_length
        return max(default, ceil(longest / config.sequence_split(role)))

    return derive


def _tensor_parallel(config: Config, default: int) -> int:
    sizes = config.actor_rollout_ref.actor.megatron
    others = sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    return _divided(config, default, config.devices // others) if config.devices % others == 0 else default


def _engine_devices(config: Config, default: int) -> int:
    """Return the fewest devices on which an engine has room for its weights, and for a cache beside them."""
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    facts = read_model_facts(model.path, model.override_config)
    if facts is None:
        return default
    devices = config.trainer.rollout_devices or config.trainer.n_gpus_per_node
    sizes = [n for n in range(1, devices + 1) if devices % n == 0 and splits(n, **facts.split_shape)]
    weights = facts.parameters * (4 if rollout.dtype in ("fp32", "float32") else 2)
    room = WEIGHTS_SHARE * rollout.gpu_memory_utilization * DEVICE_MEMORY
    return next((n for n in sizes if weights / n <= room), sizes[-1])


def _divided(config: Config, default: int, devices: int) -> int:
    """Return the largest size up to the default that divides the devices and over which the actor can be split."""
    model = config.actor_rollout_ref.model
    facts = read_model_facts(model.path, model.override_config)
    most = gcd(default, devices)
    if facts is None:
        return most
    return next((n for n in range(most, 0, -1) if most % n == 0 and splits(n, **facts.split_shape)), most)


def _engine_tokens(config: Config, default: int) -> int:
    rollout = config.actor_rollout_ref.rollout
    whole = rollout.max_model_len or rollout.prompt_length + rollout.response_length
    return max(default, rollout.max_num_seqs, 0 if rollout.enable_chunked_prefill else whole)


def _engine_sequences(config: Config, default: int) -> int:
    rollout = config.actor_rollout_ref.rollout
    reads = "max_num_batched_tokens" in ENGINES[rollout.name].reads
    return min(default, rollout.max_num_batched_tokens) if reads else default


def _within_stall(config: Config, default: float) -> float:
    stall = config.trainer.stall_timeout
    return min(default, stall / 2) if stall else default


def _ratio_to_the_sampling_policy(config: Config, default: bool) -> bool:
    weighted = config.algorithm.rollout_correction.rollout_is is not None
    return default or (_samples_stale(config) and _uses_ratio(config) and not weighted)


def _weights_of_stale_tokens(config: Config, default: str | None) -> str | None:
    return "token" if _samples_stale(config) and not _uses_ratio(config) else default


def _samples_stale(config: Config) -> bool:
    return config.trainer.max_staleness > 0 and config.actor_rollout_ref.rollout.do_sample


def _uses_ratio(config: Config) -> bool:
    loss = POLICY_LOSSES.get(config.actor_rollout_ref.actor.policy_loss.loss_mode)
    return loss is None or loss.uses_ratio


DERIVED = (
    DerivedDefault(
        f"{CORRECTION}.bypass_old_log_prob", "trainer.max_staleness", _ratio_to_the_sampling_policy
    ),
    DerivedDefault(f"{CORRECTION}.rollout_is", "trainer.max_staleness", _weights_of_stale_tokens),
    DerivedDefault("custom_reward_function.timeout", "trainer.stall_timeout", _within_stall),
    DerivedDefault(f"{ROLLOUT}.multi_turn.environment.turn_timeout", "trainer.stall_timeout", _within_stall),
    DerivedDefault(f"{ROLLOUT}.multi_turn.agent.timeout", "trainer.stall_timeout", _within_stall),
    DerivedDefault(f"{ROLLOUT}.multi_turn.tools.timeout", "trainer.stall_timeout", _within_stall),
    DerivedDefault("data.val_files", "data.train_files", lambda *_: None, when="data.train_files"),
    DerivedDefault(MINI_BATCH, BATCH, _mini_batch),
    DerivedDefault(f"{ACTOR}.ppo_max_token_len_per_gpu", LENGTHS, _holds_a_sequence("actor")),
    DerivedDefault("critic.ppo_max_token_len_per_gpu", LENGTHS, _holds_a_sequence("critic")),
    DerivedDefault(
        f"{ACTOR}.megatron.tensor_model_parallel_size", "the devices and the model", _tensor_parallel
    ),
    DerivedDefault(f"{ROLLOUT}.tensor_model_parallel_size", "the devices and the model", _engine_devices),
    DerivedDefault(
        f"{ROLLOUT}.max_num_batched_tokens", "the sequence length and max_num_seqs", _engine_tokens
    ),
    DerivedDefault(f"{ROLLOUT}.max_num_seqs", f"{ROLLOUT}.max_num_batched_tokens", _engine_sequences),
)


def derived_defaults(config: Config, set_keys: Container[str]) -> dict[str, tuple[Any, str]]:
    """Return the derived defaults that differ from the written ones: by key, the value and what it is derived from.

    Args:
        config: the configuration with the defaults as written.
        set_keys: the keys that the user set.
    """
    derived = {}
    for default in DERIVED:
        applies = default.key not in set_keys and (default.when is None or default.when in set_keys)
        written = keys()[default.key].default
        if applies and (value := default.derive(config, written)) != written:
            derived[default.key] = value, default.source
    return derived
