"""Rollouts are collected beside training: within the bound on staleness, each prompt once, and the same ones after a resume."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_controller_state import Scores, Silent

from iiverl_core.cluster.store import LocalStore, open_all, put_all
from iiverl_core.config import build, run_config
from iiverl_core.controller import recorded_rollouts
from iiverl_core.controller.collector import Plan, StepData
from iiverl_core.controller.rollout_queue import RolloutQueue
from iiverl_core.controller.saved_rollouts import read_rollouts, write_rollouts
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import PromptOrder
from iiverl_core.rewards import TooManyFailures
from iiverl_core.samples import (
    Handle,
    ImageInputs,
    Prompt,
    Rollout,
    SampledTurn,
    SampleId,
    SequenceImage,
    SequenceRef,
    Thumbnail,
    TokenSequence,
    WeightsSpan,
    joined_spans,
)
from iiverl_core.sequence_files import read_sequences, write_sequences
from iiverl_reward_client import Failed, Scored
from rollouts import make_rollout

ROWS, BATCH, MINI_BATCH, MEMBERS = 12, 4, 2, 2


def run_with(k: int, *, partial: bool = False, mini_batch: int = MINI_BATCH, estimator: str = "grpo") -> Any:
    return run_config(
        build(
            {
                "data": {"train_batch_size": BATCH},
                "algorithm": {"adv_estimator": estimator, "use_kl_in_reward": False},
                "actor_rollout_ref": {
                    "actor": {"ppo_mini_batch_size": mini_batch},
                    "rollout": {"n": MEMBERS, "partial": partial},
                },
                "trainer": {"max_staleness": k, "rollout_devices": 1},
            }
        )
    )


class Engines:
    """Engines that take a random time, and die now and then."""

    def __init__(self, chance: random.Random, deaths: float = 0.0) -> None:
        self.chance, self.deaths = chance, deaths
        self.version = -1
        self.busy = False

    def generate(self, requests, sampling):
        self.busy = True
        time.sleep(self.chance.choice((0, 0, 0, 0.004)))
        for request in requests:
            if self.chance.random() < self.deaths:
                break  # an engine died: what is left is missing
            sequence = SequenceRef(request.id, Handle(None), 3, 1)
            yield [Rollout(request.id, request.prompt, "r", "r", "stop", self.version, -1.0, (sequence,))]
        self.busy = False

    def update_rollout_weights(self, version: int) -> int:
        assert not self.busy, "weights came while responses were being written"
        assert version >= self.version
        self.version = version
        return 1


class InterruptibleEngines(Engines):
    """Engines that write token by token, and go on with what they were writing when they were interrupted."""

    def __init__(self, chance: random.Random, deaths: float = 0.0) -> None:
        super().__init__(chance, deaths)
        self.written: dict[SampleId, list[int]] = {}  # the version that wrote each token
        self.interrupted = False

    def generate(self, requests, sampling):
        self.busy, self.interrupted = True, False
        writing = {each.id: self.written.pop(each.id, []) for each in requests}
        by_id = {each.id: each for each in requests}
        while writing and not (self.interrupted and sampling == "train"):
            time.sleep(self.chance.choice((0, 0, 0, 0.001)))
            if self.chance.random() < self.deaths:
                writing = {}  # what was written is lost
            for id, versions in list(writing.items()):
                versions.append(self.version)
                if self.chance.random() < 0.3:
                    del writing[id]
                    yield [self.rollout(by_id[id], versions)]
        if sampling == "train":
            self.written = writing
        self.busy = False

    def rollout(self, request, versions: list[int]) -> Rollout:
        sequence = SequenceRef(request.id, Handle(None), 2 + len(versions), len(versions))
        spans = joined_spans(*(WeightsSpan(version, 1) for version in versions))
        return Rollout(
            request.id, request.prompt, "r", "r", "stop", versions[-1], -1.0, (sequence,), spans=spans
        )

    def interrupt(self) -> None:
        self.interrupted = True


def plan(steps: int) -> Plan:
    prompts: Any = [Prompt(row=row, ids=(1, 2), text="p") for row in range(ROWS)]
    return Plan(prompts, PromptOrder(ROWS, BATCH, seed=3), prompts[:2], steps)


def queue_of(
    k: int, engines: Engines, steps: int, state: TrainState, saved=(), scores: Any = None
) -> RolloutQueue:
    workers: Any = engines
    observer: Any = Silent()
    run = run_with(k, partial=isinstance(engines, InterruptibleEngines))
    return RolloutQueue(run, plan(steps), workers, scores or Scores(), observer, state, saved)


def take(queue: RolloutQueue, step: int, train: Callable[[], None] = lambda: None) -> StepData:
    """Take the rollouts of a step; train on each part as soon as it is there."""
    data = StepData(step)
    for part in queue.stream(step):
        data.add(part)
        assert all(isinstance(each.outcome, Scored) for each in part.rollouts)
        assert sorted(each.id[-2:] for each in part.rollouts) == [
            (group, member) for group in sorted(part.groups) for member in range(MEMBERS)
        ]
        train()
    return data


def train_to(step: int, queue: RolloutQueue, state: TrainState, chance: random.Random) -> list[StepData]:
    """Train as the loop does, for a random time per step; the actor is trained from the third step on."""
    taken: list[StepData] = []
    for number in range(state.step + 1, step + 1):
        slow = number // 50 % 2  # than the engines, every other fifty steps
        pause = chance.choice((0, 0, 0.001)) + 0.001 * slow
        taken.append(take(queue, number, lambda pause=pause: time.sleep(pause)))
        if number >= 3:
            state.weights_version = number
        queue.trained(number)
        state.step = number
    return taken


def rows_of(step: int) -> list[int]:
    return sorted(PromptOrder(ROWS, BATCH, seed=3).batch(step - 1)[1])


def version_after(step: int) -> int:
    return step if step >= 3 else 0


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", [Engines, InterruptibleEngines])
def test_a_thousand_steps_keep_the_bound_and_use_each_prompt_once(k: int, kind: type[Engines]) -> None:
    """Engines and trainer take random times, and engines die."""
    steps, state = 350, TrainState(kl_coef=0.0)
    queue = queue_of(k, kind(random.Random(k), deaths=0.01), steps, state)
    queue.start()
    taken = train_to(steps, queue, state, random.Random(k + 1))
    for number, data in enumerate(taken, 1):
        versions = {version for rollout in data.rollouts for version in rollout.versions}
        assert version_after(max(0, number - 1 - k)) <= min(versions) <= max(versions) <= number - 1
        assert max(data.staleness.values()) == data.metrics["staleness/max"] <= k
        assert sorted({rollout.prompt.row for rollout in data.rollouts}) == rows_of(number)
        assert {rollout.id.step for rollout in data.rollouts} == {number}
        assert len({rollout.id for rollout in data.rollouts}) == BATCH * MEMBERS
    assert state.batches_consumed == steps
    ahead = max(data.metrics["perf/rollouts_ready"] for data in taken)
    assert k - 1 <= ahead <= k  # engines that are faster use the bound
    mixed = [data.metrics.get("staleness/several_versions", 0.0) for data in taken]
    assert (sum(mixed) > 0.1 * steps) == (kind is InterruptibleEngines)
    in_parts = kind is InterruptibleEngines
    assert all(sorted(data.parts) == ([[0, 1], [2, 3]] if in_parts else []) for data in taken)
    early = [data.metrics.get("perf/early_mini_batches", 0.0) for data in taken]
    assert (sum(early) > 0.02 * steps) == in_parts
    queue.close()
    queue.join()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", [Engines, InterruptibleEngines])
@pytest.mark.parametrize("updates", [1, 3])
def test_a_thread_that_is_held_up_after_a_step_holds_up_nothing_else(
    k: int, kind: type[Engines], updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop may go on with the step before the thread says that it wants weights; and not every step has an update."""
    wait = RolloutQueue._wait_for_weights

    def held_up(self: RolloutQueue) -> float | None:
        time.sleep(chance.choice((0, 0.01)))
        return wait(self)

    monkeypatch.setattr(RolloutQueue, "_wait_for_weights", held_up)
    chance, steps, state = random.Random(k), 40, TrainState(kl_coef=0.0)
    queue = queue_of(k, kind(chance), steps, state)
    queue.start()
    for step in range(1, steps + 1):
        data = take(queue, step)
        assert data.metrics["staleness/max"] <= k
        if step % updates == 0:
            state.weights_version = step
        queue.trained(step)
        state.step = step
    assert state.batches_consumed == steps
    queue.close()
    queue.join()


