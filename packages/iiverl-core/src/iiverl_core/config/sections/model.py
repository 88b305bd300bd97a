"""The parts of every model's section: the model itself, its optimizer, and its layout on the devices."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from iiverl_core.config.sections.section import (
    Count,
    Dtype,
    Float,
    Fraction,
    Int,
    Names,
    Natural,
    NoEffect,
    Nonnegative,
    NotYet,
    PathStr,
    Positive,
    Section,
)


def is_named(layer: str, patterns: Iterable[str]) -> bool:
    """Return whether a pattern is a layer's name, the end of it, or a regular expression of all of it, as in PEFT."""
    return any(
        each == "all-linear" or layer == each or layer.endswith(f".{each}") or bool(re.fullmatch(each, layer))
        for each in patterns
    )


class ModelConfig(Section):
    """A Hugging Face model, and how it is built."""

    path: PathStr = "~/models/deepseek-llm-7b-chat"
    """Folder or Hub name of a Hugging Face model."""
    external_lib: str | None = None
    """Python module to import first, for example to register a model with transformers."""
    override_config: dict[str, Any] = Field(default={})
    """Values that replace those of the model's `config.json`."""
    enable_gradient_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""
    use_remove_padding: bool | None = None
    """Pack the sequences of a micro-batch into one row instead of padding them; null if the model's attention allows."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    use_liger: Annotated[bool, NotYet("Liger kernels", (False,), blocks=False)] = False
    """Use Liger's fused kernels."""
    lora_rank: Natural = 0
    """Rank of the LoRA adapters; 0 trains all weights."""
    lora_alpha: Count = 16
    """Scale of the LoRA adapters: `lora_alpha / lora_rank`, or with `use_rslora` `lora_alpha / sqrt(lora_rank)`."""
    target_modules: Names = ("all-linear",)
    """Layers with LoRA adapters: names, ends of names or regular expressions, or `all-linear` for all but the head."""
    exclude_modules: Names | None = None
    """Layers without LoRA adapters among those of `target_modules`: names, as there; null for none."""
    lora_dropout: Annotated[Fraction, NotYet("dropout", (0.0,))] = 0.0
    """Dropout of the LoRA adapters' inputs."""
    use_rslora: bool = False
    """Scale LoRA adapters by the square root of their rank (Kalajdzievski 2023, "rsLoRA")."""
    lora_adapter_path: PathStr | None = None
    """Folder or Hub name of LoRA adapters in PEFT's format to start from; null starts from adapters without effect."""

    @property
    def lora_scale(self) -> float:
        """Factor of the LoRA adapters' output."""
        return self.lora_alpha / (self.lora_rank**0.5 if self.use_rslora else self.lora_rank)

    def adapts(self, layer: str) -> bool:
        """Return whether a linear layer of this name, which is not the head, has a LoRA adapter."""
        return (
            self.lora_rank > 0
            and is_named(layer, self.target_modules)
            and not is_named(layer, self.exclude_modules or ())
        )


Beta = Annotated[Float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: Nonnegative = 1e-6
    """Learning rate after the warm-up."""
    lr_warmup_steps: Annotated[Int, Field(ge=-1)] = -1
    """Training steps of the warm-up from 0; -1 for `lr_warmup_steps_ratio`."""
    lr_warmup_steps_ratio: Fraction = 0.0
    """Fraction of all training steps that the warm-up takes."""
    min_lr_ratio: Fraction | None = None
    """Final learning rate of a cosine schedule as a fraction of `lr`; null for `min_lr`."""
    min_lr: Nonnegative = 0.0
    """Final learning rate of a cosine schedule."""
    warmup_style: Literal["constant", "cosine"] = "constant"
    """Schedule after the warm-up."""
    total_training_steps: Int = -1
    """Training steps of the schedule; -1 for the whole run."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments."""
    weight_decay: Nonnegative = 0.01
    """AdamW's weight decay."""
    clip_grad: Positive | None = 1.0
    """Maximum gradient norm; null disables clipping."""


RANDOM_WEIGHTS = NotYet("starting from random weights", (True,))


class WrapPolicyConfig(Section):
    """Modules that FSDP wraps."""

    min_num_params: Annotated[Natural, NoEffect("FSDP2 wraps each layer of the model")] = 0
    """Wrap modules with at least this many parameters; 0 wraps each transformer layer."""


class MixedPrecisionConfig(Section):
    """Dtypes of FSDP's mixed precision."""

    param_dtype: Dtype = "bf16"
    """Dtype of the weights in forward and backward passes."""
    reduce_dtype: Dtype = "fp32"
    """Dtype in which gradients are reduced over devices."""
    buffer_dtype: Dtype = "fp32"
    """Dtype of buffers."""


class FSDPConfig(Section):
    """Layout of a model under FSDP."""

    wrap_policy: WrapPolicyConfig = WrapPolicyConfig()
    param_offload: bool = False
    """Keep weights and gradients in CPU memory while they are not used."""
    optimizer_offload: bool = False
    """Keep the optimizer state in CPU memory while it is not used."""
    offload_policy: bool = False
    """FSDP2's name for `param_offload` and `optimizer_offload` together."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a layer after its forward pass, and gather them again for its backward pass."""
    gradient_sync: Literal["micro_batch", "mini_batch"] = "micro_batch"
    """Reduce gradients over devices after each micro-batch, or after the last one of a mini-batch, which keeps whole gradients on every device until then."""
    compile_blocks: bool = False
    """Compile the transformer blocks at the start of a run; `iiverl plan` says what that costs and saves."""
    fsdp_size: Annotated[Int, Field(ge=-1)] = -1
    """Devices over which a model is sharded; -1 for all."""
    model_dtype: Dtype | None = None
    """Dtype of the master weights; null for fp32 if the model is trained, otherwise bf16."""
    mixed_precision: MixedPrecisionConfig = MixedPrecisionConfig()


class MegatronConfig(Section):
    """Layout of a model under Megatron.

    The other models follow the actor's values unless they are set.
    """

    tensor_model_parallel_size: Count = 4
    """Tensor-parallel size. Default 4, or less if the devices or the model cannot be divided by 4."""
    pipeline_model_parallel_size: Count = 1
    """Pipeline-parallel size: stages into which the layers are split."""
    virtual_pipeline_model_parallel_size: Count | None = None
    """Model chunks per pipeline stage, for an interleaved schedule; null for one."""
    context_parallel_size: Count = 1
    """Context-parallel size: devices over which each sequence is split. Above 1, sequences are padded."""
    expert_model_parallel_size: Count = 1
    """Expert-parallel size: devices over which the experts of a mixture-of-experts model are split."""
    sequence_parallel: bool = True
    """Split activations between tensor-parallel layers along the sequence; no effect if the tensor-parallel size is 1."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With `enable_gradient_checkpointing`, recompute all layers (`uniform`), or some of them (`block`), which is faster and takes more memory."""
    recompute_num_layers: Count = 1
    """Layers that are recomputed together (`uniform`), or the first layers of a pipeline stage, or of each chunk of it, that are recomputed (`block`)."""
    dtype: Dtype = "bf16"
    """Dtype of the weights in forward and backward; the optimizer updates fp32 copies."""
    seed: Int = 1
    """Seed of Megatron's random number generators."""
