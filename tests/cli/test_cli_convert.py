"""`iiverl convert`: verl's command lines, scripts and YAML files become files of iiverl that load to the same run."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from iiverl_cli.main import app
from iiverl_core.config import load
from iiverl_core.config.convert import convert as convert_values
from iiverl_core.config.schema import keys

SCRIPT = r"""#!/bin/bash
set -xeuo pipefail
export PATH=/opt/cuda/bin:$PATH
cd ~/verl && source activate verl
ray start --head
gpus=$(nvidia-smi -L | wc -l)
model=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
train_files="['$DATA/a.parquet', '$DATA/b c.parquet']"
MEGATRON=(
    actor_rollout_ref.actor.megatron.use_mbridge=True
    +actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full
)
touch touched
/usr/bin/python3 -m verl.trainer.main_ppo --config-name=ppo_megatron_trainer \
    algorithm.adv_estimator=grpo data.train_files="$train_files" \
    actor_rollout_ref.model.path=$model actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.multi_turn.enable=False \
    trainer.experiment_name='grpo_${trainer.project_name}' trainer.logger='["console","wandb"]' \
    trainer.frobnicate=1 distillation.enabled=True trainer.n_gpus_per_node=8 "${MEGATRON[@]}" "$@"
"""
ENDINGS = {
    "plain": "",
    "logged": " 2>&1 | tee train.log",
    "redirected": " > train.log 2>&1 &\nwait",
    "exec": "",
}


def convert(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["convert", *arguments])


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_script_is_expanded_and_nothing_of_it_runs(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", "/data")
    script = SCRIPT.rstrip() + ENDINGS[ending] + "\n"
    Path("run.sh").write_text(
        script.replace("/usr/bin/python3", "exec python3") if ending == "exec" else script
    )
    result = convert("-o", "run.yaml", "run.sh", "trainer.nnodes=2")
    assert result.exit_code == 0, result.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.sh", "run.yaml"]
    text = Path("run.yaml").read_text()
    assert yaml.safe_load(text) == {
        "data": {"train_files": ["/data/a.parquet", "/data/b c.parquet"]},
        "actor_rollout_ref": {
            "model": {"path": "Qwen/Qwen2.5-7B-Instruct"},
            "actor": {"strategy": "megatron", "entropy_coeff": 0},
            "rollout": {"n": 8, "multi_turn": {"enable": False}},
        },
        "algorithm": {"adv_estimator": "grpo", "use_kl_in_reward": False},
        "trainer": {
            "nnodes": 2,
            "n_gpus_per_node": 8,
            "experiment_name": "grpo_${trainer.project_name}",
            "logger": ["console", "wandb"],
        },
    }
    comments = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert "Converted from run.sh" in comments
    unsupported, _, unread = comments.partition("nothing here reads them")
    assert (
        "trainer.frobnicate: unknown key" in unsupported
        and "trainer.frobnicate: unknown key" in result.stderr
    )
    assert "distillation.enabled: not supported" in unsupported
    assert "use_mbridge: weights are read" in unread and "recompute_granularity" in unread
    assert not load("run.yaml").unknown_keys
    assert not {"C031", "C032", "C033"} & {problem.code for problem in load("run.yaml").problems}


def test_a_pasted_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = (
        "python3 -m verl.trainer.main_ppo algorithm.use_kl_in_reward=True trainer.nnodes=2 ~data.val_files"
    )
    values = yaml.safe_load(convert(*command.split()).stdout)
    assert values == {
        "actor_rollout_ref": {"actor": {"entropy_coeff": 0}},
        "algorithm": {"use_kl_in_reward": True},
        "trainer": {"nnodes": 2},
    }


@pytest.mark.parametrize("column", [1, 2], ids=["fsdp", "megatron"])
def test_a_dump_of_hydras_is_the_same_run_before_and_after(
    column: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = Path(__file__).parents[1] / "config" / "verl_trainer_keys.txt"
    rows = [line.split(" |") for line in table.read_text().splitlines() if not line.startswith("#")]
    values: dict = {"defaults": ["ppo_trainer", "_self_"], "hydra": {"run": {"dir": "."}}}
    for row in rows:
        if row[column].strip() not in ("—", "…"):
            *parents, last = row[0].split(".")
            section = values
            for name in parents:
                section = section.setdefault(name, {})
            section[last] = json.loads(row[column])
    Path("verl.yaml").write_text(yaml.safe_dump(values))
    result = convert("-o", "run.yaml", "--changed", "verl.yaml")
    assert result.exit_code == 0, result.output
    before, after = load("verl.yaml", allow_unknown=True), load("run.yaml")
    assert not {"C012", "C015", "C031", "C032", "C033"} & {problem.code for problem in after.problems}
    unread = {
        key for paths in convert_values("verl.yaml", source="", name="").unread.values() for key in paths
    }
    kept = [key for key in keys() if before.origins[key].kind == "file" and key not in unread]
    assert len(kept) > 100
    assert [key for key in kept if after.config.at(key) != before.config.at(key)] == []
    lines = [line for line in Path("run.yaml").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) < 80


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("run.sh", "echo no trainer here\n", "run.sh does not start verl's trainer"),
        ("run.sh", "while true; do sleep 1; done\n", "run.sh does not start verl's trainer"),
        ("run.sh", None, "cannot read run.sh: No such file"),
        ("run.yaml", "data: [\n", "run.yaml:2: error[C002]: not valid YAML"),
        ("run.yaml", None, "run.yaml: error[C001]: the file does not exist"),
    ],
)
def test_input_that_cannot_be_converted_is_one_error(
    name: str, text: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("iiverl_cli.verl_command.SHELL_TIMEOUT_S", 0.3)
    if text is not None:
        Path(name).write_text(text)
    result = convert(name)
    assert result.exit_code == 2
    assert told in " ".join(result.stderr.replace("│", "").split())
    assert not result.stdout


def test_values_that_contradict_each_other_are_reported() -> None:
    result = convert("python3", "-m", "verl.trainer.main_ppo", "algorithm.adv_estimator=grpo")
    assert result.exit_code == 2
    assert "error[C201]" in result.stderr and "adv_estimator: grpo" in result.stdout


def test_references_of_hydras_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA", "/data")
    Path("verl.yaml").write_text("""\
