"""Read parquet and arrow files and `save_to_disk` folders with the datasets library, and deal with its cache and bars."""

import errno
import glob
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Image, LargeList, List

from iiverl_core.errors import DataError

CACHE_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
"""Errors of the system when a folder cannot be written."""


@contextmanager
def bars_only_on_terminals() -> Iterator[None]:
    """Keep the library's progress bars out of logs."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@bars_only_on_terminals()
def read_parquet(path: Path) -> Dataset:
    """Read a parquet file. Raises what the library raises, or a `DataError` about its cache."""
    if not pyarrow.parquet.read_metadata(path).num_rows:
        return Dataset.from_dict({})  # the loader rejects a file without rows
    data_files = glob.escape(str(path.absolute()))
    try:
        return datasets.load_dataset("parquet", data_files=data_files, split="train")
    except Exception as error:  # the loader's errors have generic types
        raise cache_failure(error) or error from None


def read_arrow(path: Path) -> Dataset:
    """Read a file in either of Arrow's formats."""
    with pa.memory_map(str(path)) as source:
        try:
            return Dataset(pa.ipc.open_file(source).read_all())
        except pa.ArrowInvalid:  # Arrow's stream format, which save_to_disk writes
            source.seek(0)
            return Dataset(pa.ipc.open_stream(source).read_all())


@bars_only_on_terminals()
def read_saved(name: str, path: Path) -> Dataset | DatasetDict:
    """Read a `save_to_disk` folder: its rows, or those of each split.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return datasets.load_from_disk(path)
    except Exception as error:  # whatever the library raises, the folder is invalid
        raise DataError(f"The save_to_disk folder {name} cannot be read: {error}") from error


def keep_images_encoded(rows: Dataset) -> Dataset:
    """Give images as `{bytes, path}`, at any depth, instead of decoding them whenever a row is read; changes `rows`."""
    features = rows.info.features or {}
    features.update({column: _encoded(feature) for column, feature in features.items()})
    return rows


def _encoded(feature: Any) -> Any:
    match feature:
        case Image():
            return Image(mode=feature.mode, decode=False)
        case List():
            return List(_encoded(feature.feature), length=feature.length)
        case LargeList():
            return LargeList(_encoded(feature.feature))
        case dict():
            return {name: _encoded(each) for name, each in feature.items()}
        case _:
            return feature


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
