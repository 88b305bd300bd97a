"""How much of the scoring is hidden behind generation: a run that scores while it generates, and one that does not.

    python benchmarks/reward_overlap.py [--pairs 5] [--runtime local|ray] [--json FILE]

The server takes 100 ms a sample, speaks `POST /reward` and lives in a process of its own; the client sends 20 requests
at a time. A random model of 96 letters writes 768 responses a step, 32 at a time, whose lengths are ragged: it stops at
any letter with a chance of about 1 in 96, and at 384 letters at the latest. In a pair of steps, one sends samples as
they finish, and the other keeps them until all are written, which is the baseline; all else is the same run. The first
pair warms up and is left out.

`exposed` is `timing_s/reward`, what scoring adds to the step's wall time. Two shares are shown: `reward/hidden_fraction`
of the run's own metrics (of the time in which a sample was being scored, what passed while others were
written), and what is left of the baseline's scoring time, 1 - exposed / baseline, medians both.
"""

import argparse
import asyncio
import importlib
import json
import os
import platform
import statistics
import string
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from iiverl_core.config import load
from iiverl_core.rewards import Scorer
from iiverl_core.samples import Rollout, SampleId
from iiverl_core.telemetry import read_history
from iiverl_reward_client import Outcome

DELAY = 0.1
WORKERS = 20
PROMPTS = 48
EXAMPLE = Path(__file__).parents[1] / "examples" / "grpo_reward_api"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer a connection's requests, one after another; each score takes `DELAY` seconds."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
            sample = await reader.readexactly(length)
            if head.startswith(b"post"):
                await asyncio.sleep(DELAY)
            body = json.dumps({"status": "ok", "score": len(sample) % 2}).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def serve() -> None:
    """Listen on a free port and print it."""
    server = await asyncio.start_server(_answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


class TakingTurns:
    """A `Scorer` that hands samples on as they come in one step, and in the next not before all are there."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._kept: list[Rollout] = []
        self._step = 0

    def submit(self, rollout: Rollout) -> None:
        """See `Scorer.submit`."""
        if self._step % 2:
            self._kept.append(rollout)
        else:
            self._scorer.submit(rollout)

    def collect(self, ids: Collection[SampleId], may_fail: float | None = None) -> Mapping[SampleId, Outcome]:
        """See `Scorer.collect`."""
        for rollout in self._kept:
            self._scorer.submit(rollout)
        self._kept.clear()
        self._step += 1
        return self._scorer.collect(ids, may_fail)

    def is_scored(self, ids: Collection[SampleId]) -> bool:
        """See `Scorer.is_scored`."""
        return not self._kept and self._scorer.is_scored(ids)

    @property
    def busy_seconds(self) -> float:
        """See `Scorer.busy_seconds`."""
        return self._scorer.busy_seconds

    @property
    def busy_spans(self) -> Sequence[tuple[float, float]]:
        """See `Scorer.busy_spans`."""
        return self._scorer.busy_spans

    def close(self) -> None:
        """See `Scorer.close`."""
        self._scorer.close()


def make_inputs(folder: Path) -> None:
    """Make the example's model and words, with more letters, so that responses are longer."""
    sys.path.insert(0, str(EXAMPLE))
    example = importlib.import_module("run")
    example.quickstart.ALPHABET = string.printable[:95]
    example.make_inputs(folder)


def run(url: str, folder: Path, pairs: int, runtime: str) -> list[dict]:
    """Train for some pairs of steps, at a learning rate that changes nothing, and return the steps' metrics."""
    make_inputs(folder)
    overrides = {
        "data.train_files": folder / "train.jsonl",
        "data.val_files": "null",
        "data.max_response_length": 384,
        "data.train_batch_size": PROMPTS,
        "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS,
        "actor_rollout_ref.model.path": folder / "model",
        "actor_rollout_ref.model.override_config": "{max_position_embeddings: 512}",
        "actor_rollout_ref.actor.optim.lr": 1e-9,
        "actor_rollout_ref.rollout.n": 16,
        "actor_rollout_ref.rollout.micro_batch_size": 2,
        "reward_api.api_url": url,
        "reward_api.protocol": "reward",
        "reward_api.max_workers": WORKERS,
        "reward_api.save_dir": "null",
        "trainer.runtime": runtime,
        "trainer.n_gpus_per_node": 1 if runtime == "local" else 2,
        "trainer.total_training_steps": 2 * (pairs + 1),
        "trainer.test_freq": -1,
        "trainer.val_before_train": "false",
        "trainer.logger": "[jsonl]",
        "trainer.default_local_dir": folder / "run",
    }
    loaded = load(EXAMPLE / "grpo_reward_api.yaml", [f"{key}={value}" for key, value in overrides.items()])
    if loaded.obstacles:
        raise SystemExit("\n".join(map(str, loaded.obstacles)))
    loop = importlib.import_module("iiverl_core.controller.train")
    make_scorer = loop.make_scorer
    setattr(loop, "make_scorer", lambda config: TakingTurns(make_scorer(config)))  # noqa: B010
    loop.train(loaded)
    return read_history(folder / "run")[2:]


def summarise(steps: list[dict], pairs: int, runtime: str) -> dict:
    """Take medians over the steps that overlapped, and over those that did not."""
    overlapped, baseline = steps[0::2], steps[1::2]

    def median(of: list[dict], name: str) -> float:
        return statistics.median(step[name] for step in of)

    exposed, alone = median(overlapped, "timing_s/reward"), median(baseline, "timing_s/reward")
    return {
        "machine": {
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "runtime": runtime,
            "pairs": pairs,
        },
        "overlapped": {
            "generation_s": median(overlapped, "timing_s/gen"),
            "exposed_s": exposed,
            "hidden_fraction": median(overlapped, "reward/hidden_fraction"),
            "hidden_of_baseline": 1 - exposed / alone,
        },
        "after generation": {"generation_s": median(baseline, "timing_s/gen"), "exposed_s": alone},
        "steps": [
            {name: step[name] for name in ("timing_s/gen", "timing_s/reward", "reward/hidden_fraction")}
            for step in steps
        ],
    }


def show(result: dict) -> None:
    """Print the table."""
    print(
        f"{'scoring':20}{'generation s':>14}{'exposed s':>11}{'hidden_fraction':>17}{'1 - exposed/baseline':>22}"
    )
    for name in ("overlapped", "after generation"):
        row = result[name]
        shares = "".join(
            f"{row[key]:>{width}.1%}" if key in row else "-".rjust(width)
            for key, width in (("hidden_fraction", 17), ("hidden_of_baseline", 22))
        )
        print(f"{name:20}{row['generation_s']:>14.2f}{row['exposed_s']:>11.3f}{shares}")


def main() -> None:
    """Run the benchmark, or its server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--runtime", choices=["local", "ray"], default="local")
    parser.add_argument("--json", type=Path, help="file for the numbers; standard output without it")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with TemporaryDirectory(prefix="iiverl-overlap-") as folder:
            steps = run(url, Path(folder), arguments.pairs, arguments.runtime)
    finally:
        server.terminate()
        server.wait()
    result = summarise(steps, arguments.pairs, arguments.runtime)
    show(result)
    text = json.dumps(result, indent=1)
    if arguments.json is None:
        print(text)
    else:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
