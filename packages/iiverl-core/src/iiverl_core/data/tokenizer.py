"""The tokenizers that a run's configuration names."""

from typing import TYPE_CHECKING

from iiverl_core.config import Config
from iiverl_core.data.hub import check_model
from iiverl_core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """Load `data.tokenizer`, or the actor's own where that is null.

    Raises:
        ConfigError: there is no such tokenizer, or it cannot be read.
    """
    model = config.actor_rollout_ref.model
    if config.data.tokenizer is not None:
        return _load("data.tokenizer", config.data.tokenizer, model.trust_remote_code)
    return _load("actor_rollout_ref.model.path", model.path, model.trust_remote_code)


def load_reward_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """Load the reward model's own tokenizer, from `reward_model.model.path`.

    Raises:
        ConfigError: there is no such tokenizer, or it cannot be read.
    """
    model = config.reward_model.model
    return _load("reward_model.model.path", model.path, model.trust_remote_code)


def one_start(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Drop the beginning-of-sentence token that a tokenizer puts before a text that already has one."""
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def _load(key: str, path: str, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # brings torch, which reading data does without

    check_model(key, path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{key}: no tokenizer could be read from {path}: {reason}\n"
            "It names a folder with a tokenizer's files, or a model on the Hugging Face Hub (org/name)."
        ) from error
