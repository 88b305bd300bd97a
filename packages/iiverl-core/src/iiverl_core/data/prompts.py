"""Turn rows into prompts: chat template, tokenization, length filter and truncation."""

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, compress, count, islice, repeat
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
from rich.console import Console
from rich.progress import Progress

from iiverl_core.columns import (
    DATA_SOURCE,
    IMAGE,
    ground_truth_columns,
    ground_truth_of,
    is_given,
    missing_column,
    pop_ground_truth,
)
from iiverl_core.data.chat import ChatTemplate, Messages, PromptError, as_prompt
from iiverl_core.data.images import ImageProcessor, images_of, with_image_parts
from iiverl_core.data.sources import ROWS_PER_READ, Table, load_tables
from iiverl_core.data.tokenizer import one_start
from iiverl_core.errors import DataError
from iiverl_core.samples import Prompt, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation: TypeAlias = Literal["error", "left", "right"]

# Of datasets with many rows, the first are tokenized before the others, since a wrong tokenizer or length shows there.
_MANY_ROWS, _FIRST_ROWS = 10_000, 1000


@dataclass(frozen=True)
class _TokenizedTable:
    """The prompts of one dataset.

    `ids` (T,) int32 holds the tokens of all its rows; prompt i is `ids[starts[i] : stops[i]]` and row `rows[i]`. `digests`
    (N,) have one of the images of each prompt, empty for a prompt without any.
    """

    table: Table
    ids: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    digests: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.stops - self.starts

    def only(self, kept: np.ndarray) -> "_TokenizedTable":
        """Keep the prompts for which `kept` is true."""
        rows, starts, stops, digests = (
            each[kept] for each in (self.rows, self.starts, self.stops, self.digests)
        )
        return replace(self, rows=rows, starts=starts, stops=stops, digests=digests)


class PromptSet(Sequence[Prompt]):
    """The concatenated prompts of one or several datasets.

    Token ids are held in memory; the chat and the other columns are read on access. `columns` names the columns of all
    datasets; one that a row's dataset does not have is None. `ground_truth_key` is `data.ground_truth_key`. With an
    `image_key`, prompts have images, which are not among the columns.
    """

    def __init__(
        self,
        parts: Sequence[_TokenizedTable],
        tokenizer: "PreTrainedTokenizerBase",
        prompt_key: str,
        ground_truth_key: str | None,
        data_source_key: str,
        image_key: str | None = None,
    ) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part.rows) for part in parts]).tolist()
        self.prompt_key = prompt_key
        self.ground_truth_key = ground_truth_key
        self._data_source_key = data_source_key
        self._tokenizer = tokenizer
        self._image_key = image_key
        names = dict.fromkeys(name for part in parts for name in part.table.columns)
        self.columns: tuple[str, ...] = tuple(name for name in names if name not in (prompt_key, image_key))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each prompt, (N,) int64."""
        return np.concatenate([part.lengths for part in self._parts])

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(index) + len(self) if index < 0 else int(index)
        if not 0 <= row < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        number = bisect_right(self._ends, row)
        part = self._parts[number]
        i = row - self._ends[number] + len(part.rows)
        ids = part.ids[part.starts[i] : part.stops[i]].tolist()
        values = part.table.row(int(part.rows[i]))
        parts = None if self._image_key is None else []
        prompt = as_prompt(values[self.prompt_key], parts)
        images = ()
        if self._image_key is not None:
            images = images_of(prompt, parts or (), values.get(self._image_key), part.table.folder)
        columns = {name: values.get(name) for name in self.columns}
        data_source = columns.pop(self._data_source_key, None)
        return Prompt(
            row=row,
            ids=tuple(ids),
            text=str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
            data_source="" if data_source is None else str(data_source),
            ground_truth=pop_ground_truth(columns, self.ground_truth_key),
            columns=columns,
            chat=None if isinstance(prompt, str) else tuple(prompt),
            source=part.table.name,
            source_row=int(part.rows[i]),
            images=images,
        )

    @property
    def has_images(self) -> bool:
        """Whether any prompt has images."""
        return any(bool((part.digests != b"").any()) for part in self._parts)

    @property
    def name(self) -> str:
        """The names of the datasets, as the user wrote them."""
        return ", ".join(part.table.name for part in self._parts)

    def place(self, index: int) -> str:
        """Describe the dataset of a prompt and its row there."""
        number = bisect_right(self._ends, index)
        part = self._parts[number]
        return place_of(part.table.name, int(part.rows[index - self._ends[number] + len(part.rows)]))

    def without_ground_truth(self) -> np.ndarray:
        """Find the prompts without a ground truth, (M,) int64, without decoding any."""
        return np.flatnonzero([not is_given(truth) for truth in self._ground_truths()])

    def fingerprint(self) -> dict[str, Any]:
        """Identify what a run trains on, by content and order, wherever the files are.

        `rows` counts the prompts, `prompts` and `ground_truths` are SHA-256 of their token ids, with their images if there
        are any, and of their ground truths; `columns` names the other columns.
        """
        ids, truths = hashlib.sha256(), hashlib.sha256()
        for part in self._parts:
            bounds = part.starts.tolist(), part.stops.tolist(), part.digests.tolist()
            for start, stop, images in zip(*bounds, strict=True):
                ids.update((stop - start).to_bytes(4, "little"))
                ids.update(part.ids[start:stop].tobytes())
                ids.update(images)
        for truth in self._ground_truths():
            truths.update(json.dumps(truth, sort_keys=True, default=str).encode() + b"\n")
        hashes = {"prompts": ids.hexdigest(), "ground_truths": truths.hexdigest()}
        return {"rows": len(self), **hashes, "columns": sorted(self.columns)}

    def _ground_truths(self) -> Iterator[Any]:
        """Yield each prompt's ground truth, None if it has none."""
        for part in self._parts:
            names = [
                name for name in ground_truth_columns(self.ground_truth_key) if name in part.table.columns
            ]
            if not names:
                yield from [None] * len(part.rows)
                continue
            kept = np.zeros(len(part.table), dtype=bool)
            kept[part.rows] = True  # rows are in the order of the source
            columns = (
                zip(*values, strict=True) for values in zip(*map(part.table.column, names), strict=True)
            )
            for row in compress(chain.from_iterable(columns), kept):
                yield ground_truth_of(dict(zip(names, row, strict=True)), self.ground_truth_key)


