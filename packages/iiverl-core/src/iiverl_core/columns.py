"""Find the ground truth and the `extra_info` of a reward in the columns of a dataset."""

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

DATA_SOURCE, REWARD_MODEL, GROUND_TRUTH, EXTRA_INFO = (
    "data_source", "reward_model", "ground_truth", "extra_info",
)  # fmt: skip

IMAGE = "<image>"
"""Stands for an image in the text of a prompt, as in datasets made for II-VERL and verl."""

HOLDS = {
    "data.prompt_key": "the prompt",
    "data.ground_truth_key": "the ground truth",
    "data.data_source_key": "the data source",
}
"""The contents of the columns, by the key that names the column."""

USUAL = ("answer", "solution", "final_answer", "label", "target", "gold", "expected", "reference", "response")
"""Names that datasets often use for the ground truth, the most likely first."""


def ground_truth_columns(key: str | None) -> tuple[str, ...]:
    """List the columns that may have the ground truth, given `data.ground_truth_key`."""
    return (key,) if key else (REWARD_MODEL, GROUND_TRUTH)


def ground_truth_of(row: Mapping[str, Any], key: str | None) -> Any:
    """Read the ground truth of a row; None if it has none.

    That is the column `key` (`data.ground_truth_key`). If `key` is None, it is `reward_model.ground_truth`, as in datasets
    made for verl, or else the column `ground_truth`.
    """
    if key:
        return without_nulls(row.get(key))
    if _holds_ground_truth(row.get(REWARD_MODEL)):
        return without_nulls(row[REWARD_MODEL][GROUND_TRUTH])
    return without_nulls(row.get(GROUND_TRUTH))


def pop_ground_truth(columns: dict[str, Any], key: str | None) -> Any:
    """Remove the ground truth from a row and return it; verl's `reward_model` stays, since it may have more fields."""
    truth = ground_truth_of(columns, key)
    if key or not _holds_ground_truth(columns.get(REWARD_MODEL)):
        columns.pop(key or GROUND_TRUTH, None)
    return truth


def verification_info_of(columns: Mapping[str, Any], column: str) -> Any:
    """Read what a row sends to a reward server; an empty string if it has nothing."""
    return without_nulls(columns.get(column)) or ""


def without_nulls(value: Any) -> Any:
    """Return a value without the fields that are None, at any depth; items of lists stay.

    In columns of structs, all rows have the same fields, and those that a row was written without are null.
    """
    if isinstance(value, Mapping):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def is_given(ground_truth: Any) -> bool:
    """Return whether there is a ground truth: neither None nor the empty string of an empty CSV cell."""
    return ground_truth is not None and ground_truth != ""


def extra_info_of(columns: Mapping[str, Any]) -> Any:
    """Build the `extra_info` of a reward function from the remaining columns of a row.

    It has the fields of the row's own `extra_info` and every other column; fields override columns of the same name.
    verl's `reward_model` is left out, since the ground truth is a separate argument. An `extra_info` that is not a dict is
    returned unchanged; None if there is nothing to return.
    """
    own = columns.get(EXTRA_INFO)
    if own is not None and not isinstance(own, Mapping):
        return own
    others = {
        name: value
        for name, value in columns.items()
        if name != EXTRA_INFO and not (name == REWARD_MODEL and _holds_ground_truth(value))
    }
    return {**others, **(own or {})} if others or own is not None else None


def missing_column(name: str, columns: Collection[str], key: str, column: str) -> str | None:
    """Explain that the dataset `name` has no column `column`, the value of `key`; None if it has."""
    if column in columns:
        return None
    near = get_close_matches(column, columns, n=1)
    return (
        f"{name} has no column {column!r}{f'; did you mean {near[0]!r}?' if near else '.'}\n"
        f"It has: {', '.join(columns)}. Set {key} to the column with {HOLDS[key]}."
    )


def no_ground_truth(
    name: str, columns: Iterable[str], prompt_key: str, key: str | None, function: str | None
) -> str:
    """Explain that no row of the dataset `name` has a ground truth, which columns there are, and which key to set.

    `function` is the user function that needs one; None for the built-in rules.
    """
    names = [column for column in columns if column != prompt_key]
    needs = f"the function {function} needs" if function else "the built-in rules need"
    there = f"The other columns are {', '.join(names)}" if names else "The prompt is the only column"
    likely = _likely([column for column in names if column != key])
    such_as = f", such as {likely}" if likely else ""
    unneeded = (
        " If the function needs none, replace its parameter ground_truth by **kwargs." if function else ""
    )
    return (
        f"no row of {name} has a ground truth, which {needs}.\n{there}; set data.ground_truth_key to the column with the "
        f"ground truth{such_as}.{unneeded}"
    )


def _likely(names: Collection[str]) -> str | None:
    by_lower_case = {name.lower(): name for name in names}
    return next((by_lower_case[name] for name in USUAL if name in by_lower_case), None)


def _holds_ground_truth(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get(GROUND_TRUTH) is not None
