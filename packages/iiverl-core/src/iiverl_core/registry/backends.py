"""The training backends. Each is a separate package, found by the entry-point group `iiverl.backends`."""

from dataclasses import dataclass
from typing import Literal

from iiverl_core.installation import install_command
from iiverl_core.registry.registry import Info, Registry

GROUP = "iiverl.backends"


@dataclass(frozen=True, kw_only=True)
class BackendInfo(Info):
    """A training backend: `code` is a class that implements `TrainingBackend`.

    `name` and `aliases` are values of the key `strategy`; `title` is the name in messages. `section` is the section of each
    model that has its layout: `fsdp_config` if every process is a data-parallel rank and weights are sharded over all of
    them, `megatron` if models are split by tensor, pipeline and context. `check_model` is the code of a torch-free function
    of `ModelFacts` that returns why the backend cannot build a model, as the end of a sentence, or None.
    """

    title: str
    section: Literal["fsdp_config", "megatron"] = "fsdp_config"
    check_model: str | None = None

    @property
    def splits_models(self) -> bool:
        """Whether models are split by tensor, pipeline and context, so that some processes share their samples."""
        return self.section == "megatron"

    def missing(self) -> str | None:
        """See `Info.missing`."""
        if self.code:
            return None
        command = install_command(f"iiverl[{self.name}]", workspace="make setup")
        return f"the backend {self.name} is not installed; install it with: {command}"


BACKENDS = Registry(
    "training backend",
    GROUP,
    BackendInfo,
    absent=(  # files may name these before the package is installed
        BackendInfo(
            name="fsdp",
            aliases=("fsdp2",),
            title="FSDP",
            summary="torch FSDP2: any causal LM of transformers, sharded over all devices",
            code="",
        ),
        BackendInfo(
            name="megatron",
            title="Megatron",
            summary="megatron-core: tensor, pipeline, context and expert parallel",
            code="",
            section="megatron",
        ),
    ),
)
