"""`iiverl launch`: what it prints is a valid script, RayJob or task, for the machines of the configuration."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner, Result

from iiverl_cli.main import app

RUN = """\
data: {train_files: train.jsonl, train_batch_size: 8}
algorithm: {adv_estimator: grpo, use_kl_in_reward: false}
actor_rollout_ref:
  model: {path: org/model}
  actor: {ppo_mini_batch_size: 8}
  rollout: {name: hf, n: 4}
trainer: {n_gpus_per_node: 8, nnodes: 2, save_freq: 10, grace_seconds: 120, experiment_name: 'My run: 7B'}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    Path("train.jsonl").write_text(
        8 * '{"prompt": "1+1?", "data_source": "openai/gsm8k", "ground_truth": "2"}\n'
    )


def launch(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["launch", *arguments])
    assert result.exit_code == code, result.output
    return result


def check(value: Any, schema: str) -> None:
    loaded = json.loads((Path(__file__).parent / schema).read_text())
    Draft202012Validator.check_schema(loaded)
    Draft202012Validator(loaded).validate(value)


@pytest.mark.parametrize(
    "options", [(), ("--interface", "ib0", "--time", "1-00:00"), ("--nodes", "1", "trainer.device=cpu")]
)
def test_the_script_for_slurm_is_valid_bash(options: tuple[str, ...]) -> None:
    script = launch("slurm", "run.yaml", *options).stdout
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "@" not in script.replace("TERM@150", "").replace('"${@:2}"', "").replace("[@]", "")
    nodes = "1" if "--nodes" in options else "2"
    devices = "--cpus-per-task=8" if "trainer.device=cpu" in options else "--gpus-per-node=8"
    for line in ("--job-name=my-run-7b", f"--nodes={nodes}", devices, "--signal=B:TERM@150", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert ("\nexport NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0\n" in script) == ("ib0" in options)
    assert "iiverl train-ppo run.yaml" in script and "trainer.placement_timeout=600 &\n" in script


@pytest.mark.parametrize(
    ("override", "machines"),
    [("trainer.rollout_devices=4", 3), ("trainer.rollout_devices=16", 4), ("trainer.nnodes=1", 1)],
)
def test_machines_hold_all_devices(override: str, machines: int) -> None:
    assert f"#SBATCH --nodes={machines}\n" in launch("slurm", "run.yaml", override).stdout


def test_the_ray_job_fits_its_schema() -> None:
    config_map, job = yaml.safe_load_all(
        launch("kuberay", "run.yaml", "--image", "me/iiverl:1", "--interface", "eth0").stdout
    )
    assert config_map["data"] == {"run.yaml": RUN}
    check(job, "rayjob.schema.json")
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2
    pod = workers["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert {"name": "GLOO_SOCKET_IFNAME", "value": "eth0"} in container["env"]
    assert pod["terminationGracePeriodSeconds"] == 150
    assert {volume["name"] for volume in pod["volumes"]} == {
        mount["name"] for mount in container["volumeMounts"]
    }
    subprocess.run(["bash", "-n"], input=job["spec"]["entrypoint"], text=True, check=True)
    assert "iiverl train-ppo /etc/iiverl/run.yaml" in job["spec"]["entrypoint"]
    with pytest.raises(Exception, match="minReplica'"):
        check(yaml.safe_load(yaml.safe_dump(job).replace("minReplicas", "minReplica")), "rayjob.schema.json")


@pytest.mark.parametrize("image", [None, "me/iiverl:1"])
def test_the_task_for_skypilot_fits_its_schema(image: str | None) -> None:
    options = ("--image", image) if image else ()
    task = yaml.safe_load(launch("skypilot", "run.yaml", "--accelerator", "H200", *options).stdout)
    check(task, "skypilot_task.schema.json")
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H200:8"
    assert ("setup" in task) == (image is None)
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert "trainer.default_local_dir='/shared/checkpoints/verl_examples/My run: 7B'" in task["run"].replace(
        "'trainer", "trainer"
    ).replace("dir=/", "dir='/")


def test_quotes_survive() -> None:
    script = launch("slurm", "run.yaml", "trainer.project_name=it's $HOME").stdout
    (line,) = (line for line in script.splitlines() if line.startswith("iiverl train-ppo"))
    printed = subprocess.run(
        ["bash", "-c", f"printf '%s|' {line.removesuffix(' &')}"], capture_output=True, text=True
    )
    assert "trainer.project_name=it's $HOME|" in printed.stdout


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["trainer.save_freq=-1"], "trainer.save_freq: no checkpoints are saved"),
        (["trainer.resume_mode=disable"], "trainer.resume_mode: checkpoints are not resumed"),
        (["trainer.grace_seconds=0"], "trainer.grace_seconds: SIGTERM ends the run at once"),
    ],
)
def test_runs_that_would_not_resume_are_reported(overrides: list[str], told: str) -> None:
    assert f"warning: {told}" in launch("slurm", "run.yaml", *overrides).stderr
    assert "warning" not in launch("slurm", "run.yaml").stderr


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["trainer.nods=1"], "error[C012]"),
        (["trainer.runtime=local", "trainer.n_gpus_per_node=1", "trainer.nnodes=1"], "runs in one process"),
    ],
)
def test_an_invalid_run_prints_nothing(overrides: list[str], told: str) -> None:
    result = launch("slurm", "run.yaml", *overrides, code=2)
    assert told in result.stderr and not result.stdout


def test_the_containers_files_name_what_there_is() -> None:
    """Nothing builds them here; this only finds what has been renamed."""
    root = Path(__file__).parents[2]
    service = yaml.safe_load((root / "docker" / "compose.yaml").read_text())["services"]["iiverl"]
    context = (root / "docker" / service["build"]["context"]).resolve()
    dockerfile = (context / service["build"]["dockerfile"]).read_text()
    assert context == root
    (target,) = re.findall(r"^RUN make (\S+)", dockerfile, re.MULTILINE)
    assert re.search(rf"^{re.escape(target)}:", (root / "Makefile").read_text(), re.MULTILINE)
