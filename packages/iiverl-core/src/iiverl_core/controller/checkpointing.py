"""Checkpoints of a run, written in the background while the next step runs.

A save passes through three states. Workers copy their models and write the copies (*writing*); when all of them have
finished, a thread of this process hashes the files and gives the folder its name (*publishing*); then it is a
checkpoint of the run, and older ones may be deleted.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iiverl_core.checkpoints import STATE_FILE, check_space, keep_limit, prune, to_json, write
from iiverl_core.config import RunConfig
from iiverl_core.controller.collector import StepData
from iiverl_core.controller.saved_rollouts import write_rollouts
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.worker_client import WorkerClient


@dataclass
class _Save:
    """A save in progress: closing `open` publishes the folder; exiting it with an error removes the folder."""

    open: ExitStack
    folder: Path
    metrics: dict[str, float]
    expected: dict[str, int]
    written: bool = False
    publishing: Future[None] | None = None


class Checkpointer:
    """Saves the state of a run, one save at a time.

    `facts` are JSON values to save beside the models, by file name. `size` is the expected size of a checkpoint in bytes.
    """

    def __init__(
        self,
        run: RunConfig,
        workers: WorkerClient,
        facts: Mapping[str, Any],
        size: int,
        log: Callable[[str], None],
    ) -> None:
        """Check the space for a checkpoint.

        Raises:
            CheckpointError: the run saves checkpoints, and there is no space for one.
        """
        self._run, self._workers, self._log = run, workers, log
        self._facts = {name: to_json(value) for name, value in facts.items()}
        self._save: _Save | None = None
        self._size = size  # expected, then that of the last checkpoint
        if self.enabled:
            check_space(run.folder, size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @property
    def enabled(self) -> bool:
        """Whether the run saves anything."""
        return self._run.trainer.save_freq > 0

    def due(self, step: int, *, last: bool) -> bool:
        """Return whether to save a step: every `save_freq` steps, and the last one."""
        return self.enabled and (last or step % self._run.trainer.save_freq == 0)

    def begin(self, state: TrainState, rollouts: Sequence[StepData] = ()) -> None:
        """Copy the state after a step, and start writing it; an earlier save is finished first.

        `rollouts` are those of coming steps that are collected already.

        Without `checkpoint.async_save`, wait until it is written.

        Raises:
            CheckpointError: the disk is full, or the folder cannot be written; older checkpoints are untouched.
        """
        self.finish()
        check_space(self._run.folder, self._size)
        with ExitStack() as stack:
            metrics: dict[str, float] = {}
            expected: dict[str, int] = {}
            block = write(self._run.folder, state.step, metrics=metrics, expected=expected)
            folder = stack.enter_context(block)
            (folder / STATE_FILE).write_text(state.to_json())
            for name, value in self._facts.items():
                (folder / name).write_text(value, "utf-8")  # synced with all others when it is published
            self._workers.begin_save(folder)
            write_rollouts(folder, rollouts, self._workers)
            self._save = _Save(stack.pop_all(), folder, metrics, expected)
        if not self._run.checkpoint.async_save:
            self._wait_until_written(self._save)

    def commit(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of the step, by which `trainer.save_best` chooses; the save may become a checkpoint from now on.

        So a step that can be resumed from is always one that has been reported.
        """
        if self._save is not None:
            self._save.metrics.update(metrics)
        if not self._run.checkpoint.async_save:
            self.finish()

    def advance(self) -> None:
        """Start publishing the save in progress, if any: wait for its files, but not until they are hashed.

        Raises:
            CheckpointError: a worker could not write, or the files could not be published.
        """
        save = self._save
        if save is None:
            return
        if save.publishing is None:
            self._wait_until_written(save)
            save.publishing = self._thread.submit(self._publish, save)
        elif save.publishing.done():
            self.finish()

    def finish(self) -> None:
        """Wait until the save in progress, if any, is a checkpoint. Raises the same errors as `advance`."""
        if self._save is not None and self._save.publishing is None:
            self.advance()
        if self._save is not None and self._save.publishing is not None:
            publishing, self._save = self._save.publishing, None
            publishing.result()

    def close(self) -> None:
        """Remove the files of a save whose workers have not finished; wait for one that is being published."""
        save, self._save = self._save, None
        if save is not None and save.publishing is None:
            save.open.__exit__(RuntimeError, RuntimeError("the run has ended"), None)
        self._thread.shutdown()

    def _wait_until_written(self, save: _Save) -> None:
        if save.written:
            return
        save.expected.update(self._workers.finish_save(save.folder))
        save.written = True

    def _publish(self, save: _Save) -> None:
        save.open.close()
        self._size = sum(save.expected.values())
        trainer = self._run.trainer
        limit = keep_limit(
            trainer.max_actor_ckpt_to_keep,
            trainer.max_critic_ckpt_to_keep if self._run.uses_critic else None,
            only_last=trainer.remove_previous_ckpt_in_save,
        )
        prune(self._run.folder, limit, trainer.save_best, warn=self._log)
