"""The rows of one source, whatever they were read from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

READ_ROWS = 1000  # rows that are turned into Python objects at a time


@dataclass(frozen=True)
class Table:
    """Rows and their columns; `name` says where they come from, as the user wrote it.

    Rows of a `Dataset` stay on disk, mapped into memory; those of a text file are held as Python objects.
    """

    name: str
    columns: tuple[str, ...]
    rows: Dataset | list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Mapping[str, Any]:
        """One row; a column that it lacks may be missing in it."""
        return self.rows[index]

    def column(self, name: str) -> Iterator[list[Any]]:
        """The values of one column, a few at a time; None where a row lacks it."""
        if isinstance(self.rows, Dataset):
            rows = self.rows.select_columns(name)
            for start in range(0, len(rows), READ_ROWS):
                yield rows[start : start + READ_ROWS][name]
        else:
            for start in range(0, len(self.rows), READ_ROWS):
                yield [row.get(name) for row in self.rows[start : start + READ_ROWS]]
