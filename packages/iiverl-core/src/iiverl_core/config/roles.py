"""The roles of models in a run, and the keys of their settings in verl's YAML."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from iiverl_core.config.sections.rollout import ROLLOUT
from iiverl_core.config.sections.section import ADV_ESTIMATOR

Role: TypeAlias = Literal["actor", "reference", "critic", "reward"]


@dataclass(frozen=True)
class MicroBatchKeys:
    """Keys that bound a micro-batch.

    `sequences` counts sequences over all devices; `dynamic` selects the budget `tokens` instead.
    """

    sequences: str
    dynamic: str
    tokens: str

    @property
    def per_device(self) -> str:
        """The key that counts sequences per device."""
        return f"{self.sequences}_per_gpu"


@dataclass(frozen=True)
class RoleKeys:
    """Keys of the settings of one role.

    `section` has the settings of the role, `model` the model to build, `fsdp` its layout under FSDP. `forward` bounds the
    micro-batches of passes without gradients, and `training`, for a trained role, those of passes with gradients.
    `decides` are the keys that decide whether a run has the role.
    """

    section: str
    model: str
    fsdp: str
    forward: MicroBatchKeys
    training: MicroBatchKeys | None = None
    decides: tuple[str, ...] = ()

    @property
    def megatron(self) -> str:
        """The section of the layout under Megatron."""
        return f"{self.section}.megatron"

    @property
    def sequence_split(self) -> str:
        """The key of the number of devices over which each sequence is split under FSDP."""
        return f"{self.section}.ulysses_sequence_parallel_size"


def _micro_batches(section: str, prefix: str, dynamic: str = "use_dynamic_bsz") -> MicroBatchKeys:
    stem = f"{section}.{prefix}"
    return MicroBatchKeys(f"{stem}micro_batch_size", f"{section}.{dynamic}", f"{stem}max_token_len_per_gpu")


POLICY, ACTOR, REFERENCE = "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.ref"
ROLE_KEYS: Mapping[Role, RoleKeys] = MappingProxyType(
    {
        "actor": RoleKeys(
            section=ACTOR,
            model=POLICY,
            fsdp=f"{ACTOR}.fsdp_config",
            forward=_micro_batches(ROLLOUT, "log_prob_", "log_prob_use_dynamic_bsz"),
            training=_micro_batches(ACTOR, "ppo_"),
        ),
        "reference": RoleKeys(
            section=REFERENCE,
            model=POLICY,
            fsdp=f"{REFERENCE}.fsdp_config",
            forward=_micro_batches(REFERENCE, "log_prob_", "log_prob_use_dynamic_bsz"),
        ),
        "critic": RoleKeys(
            section="critic",
            model="critic.model",
            fsdp="critic.model.fsdp_config",
            forward=_micro_batches("critic", "forward_"),
            training=_micro_batches("critic", "ppo_"),
            decides=(ADV_ESTIMATOR, "critic.enable"),
        ),
        "reward": RoleKeys(
            section="reward_model",
            model="reward_model.model",
            fsdp="reward_model.model.fsdp_config",
            forward=MicroBatchKeys(
                "reward_model.micro_batch_size",
                "reward_model.use_dynamic_bsz",
                "reward_model.forward_max_token_len_per_gpu",
            ),
            decides=("reward_model.enable",),
        ),
    }
)
