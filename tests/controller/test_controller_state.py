"""A run's state goes through JSON, and a trainer that starts from it does what the one that wrote it would have done."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.cluster.messages import Advantages
from iiverl_core.config import build, run_config
from iiverl_core.controller.collector import Plan
from iiverl_core.controller.observer import StepRecord
from iiverl_core.controller.rollout_queue import RolloutQueue
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.trainer import Trainer
from iiverl_core.data import PromptOrder
from iiverl_core.samples import Handle, Prompt, Rollout, SampleId, SequenceRef
from iiverl_core.stopping import Stop
from iiverl_core.telemetry import Timers
from iiverl_core.training.planning import Work
from iiverl_reward_client import Scored

finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**40)


@given(st.builds(TrainState, finite, counts, counts, counts, st.dictionaries(counts, finite)))
def test_the_state_is_the_same_after_json(state: TrainState) -> None:
    assert TrainState.from_json(state.to_json()) == state


@pytest.mark.parametrize("text", ["{", "[]", '{"kl_coef": 1}', '{"response_lengths": {}, "unknown": 1}'])
def test_what_is_no_state_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        TrainState.from_json(text)


class Workers:
    """Workers that write a response whose length and KL depend on its prompt and step, and note what they are asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def generate(self, requests, sampling):
        self.asked.append([(request.prompt.row, request.seed, request.id.member) for request in requests])
        for request in requests:
            trained = 1 + (7 * request.prompt.row + request.id.step) % 5
            sequence = SequenceRef(request.id, Handle(None), 2 + trained, trained)
            yield [Rollout(request.id, request.prompt, "r", "r", "stop", self.version, -1.0, (sequence,))]

    def update_rollout_weights(self, version: int) -> int:
        self.version = version
        return 0

    def sleep(self, *, discard_weights: bool) -> None: ...

    def memory(self) -> dict[str, int]:
        return {}

    def profiled(self, step):
        return nullcontext()

    def evaluate(self, role, sequences):
        return [Handle(None)] * len(sequences), [0.0] * len(sequences)

    def advantages(self, sequences, scores, baselines, kl_coef):
        self.asked.append(kl_coef)
        each = [Handle(None)] * len(sequences)
        kl = sum(sequence.trained for sequence in sequences) / 50
        return Advantages(each, each, [0.0] * len(scores), scores, kl, {})

    def update(self, role, sequences, lr, arrays, *, keeps_log_probs, staleness):
        self.asked.append((role, [sequence.id for sequence in sequences], lr))
        return {f"{role}/skipped_updates": 0.0}, [Work(1, 1)], []


class Scores:
    """A scorer of twos."""

    busy_seconds, busy_spans = 0.0, ()

    def __init__(self) -> None:
        self.ids: set[SampleId] = set()

    def submit(self, rollout: Rollout) -> None:
        self.ids.add(rollout.id)

    def collect(self, ids, may_fail=None):
        self.ids -= set(ids)
        return {id: Scored(2.0) for id in ids}

    def is_scored(self, ids):
        return True


class Unsaved:
    """Checkpoints of a run that saves none."""

    enabled = False

    def due(self, step: int, *, last: bool) -> bool:
        return False

    def advance(self) -> None: ...

    def finish(self) -> None: ...


class Silent:
    """An observer that reports nothing."""

    def __init__(self) -> None:
        self.timers = Timers()

    def phase(self, name: str, total: int | None = None):
        return nullcontext(SimpleNamespace(advance=lambda *_, **__: None))

    def write_rollouts(self, record: StepRecord) -> None: ...

    def step_done(self, record: StepRecord) -> None: ...


RUN = run_config(
    build(
        {
            "data": {"train_batch_size": 4},
            "algorithm": {
                "adv_estimator": "grpo",
                "use_kl_in_reward": True,
                "kl_ctrl": {"type": "adaptive", "kl_coef": 0.01, "target_kl": 0.1, "horizon": 20},
            },
            "actor_rollout_ref": {
                "actor": {"ppo_mini_batch_size": 2, "shuffle": True},
                "rollout": {"n": 2},
            },
        }
    )
)


def run(steps: int, state: TrainState | None = None) -> tuple[list[Any], TrainState]:
    """Train to a step; what the workers were asked, and the state at the end."""
    prompts: Any = [Prompt(row=row, ids=(1, 2), text="p") for row in range(10)]
    plan = Plan(prompts, PromptOrder(10, 4, seed=3), None, steps)
    workers: Any = Workers()
    scorer: Any = Scores()
    observer: Any = Silent()
    checkpoints: Any = Unsaved()
    state = state or TrainState(kl_coef=RUN.algorithm.kl_ctrl.kl_coef)
    rollouts = RolloutQueue(RUN, plan, workers, scorer, observer, state)
    trainer = Trainer(RUN, plan, workers, rollouts, observer, checkpoints, state, Stop())
    trainer.fit()
    return workers.asked, trainer.state


def test_a_trainer_goes_on_from_a_state_as_if_it_had_never_stopped() -> None:
    whole, end = run(7)
    first, middle = run(4)
    assert middle.step == middle.batches_consumed == middle.weights_version == 4
    assert len({asked for asked in whole if isinstance(asked, float)}) == 7  # the KL's weight adapts
    rest, resumed = run(7, TrainState.from_json(middle.to_json()))
    assert first + rest == whole
    assert resumed == end
    forgetful, _ = run(7, TrainState(middle.kl_coef, 4, 4, 4))
    assert first + forgetful != whole  # lengths of earlier responses decide what is started first
