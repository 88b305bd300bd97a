"""The controller's own time and bytes per step, by the number of samples and of devices.

    python benchmarks/controller_scale.py [--samples 1024,4096,16384,65536] [--devices 64] [--output FILE]

A real training step of GRPO with a reference and four updates runs over workers that compute nothing: they return made-up
data of the size that real ones return, for sequences of 4096 tokens on average. What is sent is pickled as Ray does, so
the time includes pickling in both directions. It is CPU time of the controller's process in the fastest of three
steps, without the time to make data up, and without what Ray does per call. The second table is for one number of samples over 64, 512 and 4096 devices;
it has the time at 0.2 ms per call, an assumption.
"""

import argparse
import io
import json
import os
import pickle
import platform
import resource
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from iiverl_core.cluster.engines import ColocatedEngines
from iiverl_core.cluster.messages import (
    Advantages,
    RankBatch,
    ReceivedWeights,
    TokenArrays,
    Updated,
    WeightSync,
    WorkerInfo,
)
from iiverl_core.cluster.store import LocalStore
from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.config.roles import ROLE_KEYS
from iiverl_core.controller.collector import Plan
from iiverl_core.controller.observer import ModelShape, Observer
from iiverl_core.controller.rollout_queue import RolloutQueue
from iiverl_core.controller.state import TrainState
from iiverl_core.controller.trainer import Trainer
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.data import PromptOrder
from iiverl_core.garbage import collect_rarely
from iiverl_core.rollout import RolloutRequest
from iiverl_core.samples import Handle, Handles, Prompt, Rollout, SampleId, SequenceRef
from iiverl_core.stopping import Stop
from iiverl_core.telemetry import Progress
from iiverl_core.training import ParallelRank, StepResult
from iiverl_reward_client import Outcome, Scored

PROMPT, TOKENS, GROUP = 512, 4096, 16
STEP_S, LIMIT = 60.0, 0.02  # a step, and the part of it that the controller may take with 16k samples
STEPS = 3
CALL_S = 0.2e-3  # what one call to an actor is assumed to take of Ray's time
YIELDED = 8  # rollouts that an engine yields together
CHARACTERS = 4  # per token
REFERENCE = 250  # bytes of a pickled reference of Ray


def make_reference() -> bytes:
    """Make up bytes of the size of a pickled reference of Ray: an id, and the address of the owner."""
    return os.urandom(REFERENCE)


@dataclass
class Meter:
    """What passes between controller and workers, and the time that is not the controller's own."""

    sent: int = 0
    received: int = 0
    calls: int = 0
    made_up_s: float = 0.0

    def clear(self) -> None:
        """Start again from zero."""
        self.sent = self.received = self.calls = 0
        self.made_up_s = 0.0

    def pickled(self, values: Iterable[Any]) -> list[bytes]:
        """Pickle what is sent, a call each, as Ray does."""
        sent = [cloudpickle.dumps(value) for value in values]
        self.calls += len(sent)
        self.sent += sum(map(len, sent))
        return sent

    @contextmanager
    def making_up(self) -> Iterator[None]:
        """Leave out the time within the block."""
        start = time.process_time()
        yield
        self.made_up_s += time.process_time() - start

    def unpickled(self, received: bytes) -> Any:
        """Unpickle what is received."""
        self.received += len(received)
        return pickle.loads(received)


