"""Command lines of verl, as a shell hands them over after `iiverl train-ppo`."""

import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from iiverl_cli.main import app

II_VERL = r"""
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files=data/gsm8k/train.parquet \
    data.train_batch_size=64 \
    actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    trainer.experiment_name='qwen2_7b_function_rm' \
    trainer.n_gpus_per_node=8
"""
ARRAYS = r"""
MODEL_PATH=org/model; rollout_tp=${ROLLOUT_TP:-2}; train_files="['$HOME/a.parquet', '$HOME/b c.parquet']"
DATA=(
    algorithm.adv_estimator=grpo
    data.train_files="$train_files"
)
EXTRA=(
    model_engine=megatron
    +actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full
    ++actor_rollout_ref.model.override_config.rope_scaling.factor=2
    ~data.val_files
)
python3 -m verl.trainer.main_ppo \
    "${DATA[@]}" \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    actor_rollout_ref.rollout.tensor_model_parallel_size=${rollout_tp} \
    trainer.logger='["console","wandb"]' \
    "${EXTRA[@]}" \
    "$@"
"""
MEGATRON = r"""
PYTHONUNBUFFERED=1 IIVERL_TEST="a b" python3 -u -m verl.trainer.main_ppo --config-path=config \
    --config-name='ppo_megatron_trainer.yaml' trainer.nnodes=2
"""
OWN_FILE = "python -m verl.trainer.main_ppo --config-path=conf --config-name own trainer.nnodes=2"


def words(script: str, folder: Path, *arguments: str) -> list[str]:
    """Let a shell expand a script; return the words of its command, with the variables that are set in front of it."""
    script = script.replace("PYTHONUNBUFFERED=1 IIVERL_TEST", "show PYTHONUNBUFFERED=1 IIVERL_TEST")
    script = script.replace("\npython", "\nshow python").replace("python -m", "show python -m")
    done = subprocess.run(
        ["bash", "-euc", "show() { printf '%s\\0' \"$@\"; }\n" + script, "script", *arguments],
        capture_output=True,
        check=True,
        cwd=folder,
        env={"HOME": "/home/me", "PATH": "/usr/bin:/bin"},
    )
    return done.stdout.decode().split("\0")[:-1]


def shown(pasted: list[str], *command: str) -> tuple[dict, Result]:
    result = CliRunner().invoke(app, ["config", "show", "--changed", *command, *pasted])
    return yaml.safe_load(result.stdout), result


def test_the_command_line_of_ii_verls_readme(tmp_path: Path) -> None:
    values, result = shown(words(II_VERL, tmp_path))
    assert "C012" not in result.stderr
    assert values["algorithm"] == {"adv_estimator": "grpo"}
    assert values["data"] == {"train_files": ["data/gsm8k/train.parquet"], "train_batch_size": 64}
    assert values["actor_rollout_ref"]["actor"]["optim"] == {"lr": 1e-6}
    assert values["actor_rollout_ref"]["model"] == {
        "path": "Qwen/Qwen2-7B-Instruct",
        "use_remove_padding": True,
    }
    assert values["trainer"] == {"n_gpus_per_node": 8, "experiment_name": "qwen2_7b_function_rm"}


def test_a_command_line_of_arrays(tmp_path: Path) -> None:
    values, result = shown(words(ARRAYS, tmp_path, "trainer.nnodes=2", "trainer.val_only=True"))
    assert "C012" not in result.stderr
    assert values["data"]["train_files"] == ["/home/me/a.parquet", "/home/me/b c.parquet"]
    assert values["actor_rollout_ref"]["actor"]["strategy"] == "megatron"
    assert values["actor_rollout_ref"]["model"]["override_config"] == {"rope_scaling": {"factor": 2}}
    assert values["trainer"]["logger"] == ["console", "wandb"]
    assert values["trainer"]["nnodes"] == 2
    assert values["trainer"]["val_only"] is True


def test_the_defaults_of_verls_megatron_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IIVERL_TEST", raising=False)
    monkeypatch.setenv("PYTHONUNBUFFERED", "0")
    values, _ = shown(words(MEGATRON, tmp_path))
    import os

    assert os.environ["IIVERL_TEST"] == "a b"
    monkeypatch.delenv("IIVERL_TEST")
    assert values["actor_rollout_ref"]["actor"]["strategy"] == "megatron"
    assert values["trainer"] == {"nnodes": 2}


def test_a_file_that_hydra_would_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/own.yaml").write_text("trainer: {n_gpus_per_node: 4}\n")
    values, _ = shown(words(OWN_FILE, tmp_path))
    assert values["trainer"] == {"n_gpus_per_node": 4, "nnodes": 2}


def test_a_file_before_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("trainer: {n_gpus_per_node: 4}\n")
    values, _ = shown(["run.yaml", "python3", "-m", "verl.trainer.main_ppo", "trainer.nnodes=2"])
    assert values["trainer"] == {"n_gpus_per_node": 4, "nnodes": 2}


def test_overrides_alone() -> None:
    values, _ = shown(["trainer.nnodes=2", "+data.seed=3"])
    assert values == {"data": {"seed": 3}, "trainer": {"nnodes": 2}}
    values, _ = shown(["data.train_files=list.yaml", "trainer.nnodes=2"])  # a value, not the file of the run
    assert values == {"data": {"train_files": ["list.yaml"]}, "trainer": {"nnodes": 2}}
