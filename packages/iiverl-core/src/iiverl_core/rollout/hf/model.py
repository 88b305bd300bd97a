"""Build a model without weights from its folder or Hub name, and collect its end-of-sentence tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from iiverl_core.config import ROLE_KEYS
from iiverl_core.errors import ConfigError
from iiverl_core.training.model_config import read_model_config
from iiverl_core.training.vision import auto_class


def build_model(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    override_config: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Build a causal LM for inference from its `config.json`, with uninitialised weights.

    It is built on its device rather than the meta device, so that buffers that no checkpoint holds (rotary frequencies)
    are computed.

    Raises:
        ConfigError: there is no causal LM, or `override_config` has a key that its configuration lacks.
    """
    config = read_model_config(
        path, override_config or {}, trust_remote_code=trust_remote_code, key=ROLE_KEYS["actor"].model
    )
    try:
        with torch.device(device), no_init_weights():
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"no model can be built from '{path}' for the rollout engine: {error}") from error
    model.tie_weights()
    return model.requires_grad_(False).eval()


def stop_token_ids(
    path: str, tokenizer_path: str | None, model: PreTrainedModel, *, trust_remote_code: bool
) -> set[int]:
    """Collect the end-of-sentence ids of the tokenizer, the generation config and the model's config.

    Raises:
        ConfigError: there is no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path or path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"no tokenizer can be read from '{tokenizer_path or path}': {error}") from error
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:  # it is optional
        generation = GenerationConfig.from_model_config(model.config)
    ids: set[int] = set()
    for value in (
        tokenizer.eos_token_id,
        generation.eos_token_id,
        model.config.get_text_config().eos_token_id,
    ):
        ids.update([value] if isinstance(value, int) else value or [])
    return ids
