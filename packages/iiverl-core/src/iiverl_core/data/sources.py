"""Read rows from local files, `save_to_disk` folders and datasets on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiverl_core.data_files import (
    FILES,
    HubDataset,
    check_saved,
    hub_dataset,
    no_such_split,
    reading_columnar,
    text_rows,
    unreadable,
)
from iiverl_core.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_PER_READ = 1000  # rows converted to Python objects at a time


@dataclass(frozen=True)
class DatasetRef:
    """A dataset as the user names it: where it is, and the requested split.

    A single file, and a folder with a single `Dataset`, have no splits and are read whole.
    """

    name: str
    place: Path | HubDataset
    split: str


@dataclass(frozen=True)
class Table:
    """The rows and columns of a dataset; `name` is what the user wrote.

    Rows of a `Dataset` are memory-mapped; those of a text file are Python objects. Images are encoded, as
    `{bytes, path}`. `folder` is where relative paths in rows may start.
    """

    name: str
    columns: tuple[str, ...]
    rows: Dataset | list[dict[str, Any]]
    folder: Path = Path()

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Mapping[str, Any]:
        """Return a row; a column without a value may be missing."""
        return self.rows[index]

    def column(self, name: str, rows_per_read: int = ROWS_PER_READ) -> Iterator[list[Any]]:
        """Yield the values of a column, a few rows at a time; None if a row has no value."""
        if isinstance(self.rows, list):
            for start in range(0, len(self.rows), rows_per_read):
                yield [row.get(name) for row in self.rows[start : start + rows_per_read]]
        else:
            rows = self.rows.select_columns(name)
            for start in range(0, len(rows), rows_per_read):
                yield rows[start : start + rows_per_read][name]


def parse_dataset(name: str, split: str) -> DatasetRef:
    """Resolve the name of a dataset.

    A path that exists is local. Otherwise, a name that starts with `/`, `.` or `~`, or ends in a file suffix, can only
    be a path; `org/name`, optionally with `:config` and `@revision`, is a Hub dataset.

    Raises:
        DataError: a path that does not exist, or a name of neither form.
    """
    path = Path(name).expanduser()
    if path.exists():
        return DatasetRef(name, path, split)
    hub = hub_dataset(name)
    if hub is None:
        raise _no_such_path(name, path)
    return DatasetRef(name, hub, split)


def load_table(source: DatasetRef) -> Table:
    """Read a dataset.

    Raises:
        DataError: it cannot be read, or has no such split or no rows.
    """
    if isinstance(source.place, HubDataset):
        from iiverl_core.data.hub import load_hub  # imports datasets

        table = _table(f"{source.name} ({source.split})", load_hub(source.place, source.split))
    elif source.place.is_dir():
        table = _load_folder(source, source.place)
    else:
        try:
            table = _load_file(source.name, source.place)
        except OSError as error:
            raise unreadable(source.name, error) from error
    if not len(table):
        raise DataError(f"{table.name} has no rows.")
    return table


def load_tables(names: Sequence[str], splits: Sequence[str]) -> list[Table]:
    """Read several datasets, with one split for all or one for each.

    Raises:
        DataError: a dataset cannot be read, or there are neither one split nor as many as datasets.
    """
    if len(splits) not in (1, len(names)):
        raise DataError(
            f"There are {len(splits)} splits ({', '.join(splits)}) for {len(names)} datasets ({', '.join(names)}).\n"
            "Give one split for all of them, or one for each."
        )
    splits = list(splits) * len(names) if len(splits) == 1 else splits
    sources = [parse_dataset(name, split) for name, split in zip(names, splits, strict=True)]
    return [load_table(source) for source in sources]


def _load_file(name: str, path: Path) -> Table:
    if path.suffix in (".parquet", ".arrow"):
        from iiverl_core.data.arrow import read_arrow, read_parquet  # imports datasets

        with reading_columnar(name, path):
            rows = read_arrow(path) if path.suffix == ".arrow" else read_parquet(path)
            return _table(name, rows, path.parent)
    rows = list(text_rows(path, name))
    return Table(name, tuple(dict.fromkeys(column for row in rows for column in row)), rows, path.parent)


def _table(name: str, rows: Dataset, folder: Path = Path()) -> Table:
    from iiverl_core.data.arrow import keep_images_encoded  # imports datasets

    rows = keep_images_encoded(
        rows.with_format(None)
    )  # a folder may remember a format such as numpy or torch
    return Table(name, tuple(rows.column_names), rows, folder)


def _load_folder(source: DatasetRef, path: Path) -> Table:
    check_saved(source.name, path)
    from iiverl_core.data.arrow import read_saved  # imports datasets

    splits = read_saved(source.name, path)
    if not isinstance(splits, dict):
        return _table(source.name, splits, path)
    if source.split not in splits:
        raise no_such_split(source.name, source.split, [str(split) for split in splits])
    return _table(f"{source.name} ({source.split})", splits[source.split], path)


def _no_such_path(name: str, path: Path) -> DataError:
    parent = path.absolute().parent
    if not parent.is_dir():
        place = f"The folder {parent} does not exist either."
    else:
        there = sorted(file.name for file in parent.iterdir())
        data = [file for file in there if Path(file).suffix in FILES][:5]
        near = get_close_matches(path.name, there, n=3) or data or ["no data in it"]
        place = f"The folder {parent} has {', '.join(near)}."
    return DataError(
        f"{name} does not exist.\n{place}\n"
        f"A dataset is a {', '.join(FILES)} file, a save_to_disk folder, or a Hub name such as org/name:config@revision."
    )