def load_prompts(
    files: str | Sequence[str],
    splits: str | Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int,
    prompt_key: str = "prompt",
    ground_truth_key: str | None = None,
    data_source_key: str = DATA_SOURCE,
    tools_key: str | None = None,
    images: ImageProcessor | None = None,
    image_key: str = "images",
    template_kwargs: Mapping[str, Any] | None = None,
    vocabulary: int | None = None,
    filter_overlong: bool = False,
    truncation: Truncation = "error",
    max_samples: int | None = None,
    seed: int | None = None,
    console: Console | None = None,
) -> PromptSet:
    """Read datasets and tokenize all prompts.

    A chat is rendered with the tokenizer's chat template, up to the assistant's turn (see `ChatTemplate`), with the tool
    schemas in the column `tools_key` if a dataset has it. A string is tokenized as it is, as text that a base model
    continues: without a template, with the tokens that the tokenizer itself adds before a text. An end-of-sentence token
    that the tokenizer adds after it is removed, since the response would be over before it begins. `vocabulary` is the
    number of tokens that the model knows. If the model reads `images`, those of a row are in its column `image_key`, or parts
    of its chat; each is decoded once to find faults, and its tokens are counted. Of all rows together at most `max_samples` are used, if that is above 0: drawn with
    `seed` or, without one, the first. `filter_overlong` drops prompts of more than `max_prompt_length` tokens; otherwise `truncation` cuts off their
    beginning (`left`) or end (`right`). `prompt_key`, `ground_truth_key` and `data_source_key` are column names; see
    `iiverl_core.columns` for the ground truth without a key. `console`, by default standard error, gets a line per
    dataset, and a progress bar if it is a terminal.

    Raises:
        DataError: a dataset cannot be read or is empty, a named column is missing, a row has no valid prompt or one with
            a token that the model does not know, or prompts are too long or all dropped.
    """
    console = console or Console(stderr=True)
    names = [files] if isinstance(files, str) else files
    tables = load_tables(names, [splits] if isinstance(splits, str) else splits)
    for table in tables:
        _require_column(table, "data.prompt_key", prompt_key)
        if ground_truth_key is not None:
            _require_column(table, "data.ground_truth_key", ground_truth_key)
        if data_source_key != DATA_SOURCE:
            _require_column(table, "data.data_source_key", data_source_key)
    template = ChatTemplate(tokenizer, template_kwargs or {})
    reader = _ImageReader(images, image_key) if images else None
    used = _used_rows([len(table) for table in tables], max_samples or 0, seed)
    parts, shortest = [], []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def tokenize(table: Table, rows: np.ndarray, most: int) -> tuple[_TokenizedTable, int]:
            part, ended = _tokenize(
                table, _first(rows, most), prompt_key, tools_key, template, reader, progress
            )
            if vocabulary is not None:
                _check_tokens(part, tokenizer, vocabulary)
            if not filter_overlong:
                rigid = part if truncation == "error" else part.only(part.digests != b"")
                _check_lengths(rigid, max_prompt_length, int(np.count_nonzero(rows)), truncation)
            return part, ended

        for table, rows in zip(tables, used, strict=True):
            if np.count_nonzero(rows) > _MANY_ROWS:
                tokenize(table, rows, _FIRST_ROWS)
        for table, rows in zip(tables, used, strict=True):
            part, ended = tokenize(table, rows, len(rows))
            shortest += part.lengths.tolist()
            kept = part.only(part.lengths <= max_prompt_length) if filter_overlong else part
            console.print(
                _count(part, kept, max_prompt_length), markup=False, highlight=False, soft_wrap=True
            )
            if ended:
                console.print(_ended(table, ended, tokenizer), markup=False, highlight=False, soft_wrap=True)
            if images is None and any(_is_image(value) for value in _first_values(table, image_key)):
                line = f"{table.name}: the images in its column {image_key!r} are not used, since the model reads texts only"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
            parts.append(_truncate(kept, max_prompt_length, truncation))
    if not any(len(part.rows) for part in parts):
        raise DataError(
            f"Every prompt of {', '.join(table.name for table in tables)} is longer than {max_prompt_length} tokens, "
            f"and was dropped (data.filter_overlong_prompts).\nThe shortest has {min(shortest)}: "
            "raise data.max_prompt_length."
        )
    key = image_key if images else None
    return PromptSet(parts, tokenizer, prompt_key, ground_truth_key, data_source_key, key)


