"""A model as the configuration names it, for every role."""

from typing import Annotated, Any

from pydantic import Field

from iiverl_core.config.sections.section import Count, Names, Natural, NotYet, Path, Section


class ModelConfig(Section):
    """A Hugging Face model and how it is built."""

    path: Path = "~/models/deepseek-llm-7b-chat"
    """Folder or Hub name of a Hugging Face model."""
    external_lib: str | None = None
    """Python module that is imported first, to register a model that transformers does not have."""
    override_config: dict[str, Any] = Field(default={})
    """Values that replace those of the model's own `config.json`."""
    enable_gradient_checkpointing: bool = True
    """Compute activations again in the backward pass instead of keeping them."""
    use_remove_padding: bool = False
    """Lay a micro-batch's sequences one after another instead of padding them to one length."""
    trust_remote_code: bool = False
    """Let code that comes with the model run."""
    use_liger: Annotated[bool, NotYet("Liger kernels", (False,), blocks=False)] = False
    """Replace parts of the model by Liger's fused kernels."""
    lora_rank: Annotated[Natural, NotYet("LoRA", (0,))] = 0
    """Rank of LoRA's adapters; 0 trains all weights."""
    lora_alpha: Annotated[Count, NotYet("LoRA", (16,), blocks=False)] = 16
    """LoRA's scale: adapters count `lora_alpha / lora_rank`."""
    target_modules: Annotated[Names, NotYet("LoRA", (("all-linear",),), blocks=False)] = ("all-linear",)
    """Modules that get adapters: a list of names, or `all-linear`."""
