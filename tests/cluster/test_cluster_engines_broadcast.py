"""Engines apart whose weights are broadcast to them, here over gloo: whatever dies meanwhile, nothing is lost."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from iiverl_core.config import Loaded
from iiverl_core.controller import train

Make = Callable[..., Loaded]
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.usefixtures("ray_is_up")]


@pytest.fixture(autouse=True)
def small_broadcasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send weights as between GPUs, in buckets so small that a tiny model has several."""
    from iiverl_core.cluster import ray_engines
    from iiverl_core.cluster.weight_transport import BroadcastRendezvous

    monkeypatch.setattr(ray_engines, "transport_factory", lambda device: BroadcastRendezvous("127.0.0.1"))
    monkeypatch.setattr(ray_engines, "MEGABYTE", 2**15)


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Kill a process that generates, at chosen weights versions, while a bucket is on its way to it."""
    from iiverl_core.cluster import ray_engines

    def arm(versions: set[int], size: int) -> list[int]:
        update, next_bucket = ray_engines.RayEngines.update_weights, ray_engines.RayEngines._next_bucket
        chance, deaths, due = random.Random(0), [], []

        def armed(self, version: int, *, verify: bool) -> Any:
            if version in versions:
                due.append(chance.randrange(1, 4))  # the bucket at which it dies
            return update(self, version, verify=verify)

        def disturbed(self):
            bucket = next_bucket(self)
            if due:
                due[0] -= 1
                if due[0] == 0:
                    due.clear()
                    victim = psutil.Process(self.infos[chance.randrange(size)].pid)
                    os.kill(victim.pid, signal.SIGKILL)
                    victim.wait(10)
                    deaths.append(victim.pid)
            return bucket

        monkeypatch.setattr(ray_engines.RayEngines, "update_weights", armed)
        monkeypatch.setattr(ray_engines.RayEngines, "_next_bucket", disturbed)
        return deaths

    return arm


def answers(folder: Path, step: int) -> list[tuple]:
    rows = pq.read_table(folder / "samples" / f"{step}.parquet").to_pylist()
    return [(row["group"], row["member"], row["response"], row["weights_version"]) for row in rows]


def check_samples(folder: Path, steps: int) -> None:
    for step in range(1, steps + 1):
        rows = answers(folder, step)
        assert sorted(row[:2] for row in rows) == [(g, m) for g in range(4) for m in range(4)]
        assert {row[3] for row in rows} == {step - 1}


def test_engines_killed_in_the_middle_of_updates_change_nothing(
    quickstart: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killer: Callable[..., list[int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The samples are those of a run without a death, whose weights go through the store."""
    from iiverl_core.cluster import ray_engines
    from iiverl_core.cluster.weight_transport import StoreTransport

    with monkeypatch.context() as patch:
        patch.setattr(ray_engines, "transport_factory", lambda device: StoreTransport())
        train(quickstart("trainer.rollout_devices=2", runtime="ray", folder="undisturbed"))
    deaths = killer({0, 2}, size=2)
    train(quickstart("trainer.rollout_devices=2", runtime="ray", folder="disturbed"))
    assert len(deaths) == 2
    assert capfd.readouterr().out.count("died; it is started again") == 2
    check_samples(tmp_path / "disturbed", 3)
    for step in (1, 2, 3):
        assert answers(tmp_path / "disturbed", step) == answers(tmp_path / "undisturbed", step)


@pytest.mark.vllm
def test_weights_arrive_in_vllm_bit_by_bit(
    quickstart: Make, tmp_path: Path, killer: Callable[..., list[int]]
) -> None:
    pytest.importorskip("vllm")
    deaths = killer({1}, size=1)
    vllm = (
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.verify_weights=true",
        "actor_rollout_ref.rollout.max_num_seqs=64",
    )
    train(quickstart(*vllm, "trainer.rollout_devices=1", runtime="ray"))
    assert len(deaths) == 1
    check_samples(tmp_path / "run", 3)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["rollout/kl"] < 1e-5 for record in records)
