"""JSON, JSON Lines and CSV files, read so that each value stays what the file says.

The `json` and `csv` loaders of `datasets` guess a type for each column: the answer "2024-01-01" becomes a date, 1
becomes 1.0 beside 1.5, "007" becomes 7, and the word "None" a missing value. A ground truth must not change, so these
files go through Python's own readers.
"""

import csv
import json
from pathlib import Path
from typing import Any

from iiverl_core.data.errors import DataError

CELL_CHARACTERS = 2**31 - 1  # Python's own limit, 131 072, is below the length of a long document


def read_json(path: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a file with one JSON object a line, or with one array of objects.

    Raises:
        DataError: the file is neither, with the line where it goes wrong.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            start = next((line for line in file if line.strip()), "")
            file.seek(0)
            if start.lstrip().startswith("["):
                rows = json.load(file)
                places = [f"row {i} (the first is 0)" for i in range(len(rows))]
            else:
                rows, places = [], []
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        places.append(f"line {number}")
                        rows.append(_parse(line, number, name))
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error) from error
        except json.JSONDecodeError as error:
            raise DataError(f"{name}: line {error.lineno} is not JSON: {error.msg}.") from error
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, dict):
            raise DataError(
                f"{name}: {place} is of type {type(row).__name__}, not an object.\n"
                'A row is a JSON object such as {"prompt": …}: one a line, or all of them in one array.'
            )
    return rows


def _parse(line: str, number: int, name: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}: line {number} is not JSON: {error.msg} (column {error.colno}).\n"
            'The file holds one object such as {"prompt": …} a line, or one array of them.'
        ) from error


def read_csv(path: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a comma-separated file whose first line names the columns; every cell is text.

    Raises:
        DataError: a line has more or fewer cells than there are columns, or its quotes do not close.
    """
    csv.field_size_limit(CELL_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{name}: line {reader.line_num} does not have the {len(reader.fieldnames or ())} cells that "
                        "the first line names.\nA cell with a comma or a line break in it stands in double quotes."
                    )
                rows.append(row)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error) from error
        except csv.Error as error:
            raise DataError(f"{name}: line {reader.line_num} is not CSV: {error}.") from error
    return rows


def _not_utf8(name: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{name} is not UTF-8 text ({error.reason}). Save it as UTF-8.")
