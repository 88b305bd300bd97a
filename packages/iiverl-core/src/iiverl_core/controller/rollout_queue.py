"""The rollouts of the coming steps, which may be collected beside training, within a bound on their staleness.

Without `trainer.max_staleness` a step's rollouts are collected when the loop asks for them, by the weights after the
step before. With k ≥ 1 a thread collects them ahead of the loop:

    engines | step 1 | step 2   | step 3   | step 4   | …
    trainer          | update 1 | update 2 | update 3 | …

The rollouts of step b are started once the engines have the weights after step b - 1 - k, or newer ones. Engines get
weights only between two steps' rollouts, so all rollouts of a step come from the same weights, unless an engine died
meanwhile. They get the weights after step s once the rollouts of step s + 1 are collected. With k = 1 that leaves no
choice: the rollouts of step b come from the weights after step b - 2, however long anything takes, and the run repeats
bit by bit. With larger k, engines that are faster than the trainer go further ahead.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from iiverl_core.config import RunConfig
from iiverl_core.controller.collector import Plan, RolloutCollector, StepData
from iiverl_core.controller.observer import Observer
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.errors import IIVerlError
from iiverl_core.registry.algorithms import estimator_info
from iiverl_core.rewards import Scorer
from iiverl_core.samples import Rollout

_JOIN_S = 10.0  # for the thread to see that its engines have ended


class RolloutQueue:
    """Collects the rollouts of each step, and decides when the engines get which weights.

    `saved` are rollouts of the steps after `state.step` that a checkpoint held. `state` is the run's: what it says about the
    data includes all steps whose rollouts are collected.
    """

    def __init__(
        self,
        run: RunConfig,
        plan: Plan,
        workers: WorkerClient,
        scorer: Scorer,
        observer: Observer,
        state: TrainState,
        saved: Sequence[StepData] = (),
    ) -> None:
        self._max_staleness, self._total = run.trainer.max_staleness, plan.total_steps
        self._workers, self._observer, self._state = workers, observer, state
        estimator = estimator_info(run.algorithm.adv_estimator)
        self._collector = RolloutCollector(run, plan, workers, scorer, observer, estimator, self)
        self._ready = {data.step: data for data in saved}
        self._next = state.step + 1 + len(saved)  # to be collected
        self._trained = state.step
        self.version = -1
        """Version of the weights that the engines have."""
        self._fresh_after = state.step  # the last step after which the engines' weights were the newest
        self._last_step = dict[int, int]()  # the same for each version
        self._given_bytes: int | None = None
        self._changed = threading.Condition()
        self._collecting = False  # the engines are at work on a step's rollouts
        self._wanted = False  # the loop wants the engines next
        self._lost = False  # an engine died, and the thread waits until it has weights
        self._closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Give the engines their first weights."""
        self._workers.update_rollout_weights(self._state.weights_version)
        self.version = self._state.weights_version
        self._note_weights()

    def take(self, step: int) -> StepData:
        """Return the rollouts of a step, waiting for them if they are not collected yet.

        Raises what `RolloutCollector.collect` raises.
        """
        if not self._max_staleness:
            data = self._ready.pop(step, None) or self._collect(step)
        else:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="iiverl-rollouts", daemon=True)
                self._thread.start()
            with self._observer.timers("wait_rollouts"), self._observer.phase("waiting for rollouts"):
                self._await(lambda: step in self._ready)
            with self._changed:
                data = self._ready.pop(step)
                data.metrics["perf/rollouts_ready"] = float(len(self._ready))
        self._observer.timers.add(data.timings)
        return data

    def trained(self, step: int) -> dict[str, float]:
        """Note that a step's updates are done, and give engines that are between two steps the new weights.

        Returns metrics of the weights that were given since the last call.
        """
        with self._changed:
            self._trained = step
            self._give_weights_if_due()
        given, self._given_bytes = self._given_bytes, None
        return {} if given is None else {"perf/weight_sync_gb": given / 2**30}

    def validate(self, step: int) -> list[Rollout]:
        """Collect scored responses to the validation prompts by the newest weights."""
        with self._engines():
            return self._collector.validate(step)

    def checkpoint(self) -> tuple[TrainState, list[StepData]]:
        """Return the state to save after the last trained step, and the rollouts that are collected for steps to come.

        Those of the next step are waited for, since the weights that write them are not saved. Rollouts of later steps that
        are being collected are left out: a run that resumes asks for them again.
        """
        if self._thread is not None and self._trained < self._total:
            self._await(self._next_is_collected)
        with self._changed:
            return replace(self._state), [self._ready[step] for step in sorted(self._ready)]

    def restore(self) -> None:
        """Give weights to engines that died and were started again, for the responses that are missing.

        While the loop trains, the weights that they had do not exist any more. They get the next ones, when the loop
        comes to the end of its step.
        """
        if threading.current_thread() is not self._thread:
            self._workers.update_rollout_weights(self.version)
            return
        with self._changed:
            self._lost, self._collecting = True, False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or not (self._lost or self._wanted))
            if self._closed:
                raise IIVerlError("the run has ended while rollouts were being collected")
            self._collecting = True

    def close(self) -> None:
        """Let the thread end once the engines have ended, or when they are between two steps."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the thread to end, after the engines have."""
        if self._thread is not None:
            self._thread.join(_JOIN_S)

    def _work(self) -> None:
        try:
            while (waited := self._wait_for_weights()) is not None:
                data = self._collect(self._next)
                data.timings["timing_s/engines_wait"] = waited
                with self._changed:
                    self._ready[data.step] = data
                    self._next += 1
                    self._collecting = False
                    self._changed.notify_all()
        except BaseException as error:  # the loop raises it
            with self._changed:
                self._error, self._collecting = error, False
                self._changed.notify_all()

    def _wait_for_weights(self) -> float | None:
        """Wait until the next step's rollouts may be started; returns the seconds, or None if there is no such step."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or self._next > self._total
                    or (not self._wanted and self._next - 1 - self._fresh_after <= self._max_staleness)
                )
            )
            self._collecting = not self._closed and self._next <= self._total
            return time.perf_counter() - began if self._collecting else None

    def _collect(self, step: int) -> StepData:
        """Collect a step's rollouts, and advance the run's place in the data."""
        data, after = self._collector.collect(step, self._state)
        behind = [step - 1 - self._last_step[each.weights_version] for each in data.rollouts]
        if behind and self._max_staleness:
            data.metrics |= {"staleness/mean": sum(behind) / len(behind), "staleness/max": float(max(behind))}
        with self._changed:
            self._state.batches_consumed = after.batches_consumed
            self._state.response_lengths = after.response_lengths
        return data

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait for the thread; give weights to engines that it lost, and the newest ones when the engines allow it."""
        with self._changed:
            self._wanted = self._state.weights_version != self.version
            try:
                while not condition():
                    if self._error is not None:
                        raise self._error
                    if self._lost:
                        self._give_weights()
                    elif self._wanted and not self._collecting:
                        self._give_weights_if_due()
                        self._wanted = False
                        self._changed.notify_all()
                    else:
                        self._changed.wait()
                self._give_weights_if_due()
            finally:
                self._wanted = False
                self._changed.notify_all()

    @contextmanager
    def _engines(self) -> Iterator[None]:
        """Have the engines for the loop alone, with the newest weights."""
        if self._thread is not None:
            self._await(self._next_is_collected)
        with self._changed:
            self._wanted = True
            self._changed.wait_for(lambda: not self._collecting)
            self._give_weights_if_due()
        try:
            yield
        finally:
            with self._changed:
                self._wanted = False
                self._changed.notify_all()

    def _next_is_collected(self) -> bool:
        return self._next > min(self._trained + 1, self._total)

    def _give_weights_if_due(self) -> None:
        """Give the engines the newest weights if they have older ones, and nothing to do that older ones should do."""
        if self._collecting or (
            self._thread is not None and not self._next_is_collected() and not self._lost
        ):
            return
        if self._lost or self._state.weights_version != self.version:
            self._give_weights()
        else:
            self._note_weights()

    def _give_weights(self) -> None:
        with self._observer.timers("update_weights"), self._observer.phase("weights to the engine"):
            self._given_bytes = self._workers.update_rollout_weights(self._state.weights_version)
        self.version, self._lost = self._state.weights_version, False
        self._note_weights()

    def _note_weights(self) -> None:
        self._fresh_after = self._last_step[self.version] = self._trained
        with self._changed:
            self._changed.notify_all()
