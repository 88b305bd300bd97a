"""The rollouts of coming steps in a checkpoint: their text and outcomes as JSON, and the token arrays beside them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from iiverl_core.controller.collector import StepData
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import PromptSet
from iiverl_core.errors import CheckpointError
from iiverl_core.samples import Handle, Prompt, Rollout

ROLLOUTS_FILE, SEQUENCES_FILE = "rollouts.json", "rollouts.safetensors"

_STEPS = TypeAdapter(list[StepData], config=ConfigDict(ser_json_inf_nan="constants"))


def write_rollouts(folder: Path, steps: Sequence[StepData], workers: WorkerClient) -> None:
    """Write the rollouts of coming steps to a checkpoint's folder; nothing if there are no such steps.

    A prompt is written as its row, since a checkpoint belongs to one dataset.

    Raises:
        CheckpointError: the token arrays cannot be written.
        OSError: the other file cannot be written.
    """
    if not steps:
        return
    written = [replace(step, rollouts=[_to_write(each) for each in step.rollouts]) for step in steps]
    (folder / ROLLOUTS_FILE).write_bytes(_STEPS.dump_json(written, fallback=str))
    sequences = [each for step in steps for rollout in step.rollouts for each in rollout.sequences]
    workers.write_sequences(folder / SEQUENCES_FILE, sequences)


def read_rollouts(folder: Path, prompts: PromptSet, workers: WorkerClient) -> list[StepData]:
    """Read what `write_rollouts` wrote, and put the token arrays into the store.

    Raises:
        CheckpointError: a file cannot be read.
    """
    path = folder / ROLLOUTS_FILE
    if not path.exists():
        return []
    handles = iter(workers.read_sequences(folder / SEQUENCES_FILE))
    try:
        steps = _STEPS.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return [
        replace(step, rollouts=[_as_read(each, prompts, handles) for each in step.rollouts]) for step in steps
    ]


def _to_write(rollout: Rollout) -> Rollout:
    row = Prompt(rollout.prompt.row, (), "")
    sequences = tuple(replace(each, tokens=Handle(None)) for each in rollout.sequences)
    return replace(rollout, prompt=row, sequences=sequences)


def _as_read(rollout: Rollout, prompts: PromptSet, handles: Iterator[Handle]) -> Rollout:
    own = islice(handles, len(rollout.sequences))
    sequences = tuple(each.stored_at(handle) for each, handle in zip(rollout.sequences, own, strict=True))
    return replace(rollout, prompt=prompts[rollout.prompt.row], sequences=sequences)