def _used_rows(sizes: Sequence[int], max_samples: int, seed: int | None) -> list[np.ndarray]:
    """Choose rows of concatenated datasets, whose sizes these are: at most `max_samples`, or all if that is not above 0.

    Returns a mask for each dataset.
    """
    total = sum(sizes)
    used = np.ones(total, dtype=bool)
    if 0 < max_samples < total:
        used[:] = np.arange(total) < max_samples
        if seed is not None:
            used = np.random.default_rng(seed).permutation(used)
    return np.split(used, np.cumsum(sizes)[:-1])


def _first(used: np.ndarray, most: int) -> np.ndarray:
    """Keep at most the first `most` true entries of a mask."""
    return used & (np.cumsum(used) <= most)


def _require_column(table: Table, key: str, column: str) -> None:
    if problem := missing_column(table.name, table.columns, key, column):
        raise DataError(problem)


@dataclass(frozen=True)
class _ImageReader:
    """Reads the images of prompts with a model's `processor`; they are in the column `key`, or parts of chats."""

    processor: ImageProcessor
    key: str

    rows_per_read = 64
    """Rows whose images are in memory at a time."""


def _first_values(table: Table, column: str) -> list[Any]:
    return next(table.column(column, 1), []) if column in table.columns else []


def _is_image(value: Any) -> bool:
    """Return whether a value of the image column looks like images, rather than anything else of that name."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, bytes) or (isinstance(first, Mapping) and bool({"bytes", "path"} & set(first)))


def _tokenize(
    table: Table,
    used: np.ndarray,
    prompt_key: str,
    tools_key: str | None,
    template: ChatTemplate,
    reader: _ImageReader | None,
    progress: Progress,
) -> tuple[_TokenizedTable, int]:
    """Tokenize the prompts of a dataset's `used` rows; also return how many ended with an end-of-sentence token."""
    task = progress.add_task(table.name, total=len(table))
    flat = array("i")
    lengths: list[int] = []
    ended = 0
    digests: list[bytes] = []
    size = reader.rows_per_read if reader else ROWS_PER_READ

    def column(name: str | None) -> Iterator[Any]:
        return table.column(name, size) if name in table.columns else repeat(repeat(None))

    pictures = column(reader.key if reader else None)
    eos = template.tokenizer.eos_token_id
    rows, read = np.flatnonzero(used), 0
    for prompts, *others in zip(table.column(prompt_key, size), column(tools_key), pictures, strict=False):
        chosen = [each for each in zip(count(read), prompts, *others, strict=False) if used[each[0]]]
        read += len(prompts)
        for ids, is_text, digest in _encode(chosen, table, template, reader):
            if ids[-1:] == [eos] and ids != [template.tokenizer.bos_token_id]:
                ended += 1
                ids = ids[:-1] if is_text else ids
            if not ids:
                place = place_of(table.name, int(rows[len(lengths)]))
                raise DataError(f"{place}: the prompt is empty.\nRemove the row, or fill it in.")
            flat.extend(ids)
            lengths.append(len(ids))
            digests.append(digest)
        progress.update(task, completed=read)
        if not len(rows) or read > rows[-1]:
            break
    progress.remove_task(task)
    stops = np.cumsum(lengths, dtype=np.int64)
    part = _TokenizedTable(
        table, np.asarray(flat), rows, stops - lengths, stops, np.array(digests, dtype=bytes)
    )
    return part, ended


