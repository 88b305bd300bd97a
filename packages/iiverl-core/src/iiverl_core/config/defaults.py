"""Defaults that depend on the backend, and defaults that fit what the user set.

A default never contradicts a value: whoever sets a smaller batch, a longer response or fewer devices sets nothing else
for it. A value that the user set is never changed; what it contradicts is an error.
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from math import gcd
from typing import Any

from iiverl_core.config.model_facts import read_model_facts
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.parallel import MegatronConfig
from iiverl_core.config.sections.root import Config
from iiverl_core.config.sections.section import BACKEND, follows
from iiverl_core.config.splitting import splits
from iiverl_core.registry import ENGINES, BackendInfo

SPLIT_DEFAULTS: dict[str, Any] = {
    "actor_rollout_ref.actor.shuffle": True,
    **{
        f"{role}.megatron.{name}": follows(f"actor_rollout_ref.actor.megatron.{name}")
        for role in ("actor_rollout_ref.ref", "critic", "reward_model")
        for name in MegatronConfig.model_fields
    },
}
"""Defaults under Megatron, and other backends that split models, that differ from FSDP's.

The order of mini-batches is part of a training, so files of II-VERL, whose Megatron trainer draws it, need it here too.
All models have the actor's layout. Whatever else II-VERL's Megatron file sets otherwise than its FSDP file (validation,
resuming, gradient checkpointing, the engine) is the same under both backends here: none of its files needs it.
"""

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
BATCH, MINI_BATCH = "data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size"
STRATEGIES = (BACKEND, "critic.strategy", "reward_model.strategy")
LENGTHS = "data.max_prompt_length + data.max_response_length"


def backend_defaults(backend: BackendInfo) -> dict[str, Any]:
    """Give the defaults by key that are other ones under this backend."""
    if backend.name == "fsdp":
        return {}
    return {**dict.fromkeys(STRATEGIES, backend.name), **(SPLIT_DEFAULTS if backend.splits_models else {})}


@dataclass(frozen=True)
class FittedDefault:
    """A default that gives way to other values.

    `fit` takes the configuration and the default as it is written and returns the default that fits; `to` says what it
    fits. With `when`, it does so only if the user set that key.
    """

    key: str
    to: str
    fit: Callable[[Config, Any], Any]
    when: str | None = None


def _mini_batch(config: Config, default: int) -> int:
    """The divisor of the batch whose ratio to the default is nearest to 1."""
    batch = config.data.train_batch_size
    below = next(n for n in range(min(default, batch), 0, -1) if batch % n == 0)
    nearer = range(default + 1, default**2 // below + 1)
    return below if below == default else next((n for n in nearer if batch % n == 0), below)


def _holds_a_sequence(config: Config, default: int) -> int:
    return max(default, config.data.max_prompt_length + config.data.max_response_length)


def _tensor_parallel(config: Config, default: int) -> int:
    sizes = config.actor_rollout_ref.actor.megatron
    others = sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    return _divided(config, default, config.devices // others) if config.devices % others == 0 else default


def _engine_devices(config: Config, default: int) -> int:
    return _divided(config, default, config.trainer.rollout_devices or config.trainer.n_gpus_per_node)


def _divided(config: Config, default: int, devices: int) -> int:
    """The most devices, up to the default, that divide these and over which the actor, if it is known, can be split."""
    model = config.actor_rollout_ref.model
    facts = read_model_facts(model.path, model.override_config)
    most = gcd(default, devices)
    if facts is None:
        return most
    inner = facts.intermediate_size if len(facts.expert_layers) < facts.layers else 0
    shape = {"heads": facts.heads, "kv_heads": facts.kv_heads, "inner": inner}
    return next((n for n in range(most, 0, -1) if most % n == 0 and splits(n, **shape)), most)


def _engine_tokens(config: Config, default: int) -> int:
    rollout = config.actor_rollout_ref.rollout
    whole = rollout.max_model_len or rollout.prompt_length + rollout.response_length
    return max(default, rollout.max_num_seqs, 0 if rollout.enable_chunked_prefill else whole)


def _engine_sequences(config: Config, default: int) -> int:
    rollout = config.actor_rollout_ref.rollout
    reads = "max_num_batched_tokens" in ENGINES[rollout.name].reads
    return min(default, rollout.max_num_batched_tokens) if reads else default


FITTED = (
    FittedDefault("data.val_files", "data.train_files", lambda *_: None, when="data.train_files"),
    FittedDefault(MINI_BATCH, BATCH, _mini_batch),
    FittedDefault(f"{ACTOR}.ppo_max_token_len_per_gpu", LENGTHS, _holds_a_sequence),
    FittedDefault("critic.ppo_max_token_len_per_gpu", LENGTHS, _holds_a_sequence),
    FittedDefault(
        f"{ACTOR}.megatron.tensor_model_parallel_size", "the devices and the model", _tensor_parallel
    ),
    FittedDefault(f"{ROLLOUT}.tensor_model_parallel_size", "the devices and the model", _engine_devices),
    FittedDefault(f"{ROLLOUT}.max_num_batched_tokens", "a sequence, and max_num_seqs", _engine_tokens),
    FittedDefault(f"{ROLLOUT}.max_num_seqs", f"{ROLLOUT}.max_num_batched_tokens", _engine_sequences),
)


def fitted_defaults(config: Config, given: Container[str]) -> dict[str, tuple[Any, str]]:
    """Find the defaults that give way in a configuration: by key, the value that fits, and what it fits.

    Args:
        config: the configuration with the defaults as they are written.
        given: the keys that the user set.
    """
    fitted = {}
    for default in FITTED:
        applies = default.key not in given and (default.when is None or default.when in given)
        written = keys()[default.key].default
        if applies and (value := default.fit(config, written)) != written:
            fitted[default.key] = value, default.to
    return fitted
