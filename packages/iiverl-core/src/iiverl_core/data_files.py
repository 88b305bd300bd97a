"""Read data files: the columns and first rows of every format, and all rows of text files.

Imports nothing heavy: pyarrow only when a columnar file is opened, and never the `datasets` library.

JSON, JSON Lines and CSV are read with Python's own readers, which keep values unchanged. The `json` and `csv` loaders of
`datasets` guess a type for each column: the answer "2024-01-01" becomes a date, 1 becomes 1.0 beside 1.5, "007" becomes 7,
and the word "None" a missing value. A ground truth must not change.
"""

import csv
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiverl_core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

FILES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
"""Suffixes of data files."""

HEAD_ROWS = 100
"""Rows that `read_head` reads; further rows are only counted."""

CELL_CHARACTERS = 2**31 - 1  # Python's own limit, 131 072, is below the length of a long document
ARRAY_BYTES = 2**24  # a JSON array is read whole, so a head is taken only of one that is not larger

_SPACE = b" \t\r\n\xef\xbb\xbf"  # and the bytes of a byte order mark
_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?::(?P<config>[^@:/]+))?(?:@(?P<revision>.+))?")


@dataclass(frozen=True)
class Head:
    """The first rows of a dataset.

    `rows` are the first `HEAD_ROWS`, with the requested columns. `count` is the number of all rows, or a lower bound that is
    at least the requested number. `columns` are all columns if `complete`; otherwise those of `rows`.
    """

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    count: int
    complete: bool


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


def hub_dataset(name: str) -> HubDataset | None:
    """Split `org/name:config@revision` into its parts; None if `name` can only be a path."""
    match = _HUB_NAME.fullmatch(name)
    if match is None or name.startswith(("/", ".", "~")) or Path(match["repo"]).suffix in FILES:
        return None
    return HubDataset(match["repo"], match["config"], match["revision"])


def read_head(name: str, split: str, columns: Collection[str], enough: int) -> Head | None:
    """Read the columns and the first rows of the local file or `save_to_disk` folder `name`.

    Rows are counted up to `enough`. Returns None if the dataset is not local, or if reading its head would be slow.

    Raises:
        DataError: it cannot be read, has no such split, or has no rows.
    """
    path = Path(name)
    if not path.exists():
        return None
    try:
        if path.is_dir():
            head = _folder_head(name, path, split, columns, enough)
        elif path.suffix in (".parquet", ".arrow"):
            with reading_columnar(name, path):
                head = _columnar_head(path, columns, enough)
        else:
            head = _text_head(name, path, enough)
    except OSError as error:
        raise unreadable(name, error) from error
    if head and not head.count:
        raise DataError(f"{name} has no rows.")
    return head


def text_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON, JSON Lines or CSV file.

    Raises:
        DataError: the file has another suffix, or is not what its suffix says; names the line.
    """
    match path.suffix:
        case ".json" | ".jsonl":
            return json_rows(path, name)
        case ".csv":
            return csv_rows(path, name)
        case _:
            raise DataError(f"{name} is not a supported data file: use {', '.join(FILES)}.")


def json_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file with one JSON object per line, or with one array of objects.

    Raises:
        DataError: the file is neither; names the line.
    """
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            if _is_array(path):
                for number, row in enumerate(json.load(file)):
                    yield _object(row, f"row {number} (the first is 0)", name)
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _object(_parse(line, number, name), f"line {number}", name)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error) from error
        except json.JSONDecodeError as error:
            raise DataError(f"{name}: line {error.lineno} is not JSON: {error.msg}.") from error


def csv_rows(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a comma-separated file whose first line names the columns; every cell is text.

    Raises:
        DataError: a line has more or fewer cells than there are columns, or its quotes do not close.
    """
    csv.field_size_limit(CELL_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{name}: line {reader.line_num} does not have the {len(reader.fieldnames or ())} cells of the first "
                        "line.\nPut cells that contain a comma or a line break in double quotes."
                    )
                yield row
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error) from error
        except csv.Error as error:
            raise DataError(f"{name}: line {reader.line_num} is not CSV: {error}.") from error


@contextmanager
def reading_columnar(name: str, path: Path) -> Iterator[None]:
    """Turn every error of reading a parquet or arrow file into a `DataError`.

    Raises:
        DataError: the libraries raised anything; the file is at fault.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name} cannot be read as {path.suffix[1:]}: {error.__cause__ or error}") from error


def check_saved(name: str, path: Path) -> None:
    """Check that a folder was written by `save_to_disk`.

    Raises:
        DataError: it was not; lists the data files in it.
    """
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.suffix in FILES)
    holds = f"It has {', '.join(files[:5])}{', …' if len(files) > 5 else ''}: use one of these, or a list."
    raise DataError(
        f"The folder {name} was not written by save_to_disk of the datasets library.\n"
        f"{holds if files else 'It has no data files.'}"
    )


