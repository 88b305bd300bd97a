"""The rollouts of steps on disk: their text and outcomes as JSON, and the token arrays in a file beside it.

A checkpoint has those of steps to come. Beside the samples of a step are those that it was computed from, so that it can
be computed again (`recorded_rollouts`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from iiverl_core.controller.collector import StepData
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import PromptSet
from iiverl_core.errors import CheckpointError
from iiverl_core.samples import Handle, Prompt, Rollout, SequenceRef
from iiverl_core.sequence_files import SEQUENCES_SUFFIX

ROLLOUTS = "rollouts"
"""Name of the files in a checkpoint, without their suffixes."""
ROLLOUTS_SUFFIX = ".json"

_STEPS = TypeAdapter(
    list[StepData],
    config=ConfigDict(ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64"),
)


def write_rollouts(
    folder: Path,
    steps: Sequence[StepData],
    workers: WorkerClient,
    name: str = ROLLOUTS,
    computed: Mapping[int, SequenceRef] | None = None,
) -> None:
    """Write the rollouts of steps to `{folder}/{name}.json`, and their tokens beside it; nothing without steps.

    A prompt is written as its row, since a run has one dataset. `computed` has, by position among all sequences, those
    with arrays that were computed for them, which are written with the tokens. The JSON comes last: if it is there, both
    files are whole.

    Raises:
        CheckpointError: the token arrays cannot be written.
        OSError: the other file cannot be written.
    """
    if not steps:
        return
    sequences = sequences_of(steps)
    workers.write_sequences(folder / f"{name}{SEQUENCES_SUFFIX}", sequences, computed)
    written = [replace(step, rollouts=[_to_write(each) for each in step.rollouts]) for step in steps]
    path = folder / f"{name}{ROLLOUTS_SUFFIX}"
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_bytes(_STEPS.dump_json(written, fallback=str))
    unfinished.replace(path)


def sequences_of(steps: Sequence[StepData]) -> list[SequenceRef]:
    """List the sequences of steps in the order in which they are written."""
    return [each for step in steps for rollout in step.rollouts for each in rollout.sequences]


def read_rollouts(
    folder: Path, prompts: PromptSet, workers: WorkerClient, name: str = ROLLOUTS
) -> list[StepData]:
    """Read what `write_rollouts` wrote, and put the token arrays into the store.

    Raises:
        CheckpointError: a file cannot be read.
    """
    path = folder / f"{name}{ROLLOUTS_SUFFIX}"
    if not path.exists():
        return []
    handles = iter(workers.read_sequences(folder / f"{name}{SEQUENCES_SUFFIX}"))
    try:
        steps = _STEPS.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return [
        replace(step, rollouts=[_as_read(each, prompts, handles) for each in step.rollouts]) for step in steps
    ]


def _to_write(rollout: Rollout) -> Rollout:
    row = Prompt(rollout.prompt.row, (), "")
    sequences = tuple(replace(each, tokens=Handle(None), arrays={}) for each in rollout.sequences)
    return replace(rollout, prompt=row, sequences=sequences)


def _as_read(rollout: Rollout, prompts: PromptSet, handles: Iterator[Handle]) -> Rollout:
    own = islice(handles, len(rollout.sequences))
    sequences = tuple(each.stored_at(handle) for each, handle in zip(rollout.sequences, own, strict=True))
    return replace(rollout, prompt=prompts[rollout.prompt.row], sequences=sequences)
