"""Load the tokenizers of a run."""

from pathlib import Path
from typing import TYPE_CHECKING

from iiverl_core.config import RoleConfig, RunConfig
from iiverl_core.data.chat import PromptError, write_chat
from iiverl_core.data.hub_models import check_model
from iiverl_core.errors import ConfigError
from iiverl_core.sequence_files import TOKENIZER_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(run: RunConfig) -> "PreTrainedTokenizerBase":
    """Load `data.tokenizer`, or the actor's tokenizer if that is null.

    Raises:
        ConfigError: there is no such tokenizer, or it cannot be read.
    """
    model = run.actor.model
    if run.data.tokenizer is not None:
        return _load("data.tokenizer", run.data.tokenizer, model.trust_remote_code)
    return _load(run.actor.key("model.path"), model.path, model.trust_remote_code)


def load_reward_tokenizer(role: RoleConfig) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of the reward model from the model's folder.

    Raises:
        ConfigError: there is no such tokenizer, or it cannot be read.
    """
    return _load(role.key("model.path"), role.model.path, role.model.trust_remote_code)


def write_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a tokenizer beside token ids, so that these can be read without the model; nothing for one in Python.

    The file is that of the package `tokenizers`, which reads it.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / TOKENIZER_FILE))


def one_start(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Drop the beginning-of-sequence token that a tokenizer adds to a text that already has one."""
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def turn_end(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Return the special token with which the chat template ends the assistant's turn.

    Returns None if there is no template, if it fails for a chat of two short messages, or if it writes no special token
    after the response.
    """
    mark = "x7"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        text = write_chat(messages, tokenizer) if tokenizer.chat_template else ""
    except PromptError:
        return None
    _, found, tail = text.rpartition(mark)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    special = {
        *tokenizer.all_special_ids,
        *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special),
    }
    return next((id for id in ids if id in special), None)


def _load(key: str, path: str, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer  # imports torch

    check_model(key, path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{key}: no tokenizer could be read from {path}: {reason}\n"
            "It names a folder with a tokenizer's files, or a model on the Hugging Face Hub (org/name)."
        ) from error
