"""Checks that local data files have what the run reads: columns, prompts, ground truths and enough rows.

Only columns and the first rows are read. The other rows, and datasets on the Hub, are checked when they are loaded, by a
run or by `iiverl validate --deep`.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from iiverl_core.columns import (
    DATA_SOURCE,
    ground_truth_columns,
    ground_truth_of,
    is_given,
    missing_column,
    no_ground_truth,
)
from iiverl_core.config.checks.check import Checks, ConfigView, lookup_hint, path_exists
from iiverl_core.config.prompt_lengths import first_too_long
from iiverl_core.config.sections.section import AGENT_LOOP
from iiverl_core.data_files import HEAD_ROWS, Head, hub_dataset, read_head
from iiverl_core.errors import DataError
from iiverl_core.python_files import static_signature
from iiverl_core.registry import ROLLOUTERS
from iiverl_core.registry.rewards import MANAGER_KEY

checks = Checks()

TRAIN, VAL = "data.train_files", "data.val_files"
SPLITS = {TRAIN: "data.train_split", VAL: "data.val_split"}
PROMPT, TRUTH, SOURCE = "data.prompt_key", "data.ground_truth_key", "data.data_source_key"
BATCH, GENERATED, FILTERED = "data.train_batch_size", "data.gen_batch_size", "algorithm.filter_groups.enable"
STEPS, SAMPLES = "trainer.total_training_steps", "data.train_max_samples"
LENGTH, FILTER, TRUNCATION = "data.max_prompt_length", "data.filter_overlong_prompts", "data.truncation"
TOKENIZER, MODEL_PATH = "data.tokenizer", "actor_rollout_ref.model.path"
VALIDATES = ("trainer.test_freq", "trainer.val_before_train", "trainer.val_only")
TEMPLATE, TOOLS = "data.apply_chat_template_kwargs", "data.tools_key"
FUNCTIONS = "actor_rollout_ref.rollout.multi_turn.tools"
TEMPLATE_RESERVED = (
    "conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict",
)  # fmt: skip
"""Arguments of `apply_chat_template` that depend on the prompt."""
SERVER, COLUMN, PROTOCOL = "reward_api.enable", "reward_api.verification_info_column", "reward_api.protocol"
FUNCTION, FUNCTION_NAME, MODEL = (
    "custom_reward_function.path",
    "custom_reward_function.name",
    "reward_model.enable",
)
NO_INFO = ("openrlhf", "slime")
"""Protocols that do not send verification info."""


def _names(view: ConfigView, files: str) -> tuple[str, ...]:
    """Return the sources listed by a key that the run reads."""
    if files == VAL and not any((view[VALIDATES[0]] > 0, view[VALIDATES[1]], view[VALIDATES[2]])):
        return ()
    return view[files] or ()


def _heads(view: ConfigView, files: str) -> Iterator[tuple[str, Head | DataError | None]]:
    """Read the first rows of each source; the error if that fails, None if it is not a local file."""
    names, splits = _names(view, files), view[SPLITS[files]]
    splits = splits * len(names) if len(splits) == 1 else splits
    columns = (view[PROMPT], view[SOURCE], view[COLUMN], *ground_truth_columns(view[TRUTH]))
    columns += (view[TOOLS],) if view[TOOLS] else ()
    for name, split in zip(names, splits, strict=False):
        yield name, _head(name, split, columns, _needed(view)[1], _stamp(name))


@lru_cache(maxsize=64)
def _head(
    name: str, split: str, columns: tuple[str, ...], enough: int, stamp: tuple[int, ...] | None
) -> Head | DataError | None:
    """Read the head of a source once for all checks; `stamp` changes with the source."""
    try:
        return read_head(name, split, columns, enough) if stamp else None
    except DataError as error:
        return error


def _stamp(name: str) -> tuple[int, ...] | None:
    try:
        found = Path(name).stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _needed(view: ConfigView) -> tuple[str, int]:
    """Return the number of prompts that the run needs to make a step, and the key that sets it.

    Steps are counted in batches of `train_batch_size`, although a filtered step is filled by smaller ones.
    """
    keys = [BATCH] if not view[FILTERED] or view[STEPS] is None else []
    keys += [GENERATED] if view[FILTERED] and view.is_set(GENERATED) else []
    key = max(keys or [BATCH], key=lambda key: view[key])
    return key, view[key]


def _one_line(message: object) -> str:
    return " ".join(str(message).split("\n")).rstrip(".")


def _check_files(files: str) -> None:
    reads = (files, SPLITS[files])
    columns = (PROMPT, TRUTH, SOURCE, COLUMN, TOOLS, BATCH, GENERATED, FILTERED, STEPS)

    @checks.add("C901", "input", *reads)
    def files_exist(view: ConfigView) -> str | None:
        absent = [
            name
            for name in _names(view, files)
            if not path_exists(Path.exists, name) and hub_dataset(name) is None
        ]
        if not absent:
            return None
        default = "" if view.is_set(files) else " (the default)"
        return f"not found: {', '.join(absent)}{default}{lookup_hint(view, absent)}"

    @checks.add("C910", "input", *reads, *columns)
    def files_can_be_read(view: ConfigView) -> str | None:
        wrong = [head for _, head in _heads(view, files) if isinstance(head, DataError)]
        return _one_line(wrong[0]) if wrong else None

    def check_column(key: str, named: Callable[[ConfigView], str | None]) -> None:
        @checks.add("C911", "input", key, *reads, *columns)
        def column_exists(view: ConfigView) -> str | None:
            column = named(view)
            if column is None:
                return None
            for name, head in _heads(view, files):
                if not isinstance(head, Head) or (not head.complete and key != PROMPT):
                    continue
                if problem := missing_column(name, head.columns, key, column):
                    return _one_line(problem)
            return None

    check_column(PROMPT, lambda view: view[PROMPT])
    check_column(TRUTH, lambda view: view[TRUTH])
    check_column(SOURCE, lambda view: view[SOURCE] if view[SOURCE] != DATA_SOURCE else None)

    @checks.add("C912", "input", PROMPT, *reads, *columns)
    def rows_have_prompts(view: ConfigView) -> str | None:
        for name, head in _heads(view, files):
            if not isinstance(head, Head) or view[PROMPT] not in head.columns:
                continue
            for number, row in enumerate(head.rows):
                prompt = row.get(view[PROMPT])
                if not prompt or not isinstance(prompt, str | list | dict):
                    kind = "is empty" if not prompt else f"is of type {type(prompt).__name__}"
                    return (
                        f"{name}, row {number} (the first is 0): the prompt {kind}; a prompt is a string, or a chat, a list of "
                        "{role, content}"
                    )
        return None

    @checks.add("C902", "input", LENGTH, FILTER, TRUNCATION, TOKENIZER, MODEL_PATH, PROMPT, *reads, *columns)
    def first_prompts_are_short_enough(view: ConfigView) -> str | None:
        """Prompts of all rows are counted once the tokenizer is loaded, which takes seconds."""
        if view[FILTER] or view[TRUNCATION] != "error":
            return None
        for name, head in _heads(view, files):
            rows = head.rows if isinstance(head, Head) else ()
            found = first_too_long(view[TOKENIZER] or view[MODEL_PATH], rows, view[PROMPT], view[LENGTH])
            if found:
                return (
                    f"{name}, row {found[0]} (the first is 0): the prompt has at least {found[1]} tokens, and {LENGTH} is "
                    f"{view[LENGTH]}; raise it, or drop such prompts ({FILTER}: true), or truncate them ({TRUNCATION}: "
                    "left or right)"
                )
        return None

    def without_ground_truth(view: ConfigView) -> tuple[str | None, list[tuple[str, Head]]]:
        """Return what reads the ground truth, and the sources if none of the rows read has one."""
        reader, heads = _truth_reader(view), list(_heads(view, files))
        known = [(name, head) for name, head in heads if isinstance(head, Head)]
        named = view[TRUTH]
        if named and any(head.complete and named not in head.columns for _, head in known):
            return reader, []  # a missing column is reported by another check
        seen = any(is_given(ground_truth_of(row, view[TRUTH])) for _, head in known for row in head.rows)
        return reader, known if reader and heads and len(known) == len(heads) and not seen else []

    truths = (TRUTH, *reads, *columns, FUNCTION, FUNCTION_NAME, SERVER, MODEL, MANAGER_KEY, AGENT_LOOP)

    @checks.add("C913", "input", *truths)
    def there_are_ground_truths(view: ConfigView) -> str | None:
        reader, heads = without_ground_truth(view)
        if not heads or not all(_has_none(head, view[TRUTH]) for _, head in heads):
            return None
        return _no_truth(view, reader, heads)

    @checks.add("C914", "warning", *truths)
    def first_rows_have_ground_truths(view: ConfigView) -> str | None:
        reader, heads = without_ground_truth(view)
        if not heads or all(_has_none(head, view[TRUTH]) for _, head in heads):
            return None
        return f"in the first {HEAD_ROWS} rows: {_no_truth(view, reader, heads)}"

    @checks.add("C915", "input", COLUMN, *reads, *columns, SERVER, PROTOCOL)
    def server_is_sent_its_column(view: ConfigView) -> str | None:
        if not view[SERVER] or view[PROTOCOL] in NO_INFO:
            return None
        for name, head in _heads(view, files):
            if isinstance(head, Head) and (view[COLUMN] not in head.columns):
                there = ", ".join(column for column in head.columns if column != view[PROMPT])
                return f"{name} has no column {view[COLUMN]!r} to send to the reward server; it has {there}"
        return None

    @checks.add("C925", "warning", TOOLS, AGENT_LOOP, *reads, *columns)
    def tools_of_rows_are_used(view: ConfigView) -> str | None:
        if ROLLOUTERS[view[AGENT_LOOP]].name != "tools" or not view[TOOLS]:
            return None
        for name, head in _heads(view, files):
            if isinstance(head, Head) and any(row.get(view[TOOLS]) for row in head.rows):
                return (
                    f"the column {view[TOOLS]!r} of {name} is not used: the model is offered the functions of "
                    f"{FUNCTIONS}, the same for all rows"
                )
        return None

    @checks.add("C904", "error", SPLITS[files], files)
    def a_split_for_each(view: ConfigView) -> str | None:
        many, wanted = len(view[SPLITS[files]]), len(view[files] or ())
        if many in (1, wanted) or not wanted:
            return None
        return f"{many} splits for {wanted} datasets in {files}; set one for all of them, or one for each"


def _has_none(head: Head, key: str | None) -> bool:
    """Return whether no row can have a ground truth, although only the first rows were read."""
    columns = ground_truth_columns(key)
    all_seen = len(head.rows) == head.count
    return all_seen or (head.complete and not any(column in head.columns for column in columns))


def _no_truth(view: ConfigView, reader: str | None, heads: list[tuple[str, Head]]) -> str:
    names = ", ".join(name for name, _ in heads)
    columns = dict.fromkeys(column for _, head in heads for column in head.columns)
    function = reader if view[FUNCTION] else None
    return _one_line(no_ground_truth(names, columns, view[PROMPT], view[TRUTH], function))


def _truth_reader(view: ConfigView) -> str | None:
    """Name what reads the ground truth; None if nothing does or if that depends on running the user's file."""
    if view[SERVER]:
        return None
    if view[FUNCTION]:
        signature = static_signature(view[FUNCTION], view[FUNCTION_NAME])
        return view[FUNCTION_NAME] if signature and "ground_truth" in signature.parameters else None
    source = view.config.reward_source
    return "the built-in rules" if source is not None and source.name == "rules" else None


