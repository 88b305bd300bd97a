"""How a model lies on the devices, in numbers that memory is counted from."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from iiverl_core.config import Config, FSDPConfig, MegatronConfig
from iiverl_core.config.roles import Role

Stage: TypeAlias = Literal["first", "last"]
"""End of the pipeline that a device belongs to: the first has the embedding and most activations, the last the head."""

BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
"""Bytes of a number, by the configuration's names of dtypes."""


@dataclass(frozen=True)
class Layout:
    """One model over `devices`: Megatron's sizes, or with `sharded` FSDP's one copy over all of them.

    `weight_bytes` is the size of a weight in forward and backward, `master_bytes` of one that the optimizer steps, and
    `offloaded` names what is in CPU memory while the model is not used; FSDP offloads all three together, and keeps them
    there in use as well.
    """

    devices: int
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    sharded: bool = False
    weight_bytes: int = 2
    master_bytes: int = 4
    offloaded: frozenset[str] = frozenset()

    @property
    def data(self) -> int:
        """Data-parallel ranks: those that get samples of their own."""
        return self.devices // (self.tensor * self.pipeline * self.context)

    @property
    def sequence_split(self) -> int:
        """Devices over which activations between tensor-parallel layers are split."""
        return self.tensor if self.sequence_parallel else 1


def layout_of(config: Config, role: Role) -> Layout:
    """Read how the model of a role lies on the devices."""
    policy, critic, reward = config.actor_rollout_ref, config.critic, config.reward_model
    if config.splits_models:
        section = {"actor": policy.actor, "reference": policy.ref, "critic": critic, "reward": reward}[role]
        kinds = {"weights": "param_offload", "gradients": "grad_offload", "optimizer": "optimizer_offload"}
        return _megatron(
            config.devices, section.megatron, {k for k, key in kinds.items() if getattr(section, key, False)}
        )
    fsdp = {
        "actor": policy.actor.fsdp_config,
        "reference": policy.ref.fsdp_config,
        "critic": critic.model.fsdp_config,
        "reward": reward.model.fsdp_config,
    }[role]
    return _fsdp(config.devices, fsdp, "fp32" if role in ("actor", "critic") else "bf16")


def _megatron(devices: int, sizes: MegatronConfig, offloaded: set[str]) -> Layout:
    return Layout(
        devices=devices,
        tensor=sizes.tensor_model_parallel_size,
        pipeline=sizes.pipeline_model_parallel_size,
        chunks=sizes.virtual_pipeline_model_parallel_size or 1,
        context=sizes.context_parallel_size,
        expert=sizes.expert_model_parallel_size,
        sequence_parallel=sizes.sequence_parallel,
        weight_bytes=BYTES[sizes.dtype],
        offloaded=frozenset(offloaded),
    )


def _fsdp(devices: int, fsdp: FSDPConfig, master: str) -> Layout:
    offload = fsdp.param_offload or fsdp.optimizer_offload
    return Layout(
        devices=devices,
        sharded=True,
        weight_bytes=BYTES[fsdp.mixed_precision.param_dtype],
        master_bytes=BYTES[fsdp.model_dtype or master],
        offloaded=frozenset({"weights", "gradients", "optimizer"} if offload else ()),
    )
