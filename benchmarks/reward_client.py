"""What a scored sample costs: this client beside `requests` in a thread pool, on one loopback server.

    python benchmarks/reward_client.py [--rounds 3] [--json FILE]

The server answers after 50 ms and lives in a process of its own; all clients take turns in every round, and medians
over the rounds are shown. `cpu` is the client process's CPU time a sample, all threads counted; `of ideal` is the rate
against what arithmetic allows, connections / 50 ms (times the samples in a request, for `/v1/rewards`).
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from iiverl_reward_client import ProtocolName, RewardClient, RewardSample, Scored, SyncRewardClient

DELAY = 0.05
BATCH = 32
TEXT = "Let x be the number of apples. " * 64  # 2 kB, a short answer of a model
INFO = json.dumps({"type": "math_verifiable", "answer": {"value": "42"}})
CAPABILITIES = {"protocol": "iiverl-rewards/1", "server_version": "benchmark", "types": [], "unavailable": {}}


class _Server(asyncio.Protocol):
    """Just enough HTTP to answer fast, so that little of what is measured is the server."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, _, body = self.received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if b"\r\n\r\n" not in self.received or len(body) < int(length or 0):
            return
        self.received = b""
        path = head.split(b" ", 2)[1]
        if path == b"/v1/capabilities":
            self.answer(CAPABILITIES)
            return
        answer: dict = {"score": 1.0}
        if path == b"/v1/rewards":
            ids = [sample["id"] for sample in json.loads(body)["samples"]]
            answer = {"server_version": "benchmark", "results": [{"id": i, "score": 1.0} for i in ids]}
        asyncio.get_running_loop().call_later(DELAY, self.answer, answer)

    def answer(self, answer: dict) -> None:
        body = json.dumps(answer).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


async def serve() -> None:
    """Listen on a free port and print it."""
    server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def samples(count: int) -> list[RewardSample]:
    """Make samples of an ordinary size."""
    return [RewardSample(str(i), TEXT, INFO) for i in range(count)]


def by_client(protocol: ProtocolName, synchronous: bool = False) -> Callable[[str, int, int], None]:
    """Score by this client, asynchronous or through its synchronous face."""

    def make(url: str, workers: int) -> RewardClient:
        return RewardClient(url, protocol=protocol, max_workers=workers, batch_size=BATCH)

    async def score(url: str, workers: int, count: int) -> None:
        async with make(url, workers) as client:
            check(await client.score_batch(samples(count)), count)

    def run(url: str, workers: int, count: int) -> None:
        if synchronous:
            with SyncRewardClient(make(url, workers)) as client:
                check(client.score_batch(samples(count)), count)
        else:
            asyncio.run(score(url, workers, count))

    return run


def check(outcomes: list, count: int) -> None:
    """End the benchmark where a sample has no score."""
    if sum(isinstance(outcome, Scored) for outcome in outcomes) != count:
        raise SystemExit(f"not all samples were scored: {outcomes[:3]}")


def by_requests(url: str, workers: int, count: int) -> None:
    """Score by `requests` in a thread pool, a session for each thread."""
    import requests

    local = threading.local()

    def score(sample: RewardSample) -> float:
        if not hasattr(local, "session"):
            local.session = requests.Session()
        payload = {"llm_output": sample.llm_output, "verification_info": sample.verification_info}
        return local.session.post(f"{url}/reward", json=payload, timeout=30).json()["score"]

    with ThreadPoolExecutor(workers) as pool:
        if sum(pool.map(score, samples(count))) != count:
            raise SystemExit("not all samples were scored")


def by_httpx(url: str, workers: int, count: int) -> None:
    """Score by one plain `httpx.AsyncClient`."""

    async def run() -> None:
        waiting = iter(samples(count))
        limits = httpx.Limits(max_connections=workers, max_keepalive_connections=workers)
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:

            async def work() -> None:
                for sample in waiting:
                    payload = {"llm_output": sample.llm_output, "verification_info": sample.verification_info}
                    (await client.post(f"{url}/reward", json=payload)).json()["score"]

            await asyncio.gather(*[work() for _ in range(workers)])

    asyncio.run(run())


@dataclass
class Row:
    """One line of the table; medians over the rounds."""

    client: str
    path: str
    connections: int
    samples: int
    rate: float
    of_ideal: float
    cpu_ms: float


CASES: list[tuple[str, str, int, int, Callable[[str, int, int], None]]] = [
    ("iiverl", "/reward", 20, 1600, by_client("reward")),
    ("iiverl, synchronous", "/reward", 20, 1600, by_client("reward", True)),
    ("requests, threads", "/reward", 20, 1600, by_requests),
    ("httpx.AsyncClient", "/reward", 20, 1600, by_httpx),
    ("iiverl", "/reward", 200, 8000, by_client("reward")),
    ("iiverl, synchronous", "/reward", 200, 8000, by_client("reward", True)),
    ("requests, threads", "/reward", 200, 4000, by_requests),
    ("httpx.AsyncClient", "/reward", 200, 400, by_httpx),
    ("iiverl", "/v1/rewards", 20, 20_000, by_client("v1")),
    ("iiverl, synchronous", "/v1/rewards", 20, 20_000, by_client("v1", True)),
]


def measure(url: str, rounds: int) -> list[Row]:
    """Run every case once a round, and take medians."""
    seen: dict[int, list[tuple[float, float]]] = {i: [] for i in range(len(CASES))}
    for _ in range(rounds):
        for i, (_, _, connections, count, run) in enumerate(CASES):
            cpu, wall = time.process_time(), time.perf_counter()
            run(url, connections, count)
            seen[i].append((count / (time.perf_counter() - wall), (time.process_time() - cpu) / count * 1e3))
    rows = []
    for i, (name, path, connections, count, _) in enumerate(CASES):
        rate, cpu_ms = (statistics.median(values) for values in zip(*seen[i], strict=True))
        ideal = connections / DELAY * (BATCH if path == "/v1/rewards" else 1)
        rows.append(Row(name, path, connections, count, rate, rate / ideal, cpu_ms))
    return rows


def show(rows: list[Row]) -> None:
    """Print the table."""
    print(
        f"{'client':22}{'path':13}{'connections':>11}{'samples/s':>11}{'of ideal':>10}{'cpu ms/sample':>15}"
    )
    for row in rows:
        print(
            f"{row.client:22}{row.path:13}{row.connections:11}{row.rate:11.0f}{row.of_ideal:10.1%}{row.cpu_ms:15.3f}"
        )


def main() -> None:
    """Run the benchmark, or its server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the numbers; standard output without it")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        rows = measure(f"http://127.0.0.1:{int(server.stdout.readline())}", arguments.rounds)
    finally:
        server.terminate()
        server.wait()
    show(rows)
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "rounds": arguments.rounds}
    text = json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1)
    if arguments.json is None:
        print(text)
    else:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