_check_files(TRAIN)
_check_files(VAL)


@checks.add("C903", "warning", VAL, TRAIN, "data.train_split", "data.val_split")
def _validation_is_unseen(view: ConfigView) -> str | None:
    shared = [name for name in view[VAL] or () if name in view[TRAIN] and path_exists(Path.is_file, name)]
    return f"{shared[0]} is also used for training" if shared else None


@checks.add(
    "C916",
    "input",
    BATCH,
    TRAIN,
    SAMPLES,
    GENERATED,
    FILTERED,
    STEPS,
    SPLITS[TRAIN],
    PROMPT,
    TRUTH,
    SOURCE,
    COLUMN,
    TOOLS,
)
def _a_step_has_rows(view: ConfigView) -> str | None:
    most, (key, needed) = view[SAMPLES] or 0, _needed(view)
    if 0 < most < needed:
        return f"{SAMPLES} ({most}) is below the prompts of a step ({key}: {needed}); raise it, or set {key} to at most {most}"
    heads = [head for _, head in _heads(view, TRAIN)]
    rows = sum(head.count for head in heads if isinstance(head, Head))
    if rows >= needed or not all(isinstance(head, Head) for head in heads):
        return None
    return f"{TRAIN} has {rows} row{'s' * (rows != 1)}, fewer than a step needs ({key}: {needed}); set {key} to at most {rows}"


@checks.add("C918", "error", TEMPLATE, TOOLS)
def _template_variables_are_free(view: ConfigView) -> str | None:
    taken = [name for name in view[TEMPLATE] if name in TEMPLATE_RESERVED]
    if not taken:
        return None
    hint = f"; tools are read from the column that {TOOLS} names" if "tools" in taken else ""
    return f"{', '.join(taken)} cannot be set here: each prompt has its own{hint}"
