"""Steps of a run are computed again from what it recorded: the same bits without an engine, and what other keys change."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from iiverl_cli.main import app
from iiverl_core.config import build, load
from iiverl_core.config.recorded import load_recorded
from iiverl_core.controller import train
from iiverl_core.controller.run_diff import diff_runs
from quickstart_fixtures import QUICKSTART, short_run

ACTOR = "actor_rollout_ref.actor"
LAST = 4


@pytest.fixture(scope="module")
def run(quickstart_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PPO with dynamic sampling, an adaptive KL in the reward, and several updates per step; checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = (
        "algorithm.adv_estimator=gae",
        f"critic.model.path={quickstart_inputs}/model",
        "critic.model.enable_gradient_checkpointing=false",
        "critic.model.fsdp_config.mixed_precision={param_dtype: fp32}",
        "critic.optim.lr=1e-3",
        "critic.ppo_epochs=2",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=3",
        "algorithm.use_kl_in_reward=true",
        "algorithm.kl_ctrl={type: adaptive, kl_coef: 0.01, target_kl: 0.1, horizon: 20}",
        f"{ACTOR}.ppo_mini_batch_size=2",
        f"{ACTOR}.shuffle=true",
        f"trainer.total_training_steps={LAST}",
        "trainer.save_freq=2",
        "trainer.max_actor_ckpt_to_keep=null",
    )
    loaded = load(QUICKSTART / "quickstart.yaml", short_run(quickstart_inputs, folder, *options))
    assert not loaded.obstacles, loaded.obstacles
    train(loaded)
    return folder


def replay(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["replay", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_step_has_the_metrics_of_the_run_to_the_last_bit(run: Path) -> None:
    """The fourth, from the third, whose checkpoint is not there either: both are computed."""
    shutil.rmtree(run / "global_step_4")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, text = replay(run, "--step", LAST)
    assert code == 0, text
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("actor/pg_loss", "actor/grad_norm", "critic/vf_loss", "critic/grad_norm"):
        assert f"{name} {record[name]}" in text
    assert text.count("equal to the last bit") == 2 and "step 3: " in text
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}  # nothing is written


def test_another_configuration_shows_what_it_changes(run: Path) -> None:
    code, text = replay(run, "--step", 3, f"{ACTOR}.clip_ratio=0.001")
    assert code == 0, text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}
    before, now, relative = map(float, rows["actor/grad_norm"])
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[2])
    assert before == record["actor/grad_norm"] != now
    assert relative == pytest.approx((now - before) / before, rel=0.01)
    assert "actor/pg_clipfrac" in rows
    assert not {"critic/grad_norm", "critic/score/mean"} & rows.keys()  # what the actor's loss does not touch


def test_a_run_can_be_trained_again_without_an_engine(run: Path, tmp_path: Path) -> None:
    """From the beginning, with checkpoints; what it wrote is the run's, and can be replayed itself."""
    again = tmp_path / "again"
    code, text = replay(run, "--step", 3, "--from", 1, "--output", again, "trainer.save_freq=1")
    assert code == 0 and text.count("equal to the last bit") == 3, text
    metrics, samples, tensors = diff_runs(run, again).results
    assert (metrics.count, samples.count, tensors.count) == (3, 3, 1)
    assert metrics.equal and samples.equal and tensors.equal, (metrics, samples, tensors)
    states = [json.loads((each / "global_step_2" / "train_state.json").read_text()) for each in (run, again)]
    assert states[0] | {"run_id": ""} == states[1] | {"run_id": ""}
    assert replay(again, "--step", 3)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--step", 9), "R002", "recorded are steps 1 to 4"),
        (
            ("--step", 3, "actor_rollout_ref.model.path=sshleifer/tiny-gpt2"),
            "R004",
            "weights of another model",
        ),
        (("--step", 3, f"{ACTOR}.clip_ration=0.1"), "C012", "unknown key"),
        (("--step", 2, "--from", 3), "", "comes after --step 2"),
    ],
)
def test_what_cannot_be_computed(run: Path, arguments: tuple[Any, ...], code: str, message: str) -> None:
    exit_code, text = replay(run, *arguments)
    assert exit_code == 2
    assert (f"error[{code}]" in text or not code) and message in text


def test_a_step_needs_a_checkpoint_or_all_steps_before_it(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))  # its samples are found there, too
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"samples": None}))
    shutil.rmtree(copy / "global_step_2")
    (copy / "samples" / "2.json").unlink()
    exit_code, text = replay(copy, "--step", 3)
    assert exit_code == 2 and "error[R003]" in text
    assert "step 2 is not recorded and no checkpoint is saved before it" in text
    (copy / "config.json").unlink()
    exit_code, text = replay(copy, "--step", 3)
    assert exit_code == 2 and "error[R001]" in text


@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
def test_a_recorded_configuration_is_the_one_that_was_loaded(backend: str) -> None:
    """Keys that follow others follow them again, so that an override reaches them."""
    for path in QUICKSTART.parent.glob("*/*.yaml"):
        loaded = load(path, (), backend)
        values = json.loads(json.dumps(loaded.config.model_dump(mode="json")))
        assert load_recorded(values, "config.json").config == loaded.config, path
    recorded = build({"trainer": {"experiment_name": "a"}}, backend).model_dump(mode="json")
    changed = load_recorded(
        recorded, "config.json", ("trainer.experiment_name=b", "data.train_batch_size=96")
    ).config
    assert changed.trainer.default_local_dir.endswith("/b")
    assert changed.actor_rollout_ref.actor.ppo_mini_batch_size == 96
