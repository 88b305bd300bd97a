"""How much shorter is a step whose responses are generated beside training?

    python benchmarks/async_overlap.py [--token-ms 3] [--steps 36] [--json FILE]

The real loop (`Trainer`, `RolloutQueue`) runs over an engine that writes all responses in hand side by side, token by token,
and sleeps for each; half of that time grows with their number. The trainer sleeps for as long as the engine needs for a
step on average. All responses are of the same length, or lengths are log-normal with σ = 0.8. Steps in turn
(`max_staleness: 0`) and beside each other, without and with `rollout.partial`, alternate, three times; with several mini-batches
per step, each is trained as soon as its responses are there. `ratio` is the time of
a step compared with that in turn; `ideal` is what a trainer that never waits would take.
"""

import argparse
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from controller_scale import MadeUpGroup, Meter, NoCheckpoints, NoTracker, RandomScores

from iiverl_core.cluster.messages import ReceivedWeights, WeightSync
from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.controller.collector import Plan
from iiverl_core.controller.observer import ModelShape, Observer
from iiverl_core.controller.rollout_queue import RolloutQueue
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.trainer import Trainer
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import PromptOrder
from iiverl_core.rollout import RolloutRequest
from iiverl_core.samples import (
    Handle,
    Prompt,
    Rollout,
    SampleId,
    SequenceRef,
    WeightsSpan,
    joined_spans,
)
from iiverl_core.stopping import Stop
from iiverl_core.telemetry import Progress

PROMPTS, GROUP = 4, 4
LENGTH = 50  # tokens of a response, on average
SIGMA = 0.8
SETTINGS = (
    *((0, False, 1), (1, False, 1), (2, False, 1), (4, False, 1)),
    *((1, True, 1), (2, True, 1), (4, True, 1), (1, True, 4), (2, True, 4)),
)
"""Values of `max_staleness` and `rollout.partial`, and the mini-batches of a step."""
ALTERNATIONS = 3
WARM_UP = 6  # steps, of which the first is generated while there is nothing to train on


def same(id: SampleId) -> int:
    """Return the same length for each response."""
    return LENGTH


def long_tailed(id: SampleId) -> int:
    """Return a length by response, from a distribution in which one in twenty is over three times the median."""
    chance = random.Random(f"{id.step}/{id.group}/{id.member}")
    return max(1, round(LENGTH * chance.lognormvariate(-(SIGMA**2) / 2, SIGMA)))


class WritingEngines:
    """An engine that writes responses of given lengths, a token of each in `token_s` seconds. Implements `Engines`.

    That is the time with all responses of a step; with fewer, it is down to half as long.
    """

    def __init__(self, length: Callable[[SampleId], int], token_s: float) -> None:
        self._length, self._token_s, self._version = length, token_s, -1
        self._written: dict[SampleId, list[WeightsSpan]] = {}
        self._interrupted = False

    def generate(
        self, requests: Mapping[int, Sequence[RolloutRequest]], sampling: str
    ) -> Iterator[list[Rollout]]:
        """See `Engines.generate`."""
        (own,) = requests.values()
        writing = {each.id: (each, self._written.pop(each.id, [])) for each in own}
        self._interrupted = False
        while writing and not self._interrupted:
            time.sleep(self._token_s * (1 + len(writing) / (PROMPTS * GROUP)) / 2)
            finished: list[Rollout] = []
            for id, (request, spans) in list(writing.items()):
                spans[:] = joined_spans(*spans, WeightsSpan(self._version, 1))
                if sum(each.tokens for each in spans) >= self._length(id):
                    del writing[id]
                    finished.append(self._rollout(request, tuple(spans)))
            if finished:
                yield finished
        self._written = {id: spans for id, (_, spans) in writing.items()}

    def _rollout(self, request: RolloutRequest, spans: tuple[WeightsSpan, ...]) -> Rollout:
        sampled = sum(each.tokens for each in spans)
        sequence = SequenceRef(request.id, Handle(None), len(request.prompt.ids) + sampled, sampled)
        return Rollout(
            request.id, request.prompt, "text", "text", "stop", self._version, -1.0, (sequence,), spans=spans
        )

    def interrupt(self) -> None:
        """See `Engines.interrupt`."""
        self._interrupted = True

    def update_weights(self, version: int, *, verify: bool) -> list[ReceivedWeights]:
        """See `Engines.update_weights`."""
        self._version = version
        return [ReceivedWeights(WeightSync(version), 0, {"weight": version})]

    def sleep(self, *, discard_weights: bool) -> None:
        """See `Engines.sleep`."""

    @property
    def numbers(self) -> Sequence[int]:
        """See `Engines.numbers`."""
        return (0,)


