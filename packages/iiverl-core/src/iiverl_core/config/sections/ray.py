"""The section `ray_kwargs`: how Ray is started."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from iiverl_core.config.sections.section import Count, OnlyWhen, Section


def _as_text(value: Any) -> Any:
    """Write a number or a boolean as it is written in YAML."""
    return str(value).lower() if isinstance(value, int | float) else value


class RuntimeEnvConfig(Section):
    """What the processes of a run have around them."""

    env_vars: dict[str, Annotated[str, BeforeValidator(_as_text)]] = Field(default={})
    """Environment variables of the workers, in addition to those of this command; recorded with the run, so no secrets."""


class RayInitConfig(Section):
    """Arguments of `ray.init`."""

    num_cpus: Count | None = None
    """CPUs that Ray counts on this machine if the command starts it there; null for all, and at least one per worker."""
    runtime_env: RuntimeEnvConfig = RuntimeEnvConfig()


class RayConfig(Section):
    """How Ray is started."""

    ray_init: Annotated[RayInitConfig, OnlyWhen("trainer.runtime", ("ray",))] = RayInitConfig()