class MadeUpWorker:
    """Answers each call of a `TrainerWorker` with data of the size of a real answer."""

    def __init__(self, version: Callable[[], int]) -> None:
        self._version = version
        self._rng = np.random.default_rng(0)
        self._text = "a word " * (2 * TOKENS * CHARACTERS // 7)

    def evaluate(self, role: str, batch: RankBatch) -> TokenArrays:
        """See `TrainerWorker.evaluate`."""
        reference = make_reference()
        count = len(batch.sequences)
        return TokenArrays(Handles(Handle(reference, i) for i in range(count)), [-1000.0] * count)

    def update(self, role: str, batch: RankBatch, lr: float) -> Updated:
        """See `TrainerWorker.update`."""
        return Updated({f"{role}/metric_{i}": 1.0 for i in range(12)}, StepResult(1.0, taken=True))

    def advantages(
        self, sequences: list[SequenceRef], scores: list[float], baselines: None, kl_coef: float
    ) -> Advantages:
        """See `TrainerWorker.advantages`."""
        reference = make_reference()
        each = Handles(Handle(reference, i) for i in range(len(sequences)))
        return Advantages(each, each, [0.0] * len(scores), scores, 0.0, {"advantages": (0.0, 1.0, -1.0)})

    def rollouts(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """Make up the rollouts of requests, of lengths around `TOKENS`."""
        made = []
        for request in requests:
            trained = int(self._rng.integers(1, 2 * (TOKENS - PROMPT)))
            text = self._text[: trained * CHARACTERS]
            sequence = SequenceRef(request.id, Handle(None), PROMPT + trained, trained, prefix=PROMPT)
            made.append(
                Rollout(
                    request.id,
                    request.prompt,
                    text,
                    text + "<|im_end|>",
                    "stop",
                    self._version(),
                    -1000.0,
                    (sequence,),
                )
            )
        return made

    def memory(self) -> dict[str, int]:
        """See `TrainerWorker.memory`."""
        return {"cpu_memory_used": 1}

    def sleep(self, discard_weights: bool) -> None:
        """See `TrainerWorker.sleep`."""

    def update_rollout_weights(self, sync: WeightSync) -> ReceivedWeights:
        """See `TrainerWorker.update_rollout_weights`."""
        return ReceivedWeights(sync, 0, {"weight": sync.version})

    def weight_digests(self, base: bool) -> dict[str, int]:
        """See `TrainerWorker.weight_digests`."""
        return {"weight": self._version()}


class MadeUpGroup:
    """A group of workers that share prompts. Implements `WorkerGroup`."""

    def __init__(self, devices: int, meter: Meter) -> None:
        self.store, self._meter, self.version = LocalStore(), meter, 0
        self._worker = MadeUpWorker(lambda: self.version)
        layouts = dict.fromkeys(ROLE_KEYS, "shared")
        self.infos = [
            WorkerInfo(
                rank=i,
                host="host",
                pid=i,
                device="NVIDIA H100",
                parallel_ranks=dict.fromkeys(ROLE_KEYS, ParallelRank(i, devices)),
                parameters={"actor": 0},
                trained_parameters={},
                layouts=layouts,
            )
            for i in range(devices)
        ]

    def run(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `WorkerGroup.run`."""
        sent = self._meter.pickled(arguments)
        with self._meter.making_up():
            if method.__name__ == "update_rollout_weights":
                self.version = arguments[0][0].version
            call = getattr(self._worker, method.__name__)
            results = [cloudpickle.dumps(call(*pickle.loads(each))) for each in sent]
        return [self._meter.unpickled(each) for each in results]

    def run_on(self, rank: int, method: Callable[..., Any], *arguments: Any) -> Any:
        """See `WorkerGroup.run_on`."""
        return self.run(method, [arguments])[0]

    def stream(
        self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[Any, Any]]:
        """See `WorkerGroup.stream`."""
        sent = self._meter.pickled(arguments)
        with self._meter.making_up():
            results = []
            for each in sent:
                requests, _ = pickle.loads(each)
                for start in range(0, len(requests), YIELDED):
                    rollouts = self._worker.rollouts(requests[start : start + YIELDED])
                    results.append((make_reference(), cloudpickle.dumps(rollouts)))
        for reference, rollouts in results:
            yield reference, self._meter.unpickled(rollouts)

    def close(self) -> None:
        """See `WorkerGroup.close`."""


class RandomScores:
    """Scores at once. Implements `Scorer`."""

    busy_spans: Sequence[tuple[float, float]] = ()
    busy_seconds = 0.0

    def __init__(self) -> None:
        self._outcomes: dict[SampleId, Outcome] = {}

    def submit(self, rollout: Rollout) -> None:
        """See `Scorer.submit`."""
        self._outcomes[rollout.id] = Scored(float(rollout.id.member % 2), {"format": 1.0})

    def collect(self, ids: Collection[SampleId], may_fail: float | None = None) -> dict[SampleId, Outcome]:
        """See `Scorer.collect`."""
        return {id: self._outcomes.pop(id) for id in ids}

    def is_scored(self, ids: Collection[SampleId]) -> bool:
        """See `Scorer.is_scored`."""
        return True

    def close(self) -> None:
        """See `Scorer.close`."""


class NoCheckpoints:
    """Saves nothing, in place of a `Checkpointer`."""

    def advance(self) -> None:
        """See `Checkpointer.advance`."""

    def due(self, step: int, *, last: bool) -> bool:
        """See `Checkpointer.due`."""
        return False


class NoTracker:
    """Logs nothing. Implements `Tracker`."""

    def log(self, metrics: Any, step: int) -> None:
        """See `Tracker.log`."""

    def log_generations(self, rows: Any, step: int) -> None:
        """See `Tracker.log_generations`."""

    def close(self) -> None:
        """See `Tracker.close`."""


def configuration(samples: int) -> RunConfig:
    """Configure GRPO with four updates per step, so that old log-probs are computed."""
    prompts = samples // GROUP
    actor = {
        "ppo_mini_batch_size": prompts // 4,
        "use_kl_loss": True,
        "use_dynamic_bsz": True,
        "ppo_max_token_len_per_gpu": 8 * TOKENS,
    }
    policy = {"actor": actor, "rollout": {"n": GROUP}, "model": {"path": "model"}}
    return run_config(
        build(
            {
                "data": {
                    "train_batch_size": prompts,
                    "max_prompt_length": PROMPT,
                    "max_response_length": 2 * TOKENS,
                },
                "algorithm": {"adv_estimator": "grpo"},
                "actor_rollout_ref": policy,
            }
        )
    )


def measure(samples: int, devices: int) -> dict[str, float]:
    """Run a few steps, and measure the fastest."""
    run, meter, state = configuration(samples), Meter(), TrainState(kl_coef=0.0)
    count = samples // GROUP
    prompts: Any = [
        Prompt(row=row, ids=tuple(range(1000, 1000 + PROMPT)), text="a word " * (PROMPT * CHARACTERS // 7))
        for row in range(count)
    ]
    group: Any = MadeUpGroup(devices, meter)
    shapes = {"actor": ModelShape(7_000_000_000, 32, 32, 128)}
    scorer: Any = RandomScores()
    checkpoints: Any = NoCheckpoints()
    with Progress(STEPS, step_lines=False, stream=io.StringIO()) as progress:
        observer = Observer(run, group.infos, shapes, progress, NoTracker())  # type: ignore[arg-type]
        workers = WorkerClient(group, ColocatedEngines(group, 1), run)
        plan = Plan(prompts, PromptOrder(count, count, seed=1), None, STEPS)
        rollouts = RolloutQueue(run, plan, workers, scorer, observer, state)
        trainer = Trainer(run, plan, workers, rollouts, observer, checkpoints, state, Stop())
        rollouts.start()
        times = []
        for _ in range(STEPS):
            meter.clear()
            start = time.process_time()
            trainer.next_step()
            times.append(time.process_time() - start - meter.made_up_s)
    seconds = min(times)
    return {
        "samples": samples,
        "devices": devices,
        "controller_s": round(seconds, 3),
        "ms_per_sample": round(1000 * seconds / samples, 4),
        "calls": meter.calls,
        "sent_mb": round(meter.sent / 1e6, 2),
        "received_mb": round(meter.received / 1e6, 2),
        "sent_bytes_per_sample": round(meter.sent / samples),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def problems(rows: Sequence[dict[str, float]]) -> list[str]:
    """Say where the time is above the limit, or grows faster than the number of samples."""
    found = [
        f"{row['samples']} samples take {row['controller_s']} s of the controller"
        for row in rows
        if row["controller_s"] > LIMIT * STEP_S * max(row["samples"] / 16384, 1)
    ]
    first, last = rows[0], rows[-1]
    if last["ms_per_sample"] > 1.2 * first["ms_per_sample"]:
        found.append(
            f"a sample takes {last['ms_per_sample']} ms of {last['samples']}, {first['ms_per_sample']} ms of {first['samples']}"
        )
    return found


def table(rows: Sequence[dict[str, float]]) -> str:
    """Format rows for benchmarks/README.md."""
    lines = [
        "| samples | devices | controller | per sample | of a 60 s step | calls | with 0.2 ms per call | sent per sample | received |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['samples']} | {row['devices']} | {row['controller_s']:.2f} s | {row['ms_per_sample']:.3f} ms "
        f"| {row['controller_s'] / STEP_S:.1%} | {row['calls']} | {row['controller_s'] + row['calls'] * CALL_S:.2f} s "
        f"| {row['sent_bytes_per_sample']} B | {row['received_mb']:.0f} MB |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print tables, write JSON; return 1 if time is above the limit or not linear."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", default="1024,4096,16384,65536", help="numbers of samples")
    parser.add_argument("--devices", type=int, default=64, help="devices for the first table")
    parser.add_argument("--scale", default="64,512,4096", help="numbers of devices for the second table")
    parser.add_argument("--scale-samples", type=int, default=16384, help="samples for the second table")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    collect_rarely()
    by_samples = [measure(int(samples), given.devices) for samples in given.samples.split(",")]
    by_devices = [measure(given.scale_samples, int(devices)) for devices in given.scale.split(",")]
    found = problems(by_samples)
    print(table(by_samples), table(by_devices), *found, sep="\n\n")
    if given.output:
        facts = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
        }
        result = {**facts, "by_samples": by_samples, "by_devices": by_devices, "problems": found}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
