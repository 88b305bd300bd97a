"""How a model lies on the devices: one section for FSDP, one for Megatron."""

from typing import Annotated

from pydantic import Field

from iiverl_core.config.sections.section import Count, Dtype, Int, Natural, NoEffect, NotYet, Section

RANDOM_WEIGHTS = NotYet("starting from random weights", (True,))


class WrapPolicyConfig(Section):
    """Which modules FSDP wraps."""

    min_num_params: Annotated[Natural, NoEffect("FSDP2 wraps each layer of the model")] = 0
    """Wrap modules of at least so many parameters; 0 wraps each transformer layer."""


class MixedPrecisionConfig(Section):
    """The dtypes in which FSDP computes and reduces."""

    param_dtype: Dtype = "bf16"
    """Dtype of the weights in forward and backward."""
    reduce_dtype: Dtype = "fp32"
    """Dtype in which gradients are summed over devices."""
    buffer_dtype: Dtype = "fp32"
    """Dtype of the model's buffers."""


class FSDPConfig(Section):
    """How FSDP spreads a model over the devices."""

    wrap_policy: WrapPolicyConfig = WrapPolicyConfig()
    param_offload: bool = False
    """Keep weights and gradients in CPU memory while they are not used."""
    optimizer_offload: bool = False
    """Keep the optimizer's state in CPU memory while it is not used."""
    fsdp_size: Annotated[Int, Field(ge=-1)] = -1
    """Devices over which one copy of the model is spread; -1 for all."""
    model_dtype: Dtype | None = None
    """Dtype of the master weights; null means fp32 for what is trained and bf16 for the reference."""
    mixed_precision: MixedPrecisionConfig = MixedPrecisionConfig()


class MegatronConfig(Section):
    """How Megatron spreads a model over the devices.

    Under Megatron, what is not set for another model than the actor is as it is for the actor.
    """

    tensor_model_parallel_size: Count = 4
    """Devices over which each layer's matrices are split; by default up to 4, as far as devices and model divide."""
    pipeline_model_parallel_size: Count = 1
    """Stages into which the layers are split."""
    virtual_pipeline_model_parallel_size: Count | None = None
    """Model chunks that a stage interleaves; null for one."""
    context_parallel_size: Count = 1
    """Devices over which each sequence is split; above 1, sequences are padded to one length."""
    expert_model_parallel_size: Count = 1
    """Devices over which the experts of a mixture-of-experts model are spread."""
    sequence_parallel: bool = True
    """Split activations between tensor-parallel layers along the sequence; no effect where the tensor size is 1."""
    dtype: Dtype = "bf16"
    """Dtype of the weights in forward and backward; the optimizer steps fp32 copies of them."""
    seed: Int = 1
    """Seed of Megatron's random states."""