def no_such_split(name: str, split: str, splits: list[str]) -> DataError:
    """Return an error that lists the splits of a dataset."""
    near = get_close_matches(split, splits, n=1)
    return DataError(
        f"{name} has no split {split!r}{f'; did you mean {near[0]!r}?' if near else '.'}\n"
        f"It has: {', '.join(splits)}. Set data.train_split or data.val_split."
    )


def unreadable(name: str, error: OSError) -> DataError:
    """Return an error about a file that the system cannot read."""
    return DataError(f"{name} cannot be read: {error.strerror or error}.")


def _text_head(name: str, path: Path, enough: int) -> Head | None:
    rows = text_rows(path, name)
    array = _is_array(path)
    if array and path.stat().st_size > ARRAY_BYTES:
        return None
    if array:
        every = list(rows)
        columns = tuple(dict.fromkeys(column for row in every for column in row))
        return Head(columns, every[:HEAD_ROWS], len(every), complete=True)
    first = list(islice(rows, HEAD_ROWS))
    columns = tuple(dict.fromkeys(column for row in first for column in row))
    if path.suffix == ".csv":
        count = len(first) + sum(1 for _ in islice(rows, _counted(enough) - len(first)))
    else:  # lines need not be parsed to be counted
        with path.open("rb") as file:
            count = sum(1 for _ in islice((line for line in file if line.strip()), _counted(enough)))
    return Head(columns, first, count, complete=count == len(first) or path.suffix == ".csv")


def _counted(enough: int) -> int:
    """Return how many rows to count: at least one more than are read, to know whether those are all."""
    return max(enough, HEAD_ROWS + 1)


def _columnar_head(path: Path, columns: Collection[str], enough: int) -> Head:
    import pyarrow.parquet as pq

    if path.suffix == ".arrow":
        return _arrow_head([path], columns, enough)
    with pq.ParquetFile(path, memory_map=True) as file:
        names = tuple(file.schema_arrow.names)
        wanted = [name for name in names if name in columns]
        first = next(file.iter_batches(HEAD_ROWS, columns=wanted), None) if wanted else None
        rows = first.to_pylist() if first else []
        return Head(names, rows, file.metadata.num_rows, complete=True)


def _arrow_head(paths: list[Path], columns: Collection[str], enough: int) -> Head:
    """Read the head of consecutive arrow files."""
    names: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = []
    count = 0
    for path in paths:
        with ExitStack() as stack:
            schema, batches = _batches(path, stack)
            names = names or tuple(schema.names)
            for batch in batches:
                if len(rows) < HEAD_ROWS:
                    wanted = [name for name in schema.names if name in columns]
                    rows += batch.select(wanted).slice(0, HEAD_ROWS - len(rows)).to_pylist() if wanted else []
                count += batch.num_rows
                if count >= _counted(enough):
                    return Head(names, rows, count, complete=True)
    return Head(names, rows, count, complete=True)


def _batches(path: Path, stack: ExitStack) -> "tuple[pa.Schema, Iterator[pa.RecordBatch]]":
    """Open an arrow file of either format: its schema, and its batches on demand."""
    import pyarrow as pa

    source = stack.enter_context(pa.memory_map(str(path)))
    try:
        file = stack.enter_context(pa.ipc.open_file(source))
        return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
    except pa.ArrowInvalid:  # not Arrow's file format but its stream, which save_to_disk writes
        source.seek(0)
        stream = stack.enter_context(pa.ipc.open_stream(source))
        return stream.schema, iter(stream)


def _folder_head(name: str, path: Path, split: str, columns: Collection[str], enough: int) -> Head | None:
    check_saved(name, path)
    if not (path / "state.json").is_file():
        splits = _json_object(path / "dataset_dict.json").get("splits") or []
        if split not in splits:
            raise no_such_split(name, split, [str(each) for each in splits])
        path /= split
    state = _json_object(path / "state.json")
    files = [path / str(each.get("filename")) for each in state.get("_data_files") or ()]
    if state.get("_indices_files") or not files:  # the rows are reordered
        return None
    try:
        return _arrow_head(files, columns, enough)
    except Exception as error:  # the library raises anything; the folder is at fault
        raise DataError(f"The save_to_disk folder {name} cannot be read: {error}") from error


def _json_object(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return values if isinstance(values, Mapping) else {}


def _is_array(path: Path) -> bool:
    """Return whether a JSON file is one array, not an object per line."""
    with path.open("rb") as file:  # not by lines: an array may be one line of any length
        start = next(
            (text for chunk in iter(lambda: file.read(4096), b"") if (text := chunk.strip(_SPACE))), b""
        )
    return start.startswith(b"[")


def _object(row: Any, place: str, name: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{name}: {place} is of type {type(row).__name__}, not an object.\n"
            'A row is a JSON object such as {"prompt": …}: one per line, or all of them in one array.'
        )
    return row


def _parse(line: str, number: int, name: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}: line {number} is not JSON: {error.msg} (column {error.colno}).\n"
            'The file must have one object such as {"prompt": …} per line, or be one array of them.'
        ) from error


def _not_utf8(name: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{name} is not UTF-8 text ({error.reason}). Save it as UTF-8.")
