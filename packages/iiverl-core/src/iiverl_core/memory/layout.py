"""The parallel layout of a model, as far as memory depends on it."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from iiverl_core.config import FSDPConfig, MegatronConfig, Offload, RoleConfig

Stage: TypeAlias = Literal["first", "last"]
"""End of the pipeline that a device belongs to: the first has the embedding and most activations, the last the head."""

BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
"""Bytes per number, by the configuration's names of dtypes."""


@dataclass(frozen=True)
class Layout:
    """One model on `devices` devices: Megatron's parallel sizes or, with `sharded`, one copy sharded by FSDP, which splits
    sequences over `context` devices.

    `weight_bytes` is the size of a weight in forward and backward, `master_bytes` the size of one that the optimizer
    updates, and `offloaded` the kinds of state in CPU memory while the model is idle; FSDP offloads all three together,
    and keeps them there while the model is in use too. With `stays_gathered`, FSDP keeps the gathered weights of all
    layers until their backward pass. `whole_gradient_bytes` is the size of a number of the whole gradients that FSDP keeps
    until a mini-batch's last micro-batch, or 0 if it reduces them after each.
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
    stays_gathered: bool = False
    whole_gradient_bytes: int = 0

    @property
    def data(self) -> int:
        """Number of data-parallel ranks, which get different samples."""
        return self.devices // (self.tensor * self.pipeline * self.context)

    @property
    def sequence_split(self) -> int:
        """Devices over which activations between tensor-parallel layers are split."""
        return self.tensor if self.sequence_parallel else 1


def layout_of(role: RoleConfig, devices: int) -> Layout:
    """Read the layout of a model on the training devices."""
    if isinstance(role.parallel, MegatronConfig):
        return _megatron(devices, role.parallel, role.offload)
    return _fsdp(devices, role.parallel, role.offload, role.default_dtype, role.sequence_split)


def _megatron(devices: int, sizes: MegatronConfig, offload: Offload) -> Layout:
    kinds = {"weights": offload.parameters, "gradients": offload.gradients, "optimizer": offload.optimizer}
    return Layout(
        devices=devices,
        tensor=sizes.tensor_model_parallel_size,
        pipeline=sizes.pipeline_model_parallel_size,
        chunks=sizes.virtual_pipeline_model_parallel_size or 1,
        context=sizes.context_parallel_size,
        expert=sizes.expert_model_parallel_size,
        sequence_parallel=sizes.sequence_parallel,
        weight_bytes=BYTES[sizes.dtype],
        offloaded=frozenset(kind for kind, away in kinds.items() if away),
    )


def _fsdp(devices: int, fsdp: FSDPConfig, offload: Offload, master: str, split: int) -> Layout:
    away = offload.parameters or offload.optimizer
    whole = fsdp.gradient_sync == "mini_batch" and devices > 1
    return Layout(
        devices=devices,
        context=split,
        sharded=True,
        weight_bytes=BYTES[fsdp.mixed_precision.param_dtype],
        master_bytes=BYTES[fsdp.model_dtype or master],
        offloaded=frozenset({"weights", "gradients", "optimizer"} if away else ()),
        stays_gathered=not fsdp.reshard_after_forward,
        whole_gradient_bytes=BYTES[fsdp.mixed_precision.reduce_dtype] if whole else 0,
    )
