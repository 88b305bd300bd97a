"""Load datasets from the Hugging Face Hub, and explain why a dataset or model cannot be loaded."""

import errno
import re
from dataclasses import dataclass
from pathlib import Path

import datasets.config
import huggingface_hub.constants
from datasets import Dataset, DatasetBuilder
from datasets.exceptions import DatasetNotFoundError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from iiverl_core.config.model_facts import find_config
from iiverl_core.data_files import no_such_split
from iiverl_core.errors import ConfigError, DataError

HUB_TIMEOUT_S = 10.0
CACHE_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
"""Errors of the system when a folder cannot be written."""


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hub: `org/name`, optionally with a configuration and a branch, tag or commit."""

    repo: str
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{config}{revision}"


def load_hub(wanted: HubDataset, split: str) -> Dataset:
    """Load one split from the Hub or the cache.

    `split` may also be an expression of the datasets library, such as `train[:1000]` or `train+validation`.

    Raises:
        DataError: no such dataset, revision, configuration or split; or the Hub cannot be reached.
    """
    builder = _builder(wanted)
    _check_cached_revision(wanted, builder)
    splits = list(builder.config.data_files or builder.info.splits or ())
    names = [re.sub(r"\[.*", "", part).strip() for part in split.split("+")]
    missing = [name for name in names if name not in splits and name != "all"]
    if missing:
        raise no_such_split(str(wanted), missing[0], splits)
    try:
        builder.download_and_prepare()
        rows = builder.as_dataset(split=split)
    except Exception as error:  # network, disk and parser errors have many types
        if failure := cache_failure(error):
            raise failure from error
        raise DataError(f"{wanted} cannot be loaded: {_reason(error.__cause__ or error)}") from error
    if not isinstance(rows, Dataset):
        raise DataError(f"{wanted}: the split {split!r} is not a single dataset.")
    return rows


def cache_failure(error: BaseException) -> DataError | None:
    """Return an error about the cache of the datasets library if that, and not the data, is the cause; otherwise None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in CACHE_ERRORS:
            return DataError(
                f"The cache of the datasets library, {datasets.config.HF_DATASETS_CACHE}, cannot be written: "
                f"{cause.strerror}.\nSet HF_HOME or HF_DATASETS_CACHE to a folder that can be written and has space."
            )
        cause = cause.__cause__ or cause.__context__
    return None


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


def _builder(wanted: HubDataset) -> DatasetBuilder:
    try:
        return datasets.load_dataset_builder(wanted.repo, wanted.config, revision=wanted.revision)
    except (DatasetNotFoundError, RepositoryNotFoundError) as error:
        raise _not_found(wanted, error) from error
    except ConnectionError as error:
        raise _unreachable(wanted, "it was never downloaded") from error
    except Exception as error:  # the loader's other errors have generic types
        if failure := cache_failure(error):
            raise failure from error
        raise _not_loaded(wanted, error) from error


def _unreachable(wanted: HubDataset, why: str) -> DataError:
    return DataError(
        f"The Hub at {datasets.config.HF_ENDPOINT} cannot be reached for {wanted}, and the cache "
        f"({datasets.config.HF_DATASETS_CACHE}) does not have it: {why}.\n"
        "Download it once with network access and the same HF_HOME, or use local files instead."
    )


def _not_found(wanted: HubDataset, error: Exception) -> DataError:
    if "Revision" in str(error) and wanted.revision:
        return DataError(
            f"The dataset {wanted.repo} has no revision {wanted.revision!r} on {datasets.config.HF_ENDPOINT}.\n"
            "A revision is a branch, a tag or a commit, written after @; the default is main."
        )
    if "gated" in str(error):
        return DataError(
            f"The dataset {wanted.repo} on {datasets.config.HF_ENDPOINT} is gated.\n"
            "Request access on its page, then log in with `hf auth login` or set HF_TOKEN."
        )
    return DataError(
        f"There is no dataset {wanted.repo} on {datasets.config.HF_ENDPOINT}, and no such path in {Path.cwd()}.\n"
        "Check the spelling. If the dataset is private, log in with `hf auth login` or set HF_TOKEN."
    )


def _not_loaded(wanted: HubDataset, error: Exception) -> DataError:
    if "scripts are no longer supported" in str(error):
        return DataError(
            f"{wanted.repo} needs a loading script, and scripts are not run.\n"
            f"If the Hub has converted it, use {wanted.repo}@refs/convert/parquet; otherwise save it as parquet."
        )
    if "find cache" in str(error) or "in the cache" in str(error):
        return _unreachable(wanted, str(error).splitlines()[0])
    if isinstance(error, ValueError) and "config" in str(error).lower():
        configs = datasets.get_dataset_config_names(wanted.repo, revision=wanted.revision)
        if wanted.config not in configs:
            at = f"@{wanted.revision}" if wanted.revision else ""
            choices = ", ".join(f"{wanted.repo}:{config}{at}" for config in configs)
            what = (
                f"has no configuration {wanted.config!r}" if wanted.config else "has several configurations"
            )
            return DataError(f"{wanted.repo} {what}. Choose one of: {choices}.")
    return DataError(f"{wanted} cannot be loaded from {datasets.config.HF_ENDPOINT}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _check_cached_revision(wanted: HubDataset, builder: DatasetBuilder) -> None:
    """Reject a copy of another revision, which `datasets` takes from its cache if the Hub does not answer."""
    if not isinstance(builder, Cache):
        return
    revision = wanted.revision or "main"
    folder = repo_folder_name(repo_id=wanted.repo, repo_type="dataset")
    name = Path(huggingface_hub.constants.HF_HUB_CACHE, folder, "refs", revision)
    commit = name.read_text().strip() if name.is_file() else revision
    if builder.hash != commit and (wanted.revision or name.is_file()):
        raise DataError(
            f"The Hub at {datasets.config.HF_ENDPOINT} cannot be reached for {wanted}, and the copy in the cache is of "
            f"another revision ({builder.hash}).\nConnect, or use {wanted.repo}@{builder.hash}."
        )