def seconds_in_turn(length: Callable[[SampleId], int], token_s: float, steps: int) -> float:
    """Return how long the engine takes for a step's responses alone, on average."""
    total = 0.0
    for step in range(1, steps + 1):
        lengths = [
            length(SampleId("train", step, group, member))
            for group in range(PROMPTS)
            for member in range(GROUP)
        ]
        writing = [sum(each > token for each in lengths) for token in range(max(lengths))]
        total += sum(token_s * (1 + count / (PROMPTS * GROUP)) / 2 for count in writing)
    return total / steps


class SleepingGroup(MadeUpGroup):
    """A trainer that sleeps in its updates."""

    def __init__(self, seconds: float, state: TrainState) -> None:
        super().__init__(1, Meter())
        self._seconds, self._state = seconds, state

    def run(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `WorkerGroup.run`."""
        if method.__name__ == "update":
            time.sleep(self._seconds)
        if method.__name__ == "weight_digests":
            return [{"weight": self._state.weights_version}]
        return super().run(method, arguments)


def configuration(staleness: int, mini_batches: int, *, partial: bool) -> RunConfig:
    """Configure GRPO with some updates per step."""
    return run_config(
        build(
            {
                "data": {"train_batch_size": PROMPTS},
                "algorithm": {"adv_estimator": "grpo", "use_kl_in_reward": False},
                "actor_rollout_ref": {
                    "actor": {"ppo_mini_batch_size": PROMPTS // mini_batches},
                    "rollout": {"n": GROUP, "partial": partial},
                    "model": {"path": "model"},
                },
                "trainer": {"max_staleness": staleness, "rollout_devices": 1},
            }
        )
    )


def measure(
    staleness: int,
    length: Callable[[SampleId], int],
    token_s: float,
    training: float,
    steps: int,
    *,
    partial: bool,
    mini_batches: int = 1,
) -> float:
    """Run the loop, and return the seconds per step, once engine and trainer are both at work."""
    run, state = configuration(staleness, mini_batches, partial=partial), TrainState(kl_coef=0.0)
    prompts: Any = [Prompt(row=row, ids=(1, 2, 3, 4), text="p") for row in range(PROMPTS)]
    group: Any = SleepingGroup(training / mini_batches, state)
    engines: Any = WritingEngines(length, token_s)
    scorer: Any = RandomScores()
    checkpoints: Any = NoCheckpoints()
    shapes = {"actor": ModelShape(1000, 1, 1, 1)}
    with Progress(WARM_UP + steps, step_lines=False, stream=io.StringIO()) as progress:
        observer = Observer(run, group.infos, shapes, progress, NoTracker())  # type: ignore[arg-type]
        workers = WorkerClient(group, engines, run)
        plan = Plan(prompts, PromptOrder(PROMPTS, PROMPTS, seed=1), None, WARM_UP + steps)
        rollouts = RolloutQueue(run, plan, workers, scorer, observer, state)
        trainer = Trainer(run, plan, workers, rollouts, observer, checkpoints, state, Stop())
        rollouts.start()
        for _ in range(WARM_UP):
            trainer.next_step()
        began = time.perf_counter()
        for _ in range(steps):
            trainer.next_step()
        seconds = (time.perf_counter() - began) / steps
        rollouts.close()
        rollouts.join()
    return seconds


def main() -> int:
    """Measure both kinds of lengths, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--token-ms", type=float, default=3.0, help="that the engine takes per token")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    token_s, rows = given.token_ms / 1000, list[dict[str, Any]]()
    for length in (same, long_tailed):
        training = seconds_in_turn(length, token_s, WARM_UP + given.steps)
        times: dict[tuple[int, bool, int], list[float]] = {each: [] for each in SETTINGS}
        for number in range(ALTERNATIONS):
            for k, partial, mini_batches in SETTINGS:
                print(
                    f"\r{length.__name__}, {number + 1} of {ALTERNATIONS}: k={k}, partial={partial}, {mini_batches} ",
                    end="",
                    file=sys.stderr,
                )
                how: Any = {"partial": partial, "mini_batches": mini_batches}
                times[k, partial, mini_batches].append(
                    measure(k, length, token_s, training, given.steps, **how)
                )
        in_turn = statistics.median(times[0, False, 1])
        rows += [
            {
                "lengths": length.__name__,
                "max_staleness": k,
                "partial": partial,
                "mini_batches": mini_batches,
                "step_s": round(statistics.median(each), 4),
                "ratio": round(statistics.median(each) / in_turn, 3),
                "ideal": round(training / in_turn, 3),
            }
            for (k, partial, mini_batches), each in times.items()
        ]
    print(
        "\n| lengths | max_staleness | partial | mini-batches | step | ratio | ideal |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['lengths']} | {row['max_staleness']} | {str(row['partial']).lower()} | {row['mini_batches']} | "
            f"{row['step_s']:.3f} s | "
            f"{row['ratio']:.2f} | {row['ideal']:.2f} |"
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