@pytest.mark.parametrize("k", [0, 1])
def test_with_one_step_of_staleness_time_decides_nothing(k: int) -> None:
    """Nor do a validation, or a checkpoint from which another queue goes on."""
    chance = random.Random(0)
    state, saved = TrainState(kl_coef=0.0), []
    versions: list[set[int]] = []
    for end in (20, 21, 40):
        queue = queue_of(k, Engines(chance), 40, state, saved)
        queue.start()
        for data in train_to(end, queue, state, chance):
            versions.append({rollout.weights_version for rollout in data.rollouts})
            assert sorted({rollout.prompt.row for rollout in data.rollouts}) == rows_of(data.step)
        assert {each.weights_version for each in queue.validate(end)} == {end}
        state, saved = queue.checkpoint()
        assert [data.step for data in saved] == ([end + 1] if k and end < 40 else [])
        queue.close()
        queue.join()
    assert versions == [{version_after(max(0, step - 1 - k))} for step in range(1, 41)]


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 4]),
    st.lists(st.integers(1, 30), max_size=4),
    st.sampled_from([Engines, InterruptibleEngines]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_killed_anywhere_each_prompt_is_used_once(
    seed: int, k: int, kills: list[int], kind: type[Engines]
) -> None:
    """The run goes on from its newest checkpoint, of every third step."""
    chance, state, saved = random.Random(seed), TrainState(kl_coef=0.0), []
    used: dict[int, list[int]] = {}
    for end in [*sorted(kills), 30]:
        kept = replace(state), list(saved)
        queue = queue_of(k, kind(chance), 30, state, saved)
        queue.start()
        for step in range(state.step + 1, end + 1):
            (data,) = train_to(step, queue, state, chance)
            used[step] = sorted({rollout.prompt.row for rollout in data.rollouts})
            if step % 3 == 0:
                kept = queue.checkpoint()
        queue.close()
        queue.join()
        state, saved = kept
    assert used == {step: rows_of(step) for step in range(1, 31)}


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_requests_of_an_engine_that_is_retired_go_to_others(data: st.DataObject) -> None:
    """Groups that others have begun with stay there; each is asked of one engine that is in use."""
    numbers, asked = [0, 1, 2, 3], dict[int, list[SampleId]]()

    def generate(requests, sampling):
        asked.clear()
        asked.update({number: [each.id for each in part] for number, part in requests.items()})
        return iter(())

    engines: Any = SimpleNamespace(numbers=numbers, generate=generate)
    info = SimpleNamespace(parallel_ranks={}, layouts={})
    group: Any = SimpleNamespace(infos=[info])
    client = WorkerClient(group, engines, run_with(2, partial=True))
    requests: Any = [
        SimpleNamespace(id=SampleId("train", 1, number, member))
        for number in range(9)
        for member in range(MEMBERS)
    ]
    where: dict[int, int] = {}
    while requests:
        list(client.generate(requests, "train"))
        assert sorted(asked) == numbers
        assert sorted(id for part in asked.values() for id in part) == sorted(each.id for each in requests)
        now = {id.group: number for number, part in asked.items() for id in part}
        assert all(
            now[number] == engine for number, engine in where.items() if number in now and engine in numbers
        )
        sizes = [len(part) for part in asked.values()]
        assert where or max(sizes) - min(sizes) <= MEMBERS
        where = now
        finished = data.draw(st.integers(1, len(requests)))
        requests = data.draw(st.permutations(requests))[finished:]
        if len(numbers) > 1 and data.draw(st.booleans()):
            numbers.remove(data.draw(st.sampled_from(numbers)))
        assert client.engines == len(numbers)


class LateScores(Scores):
    """Scores that are not there when asked for, or will never be."""

    def __init__(self, *, away: bool = False) -> None:
        super().__init__()
        self.away, self.waited_for = away, set[int]()

    def is_scored(self, ids):
        return False

    def collect(self, ids, may_fail=None):
        self.waited_for |= {id.step for id in ids}
        failure = Failed("transport", detail="the server is away", outage=True)
        away = self.away and any(id.step > 1 for id in ids)
        return {id: failure if away else each for id, each in super().collect(ids).items()}


@pytest.mark.parametrize("kind", [Engines, InterruptibleEngines])
@pytest.mark.parametrize("away", [False, True])
def test_a_checkpoint_waits_for_scores_without_which_a_run_would_not_repeat(
    kind: type[Engines], away: bool
) -> None:
    """Those of the next step, of one version; and if there are none, what was trained is saved nevertheless."""
    scores, state = LateScores(away=away), TrainState(kl_coef=0.0)
    queue = queue_of(2, kind(random.Random(0)), 9, state, scores=scores)
    queue.start()
    take(queue, 1)
    state.weights_version = 1
    queue.trained(1)
    state.step = 1
    queue._await(lambda: 2 in queue._ready)
    kept, saved = queue.checkpoint()
    waits = kind is Engines
    assert scores.waited_for == ({1, 2} if waits else {1})
    assert [data.step for data in saved] == ([2] if waits and not away else [])
    assert kept.step == 1 and kept.batches_consumed == 1 + len(saved)
    assert all(isinstance(each.outcome, Scored) for data in saved for each in data.rollouts)
    if away:
        with pytest.raises(TooManyFailures):
            take(queue, 2)
    queue.close()
    queue.join()


def test_weights_come_in_the_middle_of_a_step_only_if_the_trainer_waits_for_them() -> None:
    """The engine dies while it writes a later step; this one is complete, and half updated."""
    training, given = threading.Event(), list[tuple[int, int]]()
    updates = 0

    class DyingEngines(InterruptibleEngines):
        def generate(self, requests, sampling):
            first = [each for each in requests if each.id.step == 1]
            for each in first or requests:
                if each.id == SampleId("train", 1, 2, 0):
                    training.wait(10)
                yield [self.rollout(each, [self.version])]  # of step 1 alone: then it has died

        def update_rollout_weights(self, version: int) -> int:
            given.append((version, updates))
            return super().update_rollout_weights(version)

    state = TrainState(kl_coef=0.0)
    queue = queue_of(2, DyingEngines(random.Random(0)), 9, state)
    queue.start()
    for _ in queue.stream(1):
        training.set()
        while not queue._lost:
            time.sleep(0.001)
        updates += 1
    state.weights_version = 1
    queue.trained(1)
    assert given == [(0, 0), (1, MINI_BATCH)]
    queue.close()
    queue.join()


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("algorithm", {"adv_estimator": "reinforce_plus_plus_baseline"}),
        ("algorithm", {"adv_estimator": "remax"}),
        ("algorithm", {"use_kl_in_reward": True}),
        ("algorithm", {"filter_groups": {"enable": True}}),
        ("algorithm", {"rollout_correction": {"bypass_old_log_prob": False}}),
        ("critic", {"enable": True}),
        ("data", {"train_batch_size": 8}),
        ("trainer", {"max_staleness": 0}),
    ],
)
def test_mini_batches_that_depend_on_the_whole_step_wait_for_it(section: str, values: dict[str, Any]) -> None:
    tree: dict[str, Any] = {
        "data": {"train_batch_size": 16},
        "algorithm": {"adv_estimator": "grpo", "use_kl_in_reward": False},
        "actor_rollout_ref": {
            "actor": {"ppo_mini_batch_size": 8},
            "rollout": {"n": MEMBERS, "partial": True},
        },
        "trainer": {"max_staleness": 2, "rollout_devices": 1},
    }
    assert run_config(build(tree)).trains_in_parts
    tree[section] = tree.get(section, {}) | values
    assert not run_config(build(tree)).trains_in_parts


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, [[2, 3], [0, 1]]),
        ({"mini_batch": 4}, [[0, 1, 2, 3]]),
        ({"mini_batch": 1}, [[0, 1, 2, 3]]),
        ({"estimator": "reinforce_plus_plus_baseline"}, [[0, 1, 2, 3]]),
    ],
)
def test_a_recorded_step_comes_in_its_parts_if_they_are_mini_batches_of_the_configuration(
    settings: dict[str, Any], parts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = StepData(1, [make_rollout(group) for group in range(4)], [0, 1, 2, 3], metrics={"a": 1.0})
    recorded.parts = [[2, 3], [0, 1]]
    monkeypatch.setattr(recorded_rollouts, "read_rollouts", lambda *_: [recorded])
    run, nothing = run_with(2, partial=True, **settings), Any
    rollouts = recorded_rollouts.RecordedRollouts(run, {1: Path()}, nothing, nothing, TrainState(0.0))
    streamed = list(rollouts.stream(1))
    assert [each.groups for each in streamed] == parts
    assert [[rollout.id.group for rollout in each.rollouts] for each in streamed] == parts
    assert [each.metrics for each in streamed] == [{}] * (len(parts) - 1) + [{"a": 1.0}]


def test_an_error_beside_training_ends_the_run() -> None:
    class Broken(Engines):
        def generate(self, requests, sampling):
            if requests[0].id.step == 3:
                raise OSError("no more")
            yield from super().generate(requests, sampling)

    state = TrainState(kl_coef=0.0)
    queue = queue_of(1, Broken(random.Random(0)), 9, state)
    queue.start()
    with pytest.raises(OSError, match="no more"):
        train_to(9, queue, state, random.Random(0))
    assert state.step == 2


texts = st.text(max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
outcomes = st.one_of(
    st.none(),
    st.builds(
        Scored, finite, st.dictionaries(texts, finite), st.dictionaries(texts, texts | finite | st.none())
    ),
    st.builds(
        Failed, st.sampled_from(["timeout", "environment"]), st.integers(1, 6), texts, outage=st.booleans()
    ),
)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_saved_rollouts_are_the_same_when_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    draw, folder, store = data.draw, tmp_path_factory.mktemp("saved"), LocalStore()
    prompts: Any = [Prompt(row=row, ids=(1, 2), text="p", ground_truth="g") for row in range(3)]
    arrays: list[TokenSequence] = []
    image = ImageInputs(np.ones((4, 3), np.float32), np.array([1, 2, 2]), 1, b"\xff" * 16, b"\x00\xe9")

    def rollout(member: int) -> Rollout:
        lengths = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
        own = [
            TokenSequence(
                np.arange(n, dtype=np.int64),
                np.arange(n) > 0,
                np.linspace(-1, 0, n, dtype=np.float32),
                draw(
                    st.dictionaries(
                        st.sampled_from(["kept_ids", "turn_rewards"]), st.just(np.ones(2, np.float32))
                    )
                ),
                draw(st.sampled_from([(), (SequenceImage(0, image),)])),
            )
            for n in lengths
        ]
        arrays.extend(own)
        id = SampleId("train", 3, draw(st.integers(0, 5)), member)
        refs = tuple(
            SequenceRef(id, handle, len(each.token_ids), each.trained, 1)
            for handle, each in zip(put_all(store, own), own, strict=True)
        )
        messages = draw(
            st.none() | st.just(({"role": "user", "content": "é"}, {"role": "tool", "content": None}))
        )
        return Rollout(
            id=id,
            prompt=prompts[draw(st.integers(0, 2))],
            text=draw(texts),
            raw_text=draw(texts),
            finish_reason=draw(st.sampled_from(["stop", "length"])),
            weights_version=draw(st.integers(0, 9)),
            spans=draw(st.sampled_from([(), (WeightsSpan(3, 2), WeightsSpan(4, 1))])),
            log_prob=draw(st.floats(allow_nan=False)),
            sequences=refs,
            outcome=draw(outcomes),
            messages=messages,
            turns=(SampledTurn(1, 2, draw(st.none() | finite)),) if messages else (),
            counts=draw(st.dictionaries(texts, finite, max_size=2)),
            images=draw(st.sampled_from([(), (Thumbnail("ff", image.thumbnail),)])),
        )

    steps = [
        StepData(
            3,
            [rollout(i) for i in range(draw(st.integers(0, 3)))],
            [0, 2],
            {0: 0.1},
            {"a": 1.5},
            {"timing_s/gen": 2.0},
        )
        for _ in range(draw(st.integers(0, 2)))
    ]
    workers: Any = SimpleNamespace(
        write_sequences=lambda path, sequences, _: write_sequences(
            path, open_all(store, [each.tokens for each in sequences]), [each.id for each in sequences]
        ),
        read_sequences=lambda path: put_all(store, read_sequences(path)),
    )
    write_rollouts(folder, steps, workers)
    read = read_rollouts(folder, prompts, workers)

    def without_handles(steps: list[StepData]) -> list[StepData]:
        return [
            replace(
                step,
                rollouts=[
                    replace(each, sequences=tuple(ref.stored_at(Handle(None)) for ref in each.sequences))
                    for each in step.rollouts
                ],
            )
            for step in steps
        ]

    assert without_handles(read) == without_handles(steps)
    handles = [ref.tokens for step in read for each in step.rollouts for ref in each.sequences]
    for handle, expected in zip(handles, arrays, strict=True):
        found = handle.ref[handle.index]
        for name in ("token_ids", "loss_mask", "log_probs"):
            assert np.array_equal(getattr(found, name), getattr(expected, name))
            assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert found.extras.keys() == expected.extras.keys()
        for (start, seen), (place, wanted) in zip(found.images, expected.images, strict=True):
            assert (start, seen.tokens, seen.digest) == (place, wanted.tokens, wanted.digest)
            assert seen.thumbnail == wanted.thumbnail
            np.testing.assert_array_equal(seen.pixel_values, wanted.pixel_values, strict=True)
            np.testing.assert_array_equal(seen.grid, wanted.grid, strict=True)
