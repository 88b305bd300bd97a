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

With `rollout.partial`, engines are interrupted for the weights after every step, and go on with the responses that they
were writing. The rollouts of all steps that may be started are generated side by side, so engines that wait for the
longest responses of a step have others to write meanwhile. Which weights write which token then depends on time.

Then the loop need not wait for the longest response of a step either: if its mini-batches can be trained one by one
(`trains_in_parts`), it gets each of them as soon as its groups are there. Mini-batches have the groups that they would have in turn;
time decides only which comes first.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from iiverl_core.config import RunConfig
from iiverl_core.controller.batch import epoch_order, mini_batch_groups
from iiverl_core.controller.collector import Collecting, Generation, Plan, RolloutCollector, StepData
from iiverl_core.controller.observer import Observer
from iiverl_core.controller.scoring import Scoring
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.errors import IIVerlError
from iiverl_core.registry.algorithms import estimator_info
from iiverl_core.rewards import Scorer
from iiverl_core.samples import Rollout
from iiverl_reward_client import Failed

INTERRUPT_AGAIN_S = 0.1
_JOIN_S = 10.0  # for the thread to see that its engines have ended


@dataclass
class _Flying:
    """A step whose rollouts are being collected: it waits for `wanted`, and was started after the engines had `waited` s."""

    step: int
    collecting: Collecting[tuple[StepData, TrainState]]
    wanted: Generation
    waited: float


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
        self._run = run
        self._max_staleness, self._total = run.trainer.max_staleness, plan.total_steps
        self._workers, self._observer, self._state = workers, observer, state
        self._scorer = scorer
        estimator = estimator_info(run.algorithm.adv_estimator)
        self._collector = RolloutCollector(run, plan, workers, scorer, observer, estimator, self)
        self._interrupts = run.interrupts_rollouts
        self._may_retire = run.rollout.min_engines is not None
        # How far a step gets in the data is known before its rollouts are, unless groups are replaced.
        replaced = run.algorithm.filter_groups.enable or estimator.greedy_baseline
        self._side_by_side = self._interrupts and not replaced
        # What the thread needs no scores for is scored where the loop waits for it.
        self._answers = bool(self._max_staleness) and not replaced
        self._flying: dict[int, _Flying] = {}  # the steps that are being collected
        self._ready = {data.step: data for data in saved}
        self._unscored = set[int]()  # steps that are ready but for their scores
        # Batches of prompts consumed after each step whose rollouts are collected.
        self._consumed = dict.fromkeys(range(state.step, state.step + len(saved) + 1), state.batches_consumed)
        self._next = state.step + 1 + len(saved)  # to be started
        self._trained = state.step
        self.version = -1
        """Version of the weights that the engines have."""
        self._fresh_after = state.step  # the last step after which the engines' weights were the newest
        self._last_step = dict[int, int]()  # the same for each version
        self._given_bytes: int | None = None
        self._changed = threading.Condition()
        self._collecting = False  # the engines are at work on a step's rollouts
        self._scoring = False  # the thread waits for scores meanwhile
        self._wanted = False  # the loop wants the engines next
        self._lost = False  # an engine died, and the thread waits until it has weights
        self._updating = False  # the trainer's weights are between those of two steps
        self._closed = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Give the engines their first weights."""
        self._workers.update_rollout_weights(self._state.weights_version)
        self.version = self._state.weights_version
        self._note_weights()

    def stream(self, step: int) -> Iterator[StepData]:
        """Yield the rollouts of a step, waiting for them if they are not collected yet.

        With `trains_in_parts`, each mini-batch comes as soon as its groups are scored; otherwise all come together. The
        last part has the metrics and timings.

        Raises what `RolloutCollector.collect` raises.
        """
        if not self._max_staleness:
            data = self._ready.pop(step, None) or self._collect_alone(step)
            self._observer.timers.add(data.timings)
            yield data
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="iiverl-rollouts", daemon=True)
            self._thread.start()
        yield from self._stream_beside(step)

    def _stream_beside(self, step: int) -> Iterator[StepData]:
        in_parts = self._run.trains_in_parts
        self._wait_for(lambda: step in self._ready or (in_parts and step in self._flying))
        with self._changed:
            known = self._ready.get(step)
            groups = known.groups if known else list(self._flying[step].wanted.prompts)
            scoring = self._scoring_of(step, groups) if known is None or step in self._unscored else None
        parts, early = self._mini_batches(step, groups) if in_parts else [groups], 0
        while parts:
            self._wait_for(lambda: step in self._ready or self._first_to_come(step, parts) is not None)
            with self._changed:
                collected = step in self._ready
                part = parts[0] if collected else self._first_to_come(step, parts)
                rollouts = self._ready[step].rollouts if collected else self._flying[step].wanted.rollouts
                # Which weights wrote what a checkpoint held was known in the run that saved it.
                staleness = self._ready[step].staleness if collected else self._staleness(step, rollouts)
            assert part is not None
            parts.remove(part)
            early += not collected
            if in_parts:
                rollouts = [each for each in rollouts if each.id.group in part]
            if scoring:
                timers = self._observer.timers
                with timers("wait_rollouts"), timers("reward"), self._observer.phase("scoring"):
                    rollouts = scoring.score(rollouts)
            data = StepData(step, staleness=staleness) if parts else self._hand_over(step)
            if scoring and not parts:
                data.metrics["reward/hidden_fraction"] = scoring.hidden_fraction
            if in_parts and not parts:
                data.metrics["perf/early_mini_batches"] = float(early)
            self._updating = True
            if in_parts:
                data = replace(data, groups=part, parts=[part])
            yield replace(data, rollouts=rollouts)

    def _mini_batches(self, step: int, groups: Sequence[int]) -> list[list[int]]:
        order = epoch_order(self._run, "actor", step, 0)
        return mini_batch_groups(groups, self._run.training("actor").mini_batch_size, order)

    def _first_to_come(self, step: int, parts: Sequence[list[int]]) -> list[int] | None:
        """Return a part of which all responses are there; None if there is none, or the step ends with it."""
        finished = self._flying[step].wanted.finished if step in self._flying else frozenset[int]()
        return next((part for part in parts if len(parts) > 1 and finished.issuperset(part)), None)

    def _hand_over(self, step: int) -> StepData:
        """Let the loop have the last part of a step, with what belongs to no part."""
        with self._changed:
            data = self._ready.pop(step)
            self._unscored.discard(step)
            data.metrics["perf/rollouts_ready"] = float(len(self._ready))
        self._observer.timers.add(data.timings)
        return data

    def _scoring_of(self, step: int, groups: Sequence[int]) -> Scoring:
        return self._collector.scoring(step, len(groups) * self._run.rollout.n)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._observer.timers("wait_rollouts"), self._observer.phase("waiting for rollouts"):
            self._await(condition)

    def trained(self, step: int) -> dict[str, float]:
        """Note that a step's updates are done, and give engines that are between two steps the new weights.

        Returns metrics of the weights that were given since the last call, and of the engines that are in use.
        """
        with self._changed:
            self._trained, self._updating = step, False
            self._take_engines_for_weights()
            self._give_weights_if_due()
        given, self._given_bytes = self._given_bytes, None
        metrics = {} if given is None else {"perf/weight_sync_gb": given / 2**30}
        return metrics | ({"perf/engines": float(self._workers.engines)} if self._may_retire else {})

    def validate(self, step: int) -> list[Rollout]:
        """Collect scored responses to the validation prompts by the newest weights."""
        with self._engines():
            return self._collector.finish(self._collector.validate(step))

    def checkpoint(self) -> tuple[TrainState, list[StepData]]:
        """Return the state to save after the last trained step, and the rollouts that are collected for steps to come.

        Those of the next step are waited for, and for their scores, since the weights that write them are not saved, unless
        they come from several anyway. Rollouts of later steps are left out from the first step on that is not scored: a run
        that resumes asks for them again.
        """
        if self._thread is not None and not self._interrupts:
            self._await(self._next_is_collected)
        with self._changed:
            last = self._trained
            while last + 1 in self._ready:
                last += 1
            ready = [self._ready[step] for step in range(self._trained + 1, last + 1)]
            consumed, lengths = dict(self._consumed), dict(self._state.response_lengths)
        saved: list[StepData] = []
        for data in ready:
            waited_for = data.step == self._trained + 1 and not self._interrupts
            if not (waited_for or self._is_scored(data)) or not self._complete(data):
                break
            saved.append(data)
        batches = consumed[saved[-1].step if saved else self._trained]
        return replace(self._state, batches_consumed=batches, response_lengths=lengths), saved

    def _is_scored(self, data: StepData) -> bool:
        submitted = [each.id for each in data.rollouts if not isinstance(each.outcome, Failed)]
        return data.step not in self._unscored or self._scorer.is_scored(submitted)

    def _complete(self, data: StepData) -> bool:
        """Wait for the scores of a step that is collected; if too many are missing, the loop has the error in that step."""
        if data.step not in self._unscored:
            return True
        scoring = self._scoring_of(data.step, data.groups)
        try:
            with self._observer.phase("scoring"):
                data.rollouts = scoring.score(data.rollouts)
        except IIVerlError as error:
            with self._changed:
                self._error = self._error or error
                del self._ready[data.step]
            return False
        data.metrics["reward/hidden_fraction"] = scoring.hidden_fraction
        self._unscored.remove(data.step)
        return True

    def restore(self) -> None:
        """Give weights to engines that died and were started again, or were interrupted, for the responses that are missing.

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
                self._start_steps(waited)
                flying = list(self._flying.values())
                wanted = [each.wanted for each in flying]
                for generation in self._collector.generate(wanted):
                    self._advance(flying[wanted.index(generation)])
                if not all(each.ended for each in wanted):
                    self.restore()
        except BaseException as error:  # the loop raises it
            with self._changed:
                self._error, self._collecting = error, False
                self._changed.notify_all()

    def _wait_for_weights(self) -> float | None:
        """Wait until there is something to generate; returns the seconds, or None if there is nothing any more."""
        began = time.perf_counter()
        with self._changed:
            self._collecting = bool(self._flying) and not self._closed
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or bool(self._flying)
                    or self._next > self._total
                    or (not self._wanted and self._may_start())
                )
            )
            self._collecting = not self._closed and (bool(self._flying) or self._next <= self._total)
            return time.perf_counter() - began if self._collecting else None

    def _may_start(self) -> bool:
        """Whether the engines' weights are new enough for the next step, and it need not wait for another."""
        new_enough = self._next - 1 - self._fresh_after <= self._max_staleness
        return self._next <= self._total and new_enough and (self._side_by_side or not self._flying)

    def _start_steps(self, waited: float) -> None:
        """Start what may be started, of which each step takes its prompts."""
        while self._may_start():
            step, self._next = self._next, self._next + 1
            collects = self._collector.answer if self._answers else self._collector.collect
            collecting = collects(step, self._state)
            self._flying[step] = _Flying(step, collecting, next(collecting), waited)
            if self._side_by_side:
                self._state.batches_consumed += 1

    def _advance(self, flying: "_Flying") -> None:
        """Go on with a step of which rollouts have come: once all have, it is collected, or wants scores and others."""
        with self._changed:
            self._scoring = flying.wanted.ended and not self._answers
            self._changed.notify_all()
        if not flying.wanted.ended:
            return
        try:
            flying.wanted = next(flying.collecting)
        except StopIteration as end:
            data, after = end.value
            data.timings["timing_s/engines_wait"] = flying.waited
            with self._changed:
                del self._flying[flying.step]
                # Whoever sees that the step is collected also sees that the engines are free for the weights it waits for.
                self._collecting = bool(self._flying)
                self._note_collected(data, after)
                self._ready[data.step] = data
                if self._answers:
                    self._unscored.add(data.step)
                self._changed.notify_all()
        finally:
            self._scoring = False

    def _collect_alone(self, step: int) -> StepData:
        """Collect a step's rollouts in turn with training."""
        data, after = self._collector.finish(self._collector.collect(step, self._state))
        self._note_collected(data, after)
        self._next = step + 1
        return data

    def _note_collected(self, data: StepData, after: TrainState) -> None:
        """Advance the run's place in the data, and add the staleness of the rollouts to their metrics."""
        if not self._side_by_side:
            self._state.batches_consumed = after.batches_consumed
        self._consumed = {
            step: consumed for step, consumed in self._consumed.items() if step >= self._trained
        } | {data.step: after.batches_consumed}
        rows = {each.prompt.row for each in data.rollouts}
        self._state.response_lengths |= {
            row: length for row, length in after.response_lengths.items() if row in rows
        }
        if data.rollouts and self._max_staleness:
            data.staleness = self._staleness(data.step, data.rollouts)
            behind = [data.staleness[min(each.versions)] for each in data.rollouts]
            data.metrics |= {"staleness/mean": sum(behind) / len(behind), "staleness/max": float(max(behind))}
        if data.rollouts and self._interrupts:
            several = sum(len(each.versions) > 1 for each in data.rollouts)
            data.metrics["staleness/several_versions"] = several / len(data.rollouts)

    def _staleness(self, step: int, rollouts: Sequence[Rollout]) -> dict[int, int]:
        versions = {version for each in rollouts for version in each.versions}
        return {version: step - 1 - self._last_step[version] for version in sorted(versions)}

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait for the thread; give weights to engines that it lost, and the newest ones when the engines allow it."""
        with self._changed:
            self._take_engines_for_weights()
            self._wanted = self._has_newer_weights
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
        if self._thread is not None and not self._interrupts:
            self._await(self._next_is_collected)
        with self._changed:
            self._wanted = True
            self._interrupt(lambda: not self._collecting)
            self._changed.wait_for(lambda: not self._collecting)
            self._give_weights_if_due()
        try:
            yield
        finally:
            with self._changed:
                self._wanted = False
                self._changed.notify_all()

    @property
    def _has_newer_weights(self) -> bool:
        return not self._updating and self._state.weights_version != self.version

    def _next_is_collected(self) -> bool:
        return min(self._trained + 1, self._total) in self._consumed

    def _take_engines_for_weights(self) -> None:
        """Interrupt the engines if they have older weights, unless that would have the loop wait for scores."""
        if self._has_newer_weights:
            self._interrupt(lambda: not self._collecting or self._scoring)

    def _interrupt(self, until: Callable[[], bool]) -> None:
        while self._interrupts and self._error is None and not until():
            self._workers.interrupt()
            self._changed.wait(INTERRUPT_AGAIN_S)  # the thread may not have called the engines yet

    def _give_weights_if_due(self) -> None:
        """Give the engines the newest weights if they have older ones, and nothing to do that older ones should do."""
        busy = self._thread is not None and not self._interrupts and not self._next_is_collected()
        if self._collecting or (busy and not self._lost):
            return
        if (self._lost and not self._updating) or self._has_newer_weights:
            self._give_weights()
        elif self._state.weights_version == self.version:
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
