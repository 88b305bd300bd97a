"""A package outside the repository adds one of each kind, and a run uses all of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

INFOS = """
from iiverl_core.registry.algorithms import EstimatorInfo, PolicyLossInfo
from iiverl_core.registry.backends import BackendInfo
from iiverl_core.registry.engines import EngineInfo
from iiverl_core.registry.metrics import Metric
from iiverl_core.registry.rewards import RewardSource
from iiverl_core.registry.rollouters import RollouterInfo
from iiverl_core.registry.trackers import TrackerInfo

ESTIMATOR = EstimatorInfo(name="quarter", summary="the same advantage for each token", code="extras.code:quarter")
LOSS = PolicyLossInfo(
    name="plain", summary="the policy gradient", code="extras.code:plain", reads=("clip_low",),
    loss_agg_mode="token-sum",
)
ENGINE = EngineInfo(name="counting_hf", summary="hf that counts", code="extras.code:counting_engine")
ROLLOUTER = RollouterInfo(name="one_token", summary="responses of a token", code="extras.code:OneToken")
BACKEND = BackendInfo(name="counting_fsdp", title="Counting", summary="FSDP that counts", code="extras.code:Backend")
SOURCE = RewardSource(name="constant", summary="the same score for all", code="extras.code:constant")
GENERATED = Metric(name="extras/generated", unit="requests", summary="requests to the engine", code="extras.code:generated")
UPDATES = Metric(name="extras/updates", unit="updates", summary="optimizer steps", code="extras.code:updates")
FAULTY = Metric(name="extras/faulty", unit="", summary="never there", code="extras.code:faulty")
TRACKER = TrackerInfo(name="lines", summary="a file of lines", code="extras.code:Lines")
"""

CODE = """
import torch

from iiverl_core.rewards.functions import FunctionScorer
from iiverl_core.rollout.from_config import hf_engine
from iiverl_core.rollout.rollouter import SingleTurn
from iiverl_fsdp.backend import FSDPBackend
from iiverl_reward_client import Scored

calls = {"submit": 0, "step": 0}


def quarter(batch, settings):
    advantages_T = torch.full_like(batch.rewards_T, 0.25)
    return advantages_T, advantages_T


def plain(batch, settings):
    return -batch.advantages_T * batch.log_probs_T, {"clip_low": torch.full_like(batch.log_probs_T, settings.clip_low)}


def counting_engine(config, device):
    engine = hf_engine(config, device)
    submit = engine.submit

    def counted(*args, **kwargs):
        calls["submit"] += 1
        return submit(*args, **kwargs)

    engine.submit = counted
    return engine


class OneToken(SingleTurn):
    def __init__(self, config, tokenizer):
        assert tokenizer.eos_token == "<end>"

    async def rollout(self, request, generate):
        async def shorter(prompt_ids):
            return await generate(prompt_ids, max_tokens=1)

        return await super().rollout(request, shorter)


class Backend(FSDPBackend):
    def step(self, lr):
        calls["step"] += 1
        return super().step(lr)


def constant(config):
    return FunctionScorer(lambda sample: Scored(0.75))


def generated(rollouts):
    assert len(rollouts) == 16
    return calls["submit"]


def updates(rollouts):
    return calls["step"]


def faulty(rollouts):
    raise RuntimeError("as it is meant")


class Lines:
    def __init__(self, setup):
        setup.folder.mkdir(parents=True, exist_ok=True)
        self.file = (setup.folder / "lines.txt").open("a")
        self.file.write(f"{setup.experiment}\\n")

    def log(self, metrics, step):
        self.file.write(f"{step} {metrics['extras/generated']}\\n")

    def log_generations(self, rows, step):
        pass

    def close(self):
        self.file.close()
"""

ENTRY_POINTS = """
[iiverl.algorithms]
quarter = extras:ESTIMATOR
plain = extras:LOSS
[iiverl.engines]
counting = extras:ENGINE
[iiverl.rollouters]
one_token = extras:ROLLOUTER
[iiverl.backends]
counting = extras:BACKEND
[iiverl.rewards]
constant = extras:SOURCE
[iiverl.metrics]
generated = extras:GENERATED
updates = extras:UPDATES
faulty = extras:FAULTY
[iiverl.trackers]
lines = extras:TRACKER
"""


@pytest.fixture
def iiverl(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Install the package into a folder, and give a function that runs the command with it."""
    site = tmp_path / "site"
    (site / "extras").mkdir(parents=True)
    (site / "extras" / "__init__.py").write_text(INFOS)
    (site / "extras" / "code.py").write_text(CODE)
    metadata = site / "extras-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: extras\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [Path(sys.executable).with_name("iiverl"), *arguments]
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.slow
def test_a_run_uses_one_of_each_kind(
    iiverl: Callable[..., subprocess.CompletedProcess[str]],
    quickstart_overrides: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    file = Path(__file__).parents[2] / "examples" / "quickstart" / "quickstart.yaml"
    run = [
        str(file),
        *quickstart_overrides(
            "custom_reward_function.path=null",
            "reward_model.reward_manager=constant",
            "algorithm.adv_estimator=quarter",
            "actor_rollout_ref.actor.policy_loss.loss_mode=plain",
            "actor_rollout_ref.actor.clip_ratio_low=0.125",
            "actor_rollout_ref.actor.strategy=counting_fsdp",
            "actor_rollout_ref.rollout.name=counting_hf",
            "actor_rollout_ref.rollout.agent.default_agent_loop=one_token",
            "trainer.logger=[lines]",
        ),
    ]

    listed = iiverl("algorithms").stdout
    assert "  quarter                       the same advantage for each token\n" in listed
    assert "  plain     the policy gradient\n" in listed

    validated = iiverl("validate", *run)
    assert (validated.returncode, validated.stderr) == (0, "")
    unread = iiverl("validate", *run, "actor_rollout_ref.actor.clip_ratio_high=0.3", "algorithm.gamma=0.5")
    assert "clip_ratio_high: has no effect" in unread.stderr and "gamma: has no effect" in unread.stderr
    near = iiverl("validate", *run, "actor_rollout_ref.rollout.name=counting_h")
    assert "expected vllm, hf or counting_hf, not 'counting_h'; did you mean counting_hf?" in near.stderr

    trained = iiverl("train-ppo", *run)
    assert trained.returncode == 0, trained.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["critic/score/mean"] for record in records] == [0.75] * 3
    assert [record["critic/advantages/mean"] for record in records] == [0.25] * 3
    assert [record["actor/clip_low"] for record in records] == pytest.approx([0.125] * 3)
    assert [record["response_length/max"] for record in records] == [1] * 3
    assert [record["extras/generated"] for record in records] == [16, 32, 48]
    assert [record["extras/updates"] for record in records] == [1, 2, 3]
    assert not any("extras/faulty" in record for record in records)
    assert (
        "extras/faulty" in trained.stderr + trained.stdout
        and "as it is meant" in trained.stderr + trained.stdout
    )
    assert (tmp_path / "run" / "lines.txt").read_text() == "quickstart\n1 16.0\n2 32.0\n3 48.0\n"
