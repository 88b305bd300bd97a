"""How much shorter is a step whose responses are generated beside training?

    python benchmarks/async_overlap.py [--seconds 0.1] [--steps 60] [--json FILE]

The real loop (`Trainer`, `RolloutQueue`) runs over an engine and a trainer that sleep: as long as each other on average,
always the same time or, for the engine, times from a distribution with a long tail. Steps in turn
(`max_staleness: 0`) and beside each other alternate, three times. `ratio` is the time of a step compared with that in turn;
`ideal` is what the slower side would take without ever waiting.
"""

import argparse
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from iiverl_core.samples import Handle, Prompt, Rollout, SequenceRef
from iiverl_core.stopping import Stop
from iiverl_core.telemetry import Progress

PROMPTS, GROUP = 4, 2
STALENESS = (0, 1, 2, 4)
ALTERNATIONS = 3


class SleepingEngines:
    """An engine that sleeps for the time of a step, and responds. Implements `Engines`."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self._seconds, self._version = seconds, -1

    def generate(
        self, requests: Sequence[Sequence[RolloutRequest]], sampling: str
    ) -> Iterator[list[Rollout]]:
        """See `Engines.generate`."""
        (own,) = requests
        time.sleep(self._seconds(own[0].id.step))
        yield [
            Rollout(
                each.id,
                each.prompt,
                "text",
                "text",
                "stop",
                self._version,
                -1.0,
                (SequenceRef(each.id, Handle(None), 8, 4),),
            )
            for each in own
        ]

    def update_weights(self, version: int, *, verify: bool) -> list[ReceivedWeights]:
        """See `Engines.update_weights`."""
        self._version = version
        return [ReceivedWeights(WeightSync(version), 0, {"weight": version})]

    def sleep(self, *, discard_weights: bool) -> None:
        """See `Engines.sleep`."""

    def __len__(self) -> int:
        return 1


class SleepingGroup(MadeUpGroup):
    """A trainer that sleeps in its update, of which a step has one."""

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


def configuration(staleness: int) -> RunConfig:
    """Configure GRPO with one update per step."""
    return run_config(
        build(
            {
                "data": {"train_batch_size": PROMPTS},
                "algorithm": {"adv_estimator": "grpo"},
                "actor_rollout_ref": {
                    "actor": {"ppo_mini_batch_size": PROMPTS},
                    "rollout": {"n": GROUP},
                    "model": {"path": "model"},
                },
                "trainer": {"max_staleness": staleness, "rollout_devices": 1},
            }
        )
    )


def measure(staleness: int, generating: Callable[[int], float], training: float, steps: int) -> float:
    """Run the loop, and return the seconds per step."""
    run, state = configuration(staleness), TrainState(kl_coef=0.0)
    prompts: Any = [Prompt(row=row, ids=(1, 2, 3, 4), text="p") for row in range(PROMPTS)]
    group: Any = SleepingGroup(training, state)
    engines: Any = SleepingEngines(generating)
    scorer: Any = RandomScores()
    checkpoints: Any = NoCheckpoints()
    shapes = {"actor": ModelShape(1000, 1, 1, 1)}
    with Progress(steps, step_lines=False, stream=io.StringIO()) as progress:
        observer = Observer(run, group.infos, shapes, progress, NoTracker())  # type: ignore[arg-type]
        workers = WorkerClient(group, engines, run)
        plan = Plan(prompts, PromptOrder(PROMPTS, PROMPTS, seed=1), None, steps)
        rollouts = RolloutQueue(run, plan, workers, scorer, observer, state)
        trainer = Trainer(run, plan, workers, rollouts, observer, checkpoints, state, Stop())
        rollouts.start()
        began = time.perf_counter()
        for _ in range(steps):
            trainer.next_step()
        seconds = (time.perf_counter() - began) / steps
        rollouts.close()
        rollouts.join()
    return seconds


def long_tailed(mean: float) -> Callable[[int], float]:
    """Return a time by step: log-normal with σ = 0.8, so that one step in twenty takes over three times the median."""
    sigma = 0.8
    return lambda step: mean * random.Random(step).lognormvariate(-(sigma**2) / 2, sigma)


def main() -> int:
    """Measure both kinds of times, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.1, help="that each side takes on average")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, generating in {
        "equal": lambda step: given.seconds,
        "long-tailed": long_tailed(given.seconds),
    }.items():
        times: dict[int, list[float]] = {k: [] for k in STALENESS}
        for _ in range(ALTERNATIONS):
            for k in STALENESS:
                times[k].append(measure(k, generating, given.seconds, given.steps))
        mean = statistics.fmean(generating(step) for step in range(1, given.steps + 1))
        ideal = max(mean, given.seconds)
        in_turn = statistics.median(times[0])
        rows += [
            {
                "times": name,
                "max_staleness": k,
                "step_s": round(statistics.median(each), 4),
                "ratio": round(statistics.median(each) / in_turn, 3),
                "ideal": round(ideal / (mean + given.seconds), 3),
            }
            for k, each in times.items()
        ]
    print("| generating takes | max_staleness | step | ratio | ideal |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['times']} | {row['max_staleness']} | {row['step_s']:.3f} s | {row['ratio']:.2f} | {row['ideal']:.2f} |"
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
