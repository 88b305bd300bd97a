"""Write what a training step is computed from, so that it can be computed again (`replay`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from iiverl_core.config import RunConfig
from iiverl_core.controller.collector import StepData
from iiverl_core.controller.observer import Observer, StepRecord
from iiverl_core.controller.saved_rollouts import sequences_of, write_rollouts
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import PromptSet
from iiverl_core.errors import IIVerlError, NonFiniteError
from iiverl_core.samples import SequenceRef

NONFINITE = "nonfinite"
"""Folder in the run's folder for a step that produced NaN or infinity."""
RECORDED = ("advantages", "old_log_probs")
"""Arrays of a step's sequences that are recorded with their tokens, to be looked at."""


class StepRecorder:
    """Writes the rollouts and tokens of steps, but none with images: the pixels of a step's sequences may take gigabytes."""

    def __init__(self, run: RunConfig, workers: WorkerClient, observer: Observer, prompts: PromptSet) -> None:
        self._run, self._workers, self._observer, self._prompts = run, workers, observer, prompts

    @property
    def enabled(self) -> bool:
        """Whether every step is recorded."""
        return bool(self._run.trainer.rollout_data_dir) and self._run.trainer.record_rollouts

    def record(self, data: StepData, record: StepRecord) -> None:
        """Write what a step was computed from beside its samples, if configured."""
        if not self.enabled or self._has_images(data):
            return
        folder, name = Path(self._run.trainer.rollout_data_dir or ""), str(record.step)
        computed = _computed(data, record)
        self._observer.dump(
            "trainer.record_rollouts", lambda: write_rollouts(folder, [data], self._workers, name, computed)
        )

    @contextmanager
    def keeping(self, data: StepData, record: StepRecord) -> Iterator[None]:
        """Keep a step whose computation in the block produces NaN or infinity, and say so in the error."""
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}{self._keep(data, record)}") from error

    def _keep(self, data: StepData, record: StepRecord) -> str:
        """Keep a step, and say what is kept; "" for nothing."""
        folder = self._run.folder / NONFINITE
        samples = self._observer.keep_rollouts(folder, record)
        kept = f"\nThe step's samples are kept in {samples}." if samples else ""
        if self._has_images(data):
            return kept
        try:
            write_rollouts(folder, [data], self._workers, str(record.step), _computed(data, record))
        except (OSError, IIVerlError) as error:
            self._observer.warn(f"the step's tokens are not kept: {error}")
            return kept
        again = f"iiverl replay {self._run.folder} --step {record.step}"
        return f"{kept}\nIts tokens are kept beside them, and this computes the step again: {again}"

    def _has_images(self, data: StepData) -> bool:
        """Return whether prompts have images, or environments, tools and agents sent some."""
        return self._prompts.has_images or any(each.images for each in data.rollouts)


def _computed(data: StepData, record: StepRecord) -> dict[int, SequenceRef]:
    """Give the trained sequences of a step by their position among all, with the arrays that are recorded of them."""
    in_batch = {rollout.id for rollout in record.batch}
    trained = [i for i, each in enumerate(sequences_of([data])) if each.trained and each.id in in_batch]
    recorded = [
        replace(each, arrays={name: each.arrays[name] for name in RECORDED if name in each.arrays})
        for each in record.sequences
    ]
    return dict(zip(trained, recorded, strict=True)) if recorded else {}
