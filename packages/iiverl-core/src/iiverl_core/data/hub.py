"""Datasets and models on the Hugging Face Hub, and what to say if one cannot be loaded."""

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

HUB_SECONDS = 10.0  # that the Hub has to answer in


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the Hub: `org/name`, and where given one of its configurations, and a branch, tag or commit."""

    repo: str
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{config}{revision}"


def load_hub(wanted: HubDataset, split: str) -> Dataset:
    """Download one split, or take it from the cache.

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
    except Exception as error:  # network, disk and parsing fail in as many types as there are libraries below
        raise DataError(f"{wanted} cannot be loaded: {_reason(error.__cause__ or error)}") from error
    if not isinstance(rows, Dataset):
        raise DataError(f"{wanted}: the split {split!r} is not one set of rows.")
    return rows


def check_model(key: str, path: str) -> None:
    """See that the Hub has the model that the configuration's `key` names, if it is neither a folder nor in the cache.

    One request tells; the libraries that load a model ask for each of its files, again and again, before they give up.

    Raises:
        ConfigError: the Hub has no such model, or cannot be reached.
    """
    if Path(path).expanduser().exists() or find_config(path):
        return
    forms = "It names a folder with a model's files, or a model on the Hugging Face Hub (org/name)."
    try:
        huggingface_hub.HfApi().model_info(path, timeout=HUB_SECONDS)
    except GatedRepoError:
        return  # whoever loads it says how to ask for access
    except HFValidationError as error:
        raise ConfigError(f"{key}: there is no folder {path}.\n{forms}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{key}: there is no folder {path}, and no such model on {huggingface_hub.constants.ENDPOINT}.\n{forms} If "
            "the model is private, log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except HfHubHTTPError:
        return  # the Hub has trouble of its own, which may pass
    except Exception as error:  # a network fails in as many types as there are libraries below
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
        raise _unreachable(wanted, "it was never loaded") from error
    except Exception as error:  # the loader's other errors have general types
        raise _not_loaded(wanted, error) from error


def _unreachable(wanted: HubDataset, why: str) -> DataError:
    return DataError(
        f"The Hub at {datasets.config.HF_ENDPOINT} cannot be reached for {wanted}, and the cache "
        f"({datasets.config.HF_DATASETS_CACHE}) does not have it: {why}.\n"
        "Load it once where there is a network, with the same HF_HOME, or name local files instead."
    )


def _not_found(wanted: HubDataset, error: Exception) -> DataError:
    if "Revision" in str(error) and wanted.revision:
        return DataError(
            f"The dataset {wanted.repo} has no revision {wanted.revision!r} on {datasets.config.HF_ENDPOINT}.\n"
            "A revision is a branch, a tag or a commit, written after @; without one, main is taken."
        )
    if "gated" in str(error):
        return DataError(
            f"The dataset {wanted.repo} on {datasets.config.HF_ENDPOINT} is gated.\n"
            "Ask for access on its page, then log in with `hf auth login` or set HF_TOKEN."
        )
    return DataError(
        f"There is no dataset {wanted.repo} on {datasets.config.HF_ENDPOINT}, and no such path in {Path.cwd()}.\n"
        "Check the spelling. If the dataset is private, log in with `hf auth login` or set HF_TOKEN."
    )


def _not_loaded(wanted: HubDataset, error: Exception) -> DataError:
    if "scripts are no longer supported" in str(error):
        return DataError(
            f"{wanted.repo} needs a loading script, and scripts are not run.\n"
            f"If the Hub has converted it, {wanted.repo}@refs/convert/parquet works; else save it as parquet."
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
    """Refuse a copy of another revision, which `datasets` gives out of its cache where the Hub does not answer."""
    if not isinstance(builder, Cache):
        return
    revision = wanted.revision or "main"
    folder = repo_folder_name(repo_id=wanted.repo, repo_type="dataset")
    name = Path(huggingface_hub.constants.HF_HUB_CACHE, folder, "refs", revision)
    commit = name.read_text().strip() if name.is_file() else revision
    if builder.hash != commit and (wanted.revision or name.is_file()):
        raise DataError(
            f"The Hub at {datasets.config.HF_ENDPOINT} cannot be reached for {wanted}, and the copy in the cache is of "
            f"another revision ({builder.hash}).\nConnect, or ask for {wanted.repo}@{builder.hash}."
        )
