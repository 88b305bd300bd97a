"""The rollouts that a run recorded beside its samples, in place of an engine that generates them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from iiverl_core.config import RunConfig
from iiverl_core.controller.batch import epoch_order, mini_batch_groups
from iiverl_core.controller.collector import StepData, advance
from iiverl_core.controller.saved_rollouts import ROLLOUTS_SUFFIX, read_rollouts
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import PromptSet
from iiverl_core.errors import CheckpointError
from iiverl_core.samples import Rollout


def recorded_steps(folders: Sequence[Path]) -> dict[int, Path]:
    """Find the steps whose rollouts are recorded, and the folder of each; earlier folders come first."""
    return {
        int(path.stem): folder
        for folder in reversed(folders)
        for path in folder.glob(f"*{ROLLOUTS_SUFFIX}")
        if path.stem.isdigit()
    }


class RecordedRollouts:
    """Gives the trainer the rollouts of each step from disk. Implements `StepRollouts`.

    `folders` has the folder of each step, and `saved` rollouts that the checkpoint held, which `state` includes already.
    """

    def __init__(
        self,
        run: RunConfig,
        folders: Mapping[int, Path],
        prompts: PromptSet,
        workers: WorkerClient,
        state: TrainState,
        saved: Sequence[StepData] = (),
    ) -> None:
        self._run, self._folders, self._prompts = run, folders, prompts
        self._workers, self._state = workers, state
        self._saved = {data.step: data for data in saved}

    def start(self) -> None:
        """Do nothing."""

    def stream(self, step: int) -> Iterator[StepData]:
        """Read the rollouts of a step, and yield them in the parts in which the run trained on them.

        With another configuration, in which these are not the mini-batches or depend on one another, they come together.

        Raises:
            CheckpointError: they are not there, or cannot be read.
        """
        data = self._saved.pop(step, None)
        if step in self._folders:
            (recorded,) = read_rollouts(self._folders[step], self._prompts, self._workers, str(step))
            if data is None:
                advance(self._state, recorded)
            data = recorded
        if data is None:
            raise CheckpointError(f"the rollouts of step {step} are not recorded")
        yield from (data if self._has_its_parts(data) else replace(data, parts=[])).cut()

    def _has_its_parts(self, data: StepData) -> bool:
        order = epoch_order(self._run, "actor", data.step, 0)
        size = self._run.training("actor").mini_batch_size
        batches = mini_batch_groups(range(self._run.data.train_batch_size), size, order)
        return self._run.has_independent_mini_batches and all(part in batches for part in data.parts)

    def trained(self, step: int) -> dict[str, float]:
        """Return no metrics, since no engine gets weights."""
        return {}

    def validate(self, step: int) -> list[Rollout]:
        """Return no responses, since there is no engine."""
        return []

    def checkpoint(self) -> tuple[TrainState, list[StepData]]:
        """Return the state to save, and the rollouts that it includes already."""
        return replace(self._state), [self._saved[step] for step in sorted(self._saved)]
