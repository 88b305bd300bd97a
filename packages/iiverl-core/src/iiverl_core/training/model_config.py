"""The configuration of a model as transformers reads it: the only place where `override_config` is applied."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from iiverl_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def read_model_config(
    path: str, override: Mapping[str, Any], *, trust_remote_code: bool, key: str
) -> "PreTrainedConfig":
    """Read the configuration of the model at `path`, with the values of `override`.

    `key` is that of the section of the model, for messages. `run_config` has already turned `rope_theta` and `rope_scaling`
    into `rope_parameters`, the only one that transformers reads.

    Raises:
        ConfigError: there is no configuration, or it has no values of these names, which would be ignored.
    """
    from transformers import AutoConfig

    reading: Any = AutoConfig.from_pretrained  # which declares one of its two results
    try:
        config, unused = reading(
            path, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **override
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{key}.path: no model can be read from '{path}': {error}") from error
    if unused:
        names = ", ".join(sorted(unused))
        raise ConfigError(
            f"{key}.override_config: the configuration of {path} ({type(config).__name__}) has no {names}; correct or "
            "remove it, since it would be ignored"
        )
    return config
