"""Load datasets from the Hugging Face Hub, and explain why one cannot be loaded."""

import re
from pathlib import Path

import datasets.config
import huggingface_hub.constants
from datasets import Dataset, DatasetBuilder
from datasets.exceptions import DatasetNotFoundError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from iiverl_core.data.arrow import bars_only_on_terminals, cache_failure
from iiverl_core.data_files import HubDataset, no_such_split
from iiverl_core.errors import DataError


@bars_only_on_terminals()
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