defaults: [ppo_trainer, _self_]
data:
  train_files: ${oc.env:DATA,/none}/train.parquet
  val_files: ${oc.env:IIVERL_NOT_SET,/none}
  seed: null
  max_response_length: 64
actor_rollout_ref:
  model: {path: org/model, mtp: {enable: false}}
  actor:
    use_dynamic_bsz: true
    ppo_max_token_len_per_gpu: ${oc.select:data.nothing,4096}
    optim: {lr: 1e-6, min_lr: "${.lr}"}
  rollout:
    name: ???
    mtp: ${oc.select:actor_rollout_ref.model.mtp,null}
    response_length: ${oc.select:data.max_response_length,512}
    log_prob_use_dynamic_bsz: ${oc.select:actor_rollout_ref.actor.use_dynamic_bsz,false}
    log_prob_max_token_len_per_gpu: ${oc.select:..actor.ppo_max_token_len_per_gpu,1}
trainer:
  project_name: p
  experiment_name: ${trainer.project_name}-${oc.select:.nothing,x}
""")
    result = convert("verl.yaml")
    assert result.exit_code == 0 and "another one" not in result.stderr, result.stderr
    values = yaml.safe_load(result.stdout)
    assert values["data"] == {
        "train_files": "/data/train.parquet",
        "val_files": "/none",
        "max_response_length": 64,
    }
    assert values["actor_rollout_ref"]["actor"]["ppo_max_token_len_per_gpu"] == 4096
    assert values["actor_rollout_ref"]["actor"]["optim"] == {
        "lr": 1e-6,
        "min_lr": "${actor_rollout_ref.actor.optim.lr}",
    }
    assert values["actor_rollout_ref"]["rollout"] == {
        "response_length": 64,
        "log_prob_use_dynamic_bsz": True,
        "log_prob_max_token_len_per_gpu": 4096,
    }
    assert values["trainer"]["experiment_name"] == "${trainer.project_name}-x"
