"""The tokenizer that a run's configuration names."""

from typing import TYPE_CHECKING

from iiverl_core.config import Config
from iiverl_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """Load `data.tokenizer`, or the actor's own where that is null.

    Raises:
        ConfigError: there is no such tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer  # brings torch, which reading data does without

    model = config.actor_rollout_ref.model
    key, path = "data.tokenizer", config.data.tokenizer
    if path is None:
        key, path = "actor_rollout_ref.model.path", model.path
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{key}: no tokenizer could be read from {path}: {reason}\n"
            "It names a folder with a tokenizer's files, or a model on the Hugging Face Hub (org/name)."
        ) from error
