"""The functions of docs/functions.md, run as a user runs them; and what a run says of one that does something else."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.errors import IIVerlError
from iiverl_core.python_files import split_function_name
from iiverl_reward_client.server import Settings
from quickstart_fixtures import QUICKSTART
from reward_server.served import running

Make = Callable[..., Loaded]
PAGE = (Path(__file__).parents[2] / "docs" / "functions.md").read_text("utf-8")
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the page, in which the run is started."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def service() -> Iterator[str]:
    """A service that scores a response by its share of the right letters."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
            right = sum(a == b for a, b in zip(sent["response"], sent["truth"], strict=False))
            body = json.dumps({"score": right / 8}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_page_has_an_example_of_each_kind() -> None:
    assert set(FILES) == {
        *("my_estimator.py", "my_baseline.py", "my_loss.py", "my_selection.py"),
        *("my_reward.py", "my_async_reward.py", "my_verifier.py"),
    }
    assert PAGE.count("```python") == len(FILES)
    for place in re.findall(r"(?:adv_estimator|loss_mode): (\S+\.py:\w+)", PAGE):
        file, name = split_function_name(place) or ("", "")
        assert file == "file.py" or f"def {name}(" in FILES[file]


def test_estimator_loss_and_reward_function(quickstart: Make, folder: Path) -> None:
    train(
        quickstart(
            f"algorithm.adv_estimator={folder}/my_estimator.py:best_of_group",
            f"{LOSS_MODE}={folder}/my_loss.py:clipped",
            f"custom_reward_function.path={folder}/my_reward.py",
            "custom_reward_function.reward_kwargs={bonus: 0.5}",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",  # a second update, from which on ratios differ from 1
            "actor_rollout_ref.actor.clip_ratio=1e-6",
        )
    )
    steps = history(folder)
    assert len(steps) == 3
    for step in steps:
        assert step["critic/score/mean"] == pytest.approx(0.5 * step["reward/same_length/mean"], abs=1e-6)
        assert step["reward/failed"] == 0
        assert step["critic/advantages/min"] == 0  # the best of each group is rewarded, and nothing else
    assert any(step["actor/clipped_tokens"] > 0 for step in steps)
    assert any(step["actor/grad_norm"] > 0 for step in steps)


def test_objects_that_ask_more_of_a_step_and_an_async_reward(
    quickstart: Make, folder: Path, service: str
) -> None:
    train(
        quickstart(
            f"algorithm.adv_estimator={folder}/my_baseline.py:greedy_baseline",
            f"{LOSS_MODE}={folder}/my_selection.py:unlikely_tokens",
            f"custom_reward_function.path={folder}/my_async_reward.py",
            f"custom_reward_function.reward_kwargs={{url: {service}}}",
        )
    )
    steps = history(folder)
    assert len(steps) == 3
    assert any(step["critic/score/mean"] > 0 for step in steps)
    assert all(step["reward/failed"] == 0 for step in steps)
    assert all(0.15 < step["actor/selected_tokens"] < 0.35 for step in steps)


def test_verifier(folder: Path) -> None:
    with running(Settings(workers=1), [f"{folder}/my_verifier.py:exact"]) as server:
        right, wrong = server.rewards((" 42 ", "exact", 42), ("41", "exact", 42))
    assert (right["score"], wrong["score"]) == (1.0, 0.0)


WRONG = {
    "estimator": (
        "algorithm.adv_estimator",
        "def own(batch, settings):\n    x = batch.segments.sum(batch.rewards_T)\n    return x, x\n",
        r"adv_estimator: own in {file} returned a tensor of shape \(\d+,\) of float32 for \d+ tokens as advantages_T\.",
    ),
    "loss": (
        LOSS_MODE,
        "def own(batch, settings):\n    return -batch.advantages_T * batch.log_probs_T\n",
        r"loss_mode: own in {file} returned a tensor of shape \(\d+,\) of float32\.\nIt has to return \(losses_T, metrics\)",
    ),
    "choice": (
        LOSS_MODE,
        "from iiverl_core.algorithms import PolicyLoss\n"
        "def loss(batch, settings):\n    return -batch.advantages_T * batch.log_probs_T, {}\n"
        "own = PolicyLoss(loss, select_tokens=lambda batch, settings: batch.no_such_field)\n",
        r"loss_mode: own in {file}, select_tokens, failed\.\nown\.py, line 4, in <lambda>: .*\nAttributeError: ",
    ),
    "error": (
        LOSS_MODE,
        "def own(batch, settings):\n    return {}['x'], {}\n",
        r"loss_mode: own in {file} failed\.\nown\.py, line 2, in own: return .*\nKeyError: 'x'$",
    ),
    "reward": (
        "custom_reward_function",
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return solution_str\n",
        r"compute_score in {file} returned '.*' of type str, .*number.* dict",
    ),
}


def overrides(key: str, file: Path) -> list[str]:
    if key == "custom_reward_function":
        return [f"{key}.path={file}"]
    return [f"{key}={file}:own"]


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_function_ends_the_run_with_one_message(quickstart: Make, tmp_path: Path, kind: str) -> None:
    key, source, message = WRONG[kind]
    file = tmp_path / "own.py"
    file.write_text(source)
    with pytest.raises(IIVerlError) as caught:
        train(quickstart(*overrides(key, file)))
    assert re.search(message.format(file=re.escape(str(file))), str(caught.value))


@pytest.mark.slow
@pytest.mark.alone
def test_the_command_under_ray_prints_the_same_message(
    quickstart_overrides: Callable[..., list[str]], tmp_path: Path
) -> None:
    key, source, message = WRONG["error"]
    file = tmp_path / "own.py"
    file.write_text(source)
    command = [Path(sys.executable).with_name("iiverl"), "train-ppo", QUICKSTART / "quickstart.yaml"]
    done = subprocess.run(
        [*command, *quickstart_overrides(*overrides(key, file), runtime="ray")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    told = done.stderr[done.stderr.index("error: ") :].rstrip()
    assert re.search(message.format(file=re.escape(str(file))), told)
    assert len(told.splitlines()) <= 4
    assert "Traceback" not in done.stderr and "\x1b" not in done.stdout + done.stderr
