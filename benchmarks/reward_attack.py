"""Whether a reward server holds under many clients of whose answers some are hostile.

    python benchmarks/reward_attack.py [--clients 400] [--seconds 30] [--hostile 0.1] [--json FILE]

A real reward server, in a process of its own, scores answers of mathematics, each client one after the other. Hostile
answers would take a verifier without limits hours, or all memory. Every honest answer must get its score, and every
hostile one 0. Printed are the outcomes, the samples per second, the seconds that honest answers took, and the memory and
open files of the server's processes over time, the first second left out. The exit code is 1 if an outcome is wrong.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from iiverl_reward_client import RewardClient, RewardSample, Scored

INFO = {"type": "math_verifiable", "answer": {"value": "42"}}
HONEST = {
    "\\boxed{42}": 1.0,
    "The answer is \\boxed{42.0}.": 1.0,
    "The answer is \\boxed{41}.": 0.0,
    "\\boxed{\\frac{84}{2}}": 0.0,  # restates the problem
}
HOSTILE = (
    "\\boxed{9^{9^{9^9}}}",
    "\\boxed{(10^9)!}",
    "\\boxed{100!!!}",
    "\\boxed{" + "(" * 5000 + "42" + ")" * 5000 + "}",
    "\\boxed{" + "\\frac{1}{" * 3000 + "2" + "}" * 3000 + "}",
    "\\boxed{(a+b+c+d+e+f+g+h)^{60}}",
    "\\boxed{" + "7" * 1_000_000 + "}",
)
START_S = 60


@dataclass
class Record:
    """What happened: outcomes by kind, seconds of honest answers, and readings of the server over time."""

    outcomes: Counter[str] = field(default_factory=Counter)
    honest_s: list[float] = field(default_factory=list)
    readings: list[dict[str, float]] = field(default_factory=list)

    @property
    def wrong(self) -> dict[str, int]:
        """Outcomes that should not be."""
        return {kind: n for kind, n in self.outcomes.items() if not kind.endswith("as it should be")}


async def ask(url: str, number: int, end: float, share: float, record: Record) -> None:
    """Be one client until the time is over."""
    rng = random.Random(number)
    async with RewardClient(url, max_workers=1) as client:
        while (began := time.monotonic()) < end:
            if hostile := rng.random() < share:
                answer, expected = rng.choice(HOSTILE), 0.0
            else:
                answer, expected = rng.choice(list(HONEST.items()))
            outcome = await client.score(RewardSample(str(number), answer, INFO))
            who = "hostile" if hostile else "honest"
            if isinstance(outcome, Scored):
                what = "as it should be" if outcome.score == expected else f"scored {outcome.score}"
            else:
                what = f"failed: {outcome.kind}"
            record.outcomes[f"{who} {what}"] += 1
            if not hostile:
                record.honest_s.append(time.monotonic() - began)


async def read(server: psutil.Process, end: float, record: Record) -> None:
    """Read memory and open files of the server, once a second."""
    while time.monotonic() < end:
        await asyncio.sleep(1)
        memory = files = 0
        for process in (server, *server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                memory += process.memory_info().rss
                files += process.num_fds()
        record.readings.append({"MB": memory / 1e6, "files": files})


async def attack(url: str, server: psutil.Process, arguments: argparse.Namespace) -> Record:
    """Run all clients."""
    record, end = Record(), time.monotonic() + arguments.seconds
    async with AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        for number in range(arguments.clients):
            group.create_task(ask(url, number, end, arguments.hostile, record))
        group.create_task(read(server, end, record))
    return record


def wait_for(url: str) -> None:
    """Wait until the server answers."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ping").status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"{url} does not answer after {START_S} s")


def main() -> int:
    """Start the server, attack it, and print what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--hostile", type=float, default=0.1, help="share of hostile answers")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    url = f"http://127.0.0.1:{arguments.port}"
    command = [sys.executable, "-m", "iiverl_reward_client.server", "--port", str(arguments.port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(url)
        began = time.monotonic()
        record = asyncio.run(attack(url, psutil.Process(server.pid), arguments))
        took = time.monotonic() - began
    finally:
        server.terminate()
        server.wait()
    readings = record.readings[1:]
    quarter = max(len(readings) // 4, 1)
    result = {
        "clients": arguments.clients,
        "seconds": round(took, 1),
        "outcomes": dict(record.outcomes),
        "samples per second": round(record.outcomes.total() / took, 1),
        "honest answers, s": {
            "median": round(statistics.median(record.honest_s), 2),
            "longest": round(max(record.honest_s), 2),
        },
        **{
            f"{what} in the first and last quarter": [
                round(statistics.fmean(reading[what] for reading in part))
                for part in (readings[:quarter], readings[-quarter:])
            ]
            for what in ("MB", "files")
        },
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(record.wrong))


if __name__ == "__main__":
    raise SystemExit(main())
