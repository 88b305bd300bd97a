"""Check that a model is where its name says, before the libraries that load it ask the Hub for each of its files."""

from pathlib import Path

import huggingface_hub.constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from iiverl_core.config.model_facts import find_config
from iiverl_core.errors import ConfigError

HUB_TIMEOUT_S = 10.0


def check_model(key: str, path: str) -> None:
    """Check that the Hub has the model that the key names, if it is neither a folder nor in the cache.

    This takes one request; the libraries that load a model request each of its files several times before they give up.

    Raises:
        ConfigError: the Hub has no such model, or cannot be reached.
    """
    if Path(path).expanduser().exists() or find_config(path):
        return
    forms = "It names a folder with a model's files, or a model on the Hugging Face Hub (org/name)."
    try:
        huggingface_hub.HfApi().model_info(path, timeout=HUB_TIMEOUT_S)
    except GatedRepoError:
        return  # loading it explains how to get access
    except HFValidationError as error:
        raise ConfigError(f"{key}: there is no folder {path}.\n{forms}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{key}: there is no folder {path}, and no such model on {huggingface_hub.constants.ENDPOINT}.\n{forms} If "
            "the model is private, log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except HfHubHTTPError:
        return  # a temporary problem of the Hub
    except Exception as error:  # network errors have many types
        raise ConfigError(
            f"{key}: there is no folder {path}, and the Hub at {huggingface_hub.constants.ENDPOINT} cannot be reached for "
            f"it ({type(error).__name__}).\n{forms}"
        ) from error