def _encode(
    rows: Sequence[tuple[int, Any, Any, Any]],
    table: Table,
    template: ChatTemplate,
    reader: _ImageReader | None,
) -> Iterator[tuple[list[int], bool, bytes]]:
    """Encode a few rows: number, prompt, tools and images.

    Yield the ids of each prompt, whether it is a plain string, and a digest of its images, empty if it has none.

    A template writes its own special tokens; to a plain string the tokenizer adds its usual ones.
    """
    tokenizer = template.tokenizer
    texts: list[str] = []
    plain: list[bool] = []
    images: list[tuple[bytes, ...]] = []
    for row, value, schemas, column in rows:
        with _at(table, row):
            parts = [] if reader else None
            prompt = as_prompt(value, parts)
            if not isinstance(prompt, str):
                _require_template(table, tokenizer)
            images.append(images_of(prompt, parts or (), column, table.folder) if reader else ())
            if reader and images[-1]:
                prompt = _with_images(prompt, reader.processor)
            texts.append(template.render(prompt, schemas))
        plain.append(isinstance(prompt, str))
    if not texts:
        return
    if all(plain):
        encoded = tokenizer(texts, verbose=False)["input_ids"]
    else:
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for i in range(len(texts)):
            if plain[i]:
                encoded[i] = tokenizer(texts[i], verbose=False)["input_ids"]
    for i, counts in enumerate(_image_tokens(images, [row for row, *_ in rows], table, reader)):
        with _at(table, rows[i][0]):
            ids = reader.processor.expand(encoded[i], counts) if reader and images[i] else encoded[i]
        yield one_start(ids, tokenizer), plain[i], _digest(images[i])


@contextmanager
def _at(table: Table, row: int) -> Iterator[None]:
    """Turn a `PromptError` into a `DataError` that names the row."""
    try:
        yield
    except PromptError as error:
        raise DataError(
            f"{place_of(table.name, row)}: the prompt {error}.\nFix the row or remove it."
        ) from error


def _with_images(prompt: str | Messages, processor: ImageProcessor) -> str | Messages:
    """Write a prompt as the chat template takes it or, if it is a string, as the template would write its images."""
    return (
        prompt.replace(IMAGE, processor.text_of_image)
        if isinstance(prompt, str)
        else with_image_parts(prompt)
    )


