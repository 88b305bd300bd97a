"""What the columns of a dataset mean to a reward: where a row's ground truth is, and what reaches `extra_info`."""

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

DATA_SOURCE, REWARD_MODEL, GROUND_TRUTH, EXTRA_INFO = (
    "data_source", "reward_model", "ground_truth", "extra_info",
)  # fmt: skip

HOLDS = {
    "data.prompt_key": "the prompt",
    "data.ground_truth_key": "the ground truth",
    "data.data_source_key": "the data source",
}
"""What the column holds that a key names."""

USUAL = ("answer", "solution", "final_answer", "label", "target", "gold", "expected", "reference", "response")
"""Names under which datasets often keep what is the ground truth here, likeliest first."""


def ground_truth_columns(key: str | None) -> tuple[str, ...]:
    """Name the columns that may hold a row's ground truth, given `data.ground_truth_key`."""
    return (key,) if key else (REWARD_MODEL, GROUND_TRUTH)


def ground_truth_of(row: Mapping[str, Any], key: str | None) -> Any:
    """Read the ground truth of a row; None if it has none.

    It is the column `key` (`data.ground_truth_key`). If that is None, it is `reward_model.ground_truth`, as verl writes
    it, and otherwise the column `ground_truth`.
    """
    if key:
        return row.get(key)
    if _holds_ground_truth(row.get(REWARD_MODEL)):
        return row[REWARD_MODEL][GROUND_TRUTH]
    return row.get(GROUND_TRUTH)


def pop_ground_truth(columns: dict[str, Any], key: str | None) -> Any:
    """Take the ground truth out of a row's columns; verl's `reward_model` stays, since it may hold more."""
    truth = ground_truth_of(columns, key)
    if key or not _holds_ground_truth(columns.get(REWARD_MODEL)):
        columns.pop(key or GROUND_TRUTH, None)
    return truth


def is_given(ground_truth: Any) -> bool:
    """Whether a ground truth says anything: it is neither None nor the empty text of a CSV file's empty cell."""
    return ground_truth is not None and ground_truth != ""


def extra_info_of(columns: Mapping[str, Any]) -> Any:
    """Make the `extra_info` of a reward function from the columns that remain of a row.

    It is the row's own `extra_info` with every other column beside its fields, which win over columns of the same name.
    verl's `reward_model` is left out, since its ground truth is given by itself. An `extra_info` that is not a dict is
    returned as it is; None if there is nothing to return.
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
    """Say that the source `name` lacks the column that the configuration's `key` names; None if it has it."""
    if column in columns:
        return None
    near = get_close_matches(column, columns, n=1)
    return (
        f"{name} has no column {column!r}{f'; did you mean {near[0]!r}?' if near else '.'}\n"
        f"It has: {', '.join(columns)}. Set {key} to the one that holds {HOLDS[key]}."
    )


def no_ground_truth(
    name: str, columns: Iterable[str], prompt_key: str, key: str | None, function: str | None
) -> str:
    """Say that no row of the source `name` has a ground truth, which columns there are, and which key to set.

    `function` is the user's function that takes one; None for the built-in rules.
    """
    names = [column for column in columns if column != prompt_key]
    takes = f"the function {function} takes" if function else "the built-in rules take"
    there = (
        f"The columns beside the prompt are {', '.join(names)}" if names else "The prompt is the only column"
    )
    likely = _likely([column for column in names if column != key])
    such_as = f", such as {likely}" if likely else ""
    none_needed = (
        " A function that needs none leaves ground_truth out of its parameters and ends them with **kwargs."
        if function
        else ""
    )
    return (
        f"no row of {name} has a ground truth, which {takes}.\n{there}; set data.ground_truth_key to the one that holds "
        f"it{such_as}.{none_needed}"
    )


def _likely(names: Collection[str]) -> str | None:
    by_lower_case = {name.lower(): name for name in names}
    return next((by_lower_case[name] for name in USUAL if name in by_lower_case), None)


def _holds_ground_truth(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get(GROUND_TRUTH) is not None
