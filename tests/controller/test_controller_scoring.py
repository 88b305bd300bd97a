"""When a reward model scores, engines on the same devices have released their cache, and go on generating after it."""

from typing import Any

from controller.test_controller_without_torch import Group
from iiverl_core.cluster.engines import ColocatedEngines
from iiverl_core.config import build, run_config
from iiverl_core.controller.worker_client import WorkerClient
from iiverl_core.samples import SampleId, TokenSequence


def test_engines_release_their_cache_before_each_scoring() -> None:
    group = Group()
    worker: Any = group.worker
    worker.release_cache = lambda: None
    worker.score = lambda batch: [0.5] * len(batch.sequences)
    run = run_config(build({"reward_model": {"enable": True, "model": {"path": "reward"}}}))
    client = WorkerClient(group, ColocatedEngines(group, 1), run)
    sequences = {SampleId("train", 1, 0, member): TokenSequence.untrained([1, 2]) for member in range(2)}
    for _ in range(2):
        assert client.score(sequences) == [0.5, 0.5]
    assert worker.asked == ["release_cache", "score"] * 2