def _image_tokens(
    images: Sequence[Sequence[bytes]], rows: Sequence[int], table: Table, reader: _ImageReader | None
) -> Iterator[list[int]]:
    """Check the images of each row, several at a time, and yield the number of tokens of each."""
    if reader is None or not any(images):
        yield from ([] for _ in images)
        return
    with ThreadPoolExecutor() as threads:
        counts = threads.map(reader.processor.count_tokens, chain.from_iterable(images))
        for row, each in zip(rows, images, strict=True):
            with _at(table, row):
                found = list(islice(counts, len(each)))
            yield found


def _digest(images: Sequence[bytes]) -> bytes:
    """Return a digest of images without zero bytes, which arrays of bytes drop at the end; empty without images."""
    if not images:
        return b""
    whole = hashlib.blake2b(digest_size=16)
    for image in images:
        whole.update(len(image).to_bytes(8, "little"))
        whole.update(image)
    return whole.hexdigest().encode()


def _check_tokens(part: _TokenizedTable, tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> None:
    """Check that the model has an embedding for every token; raises DataError for the first that it has not."""
    unknown = np.flatnonzero(part.ids >= vocabulary)
    if len(unknown):
        id = int(part.ids[unknown[0]])
        row = int(part.rows[np.searchsorted(part.stops, unknown[0], side="right")])
        raise DataError(
            f"{place_of(part.table.name, row)}: the prompt has the token {tokenizer.convert_ids_to_tokens(id)!r} with id "
            f"{id}, and the model knows only ids below {vocabulary}.\nThe tokenizer belongs to another model, or tokens were "
            "added to it: set data.tokenizer to the model's own, or resize the model's embedding."
        )


def _ended(table: Table, count: int, tokenizer: "PreTrainedTokenizerBase") -> str:
    return (
        f"{table.name}: {count} prompt{'s' * (count != 1)} ended with the end-of-sentence token {tokenizer.eos_token!r}. "
        "It is removed from plain strings, which a response continues; in a chat it is the chat template's."
    )


def _require_template(table: Table, tokenizer: "PreTrainedTokenizerBase") -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"The prompts of {table.name} are chats, and the tokenizer {tokenizer.name_or_path} has no chat template.\n"
            "Set data.tokenizer to the tokenizer of an instruct model of the same family, or save one with a "
            "chat_template; or use plain strings as prompts, which need none."
        )


def _check_lengths(part: _TokenizedTable, limit: int, rows: int, truncation: Truncation) -> None:
    """Check that no prompt has more than `limit` tokens; raises DataError.

    `part` has the first of `rows` prompts, or all, or those that cannot be truncated.
    """
    overlong = np.flatnonzero(part.lengths > limit)
    if not len(overlong):
        return
    first, longest = part.lengths[overlong[0]], part.lengths.max()
    of = f"{len(part.rows)} prompts" if len(part.rows) == rows else f"the first {len(part.rows)} prompts"
    truncate = ", or truncate them (data.truncation: left or right)"
    if part.digests[overlong[0]]:
        truncate = ", or lower data.max_pixels; prompts with images are never truncated"
        of = f"{len(part.rows)} prompts with images" if truncation != "error" else of
    raise DataError(
        f"{place_of(part.table.name, int(part.rows[overlong[0]]))}: the prompt has {first} tokens, and "
        f"data.max_prompt_length is {limit}. {len(overlong)} of {of} are too long; the longest "
        f"has {longest} tokens.\nRaise data.max_prompt_length, or drop such prompts (data.filter_overlong_prompts: "
        f"true){truncate}."
    )


def _truncate(part: _TokenizedTable, limit: int, truncation: Truncation) -> _TokenizedTable:
    starts = np.maximum(part.starts, part.stops - limit) if truncation == "left" else part.starts
    stops = np.minimum(part.stops, part.starts + limit) if truncation == "right" else part.stops
    return replace(part, starts=starts, stops=stops)


def _count(read: _TokenizedTable, kept: _TokenizedTable, limit: int) -> str:
    dropped = len(read.rows) - len(kept.rows)
    tail = f", {dropped} longer than {limit} tokens dropped" if dropped else ""
    count = f"{len(read.rows)} prompt{'s' if len(read.rows) != 1 else ''}"
    if len(read.rows) < len(read.table):
        count = f"{len(read.rows)} of {len(read.table)} prompts"
    return f"{read.table.name}: {count}{tail}"
