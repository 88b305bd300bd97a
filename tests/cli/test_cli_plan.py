"""`iiverl plan` as a user types it, and the tables of the example that explains layouts by it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from iiverl_cli.main import app
from iiverl_core.config import load
from iiverl_core.memory import tradeoffs

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE, ADAPTERS = EXAMPLES / "grpo_megatron", EXAMPLES / "grpo_lora"


def blocks(example: Path) -> list[tuple[str, str]]:
    """Commands in an example's README, and what they print."""
    text = (example / "README.md").read_text("utf-8")
    return re.findall(r"```bash\n(iiverl plan .*?)\n```\n```text\n(.*?)\n```", text, re.DOTALL)


BLOCKS = blocks(EXAMPLE)
MODEL = "actor_rollout_ref.model.path"
ENGINES_OF_TWO = "actor_rollout_ref.rollout.tensor_model_parallel_size=2"
SMALL = f"{MODEL}=models/Qwen2.5-7B-Instruct"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example's folder, and no Hub cache but an empty one."""
    monkeypatch.chdir(EXAMPLE)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def iiverl(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_readme_has_a_table_for_each_size() -> None:
    named = " ".join(command for command, _ in BLOCKS)
    assert {path.name for path in (EXAMPLE / "models").iterdir()} == set(re.findall(r"models/(\S+)", named))
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize(("command", "printed"), BLOCKS, ids=range(len(BLOCKS)))
def test_the_readme_shows_what_is_printed(command: str, printed: str) -> None:
    result = iiverl(*shlex.split(command.replace("\\\n", ""))[1:])
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip() == printed
    assert "It fits" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_adapters_of_3_billion_parameters_fit_one_device_of_24_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ADAPTERS)
    ((command, printed),) = blocks(ADAPTERS)
    arguments = shlex.split(command.replace("\\\n", ""))[1:]
    assert iiverl(*arguments).stdout.rstrip() == printed
    assert "rank 32 with 60 M" in printed and "It fits" in printed and "reference" not in printed
    without = [f"{MODEL.removesuffix('path')}lora_rank=0", "trainer.n_gpus_per_node=2"]
    assert iiverl(*arguments, *without).exit_code == 3  # all weights do not fit two


@pytest.mark.parametrize("file", sorted(EXAMPLE.glob("*.yaml")), ids=lambda file: file.name)
def test_the_examples_files_are_valid(file: Path) -> None:
    loaded = load(file)
    assert not loaded.errors
    assert not [p for p in loaded.problems if p.severity == "warning"]


def test_json_has_the_same_numbers() -> None:
    plan = json.loads(iiverl("plan", "grpo_megatron.yaml", SMALL, "--json").stdout)
    assert plan["fits"] is True
    actor = plan["roles"]["actor"]
    assert actor["parameters"] == 7_615_616_512
    assert actor["layout"]["data"] == 4
    assert plan["peak"] == {"phase": "generate", "bytes": plan["phases"]["generate"]["bytes"]}
    for phase in plan["phases"].values():
        assert phase["bytes"] == sum(phase["items"].values())
    table = iiverl("plan", "grpo_megatron.yaml", SMALL).stdout
    assert f"{actor['states']['optimizer'] / 1e9:.1f}" in table
    assert f"{plan['engine']['tokens']:,} tokens" in table


def test_a_run_that_does_not_fit_is_reported_and_exits_with_3() -> None:
    too_small = ["plan", "grpo_megatron.yaml", SMALL, "--device-memory", "40"]
    result = iiverl(*too_small)
    assert result.exit_code == 3
    assert "TOO LARGE" in result.stdout
    sentences = " ".join(result.stdout.split())
    assert "update: actor needs 46.2 of 40.0 GB, most for actor: gradients" in sentences
    assert (
        "the engine has no room for one sequence; raise actor_rollout_ref.rollout.gpu_memory_utilization"
        in sentences
    )
    result = iiverl(*too_small, "--json")
    assert result.exit_code == 3
    assert not json.loads(result.stdout)["fits"]


EVERY_MODEL = [
    "algorithm.adv_estimator=gae",
    f"critic.model.path={EXAMPLE}/models/Qwen2.5-7B-Instruct",
    "reward_model.enable=true",
    f"reward_model.model.path={EXAMPLE}/models/Qwen2.5-7B-Instruct",
]


@pytest.mark.parametrize("backend", ["fsdp", "megatron"])
@pytest.mark.parametrize("memory", ["10000", "1"])
@pytest.mark.parametrize("model", sorted(path.name for path in (EXAMPLE / "models").iterdir()))
def test_no_line_is_wider_than_80_columns(backend: str, memory: str, model: str) -> None:
    path = f"{MODEL}=models/{model}"
    strategy = f"actor_rollout_ref.actor.strategy={backend}"
    result = iiverl("plan", "grpo_megatron.yaml", path, strategy, *EVERY_MODEL, "--device-memory", memory)
    assert result.exit_code == (3 if memory == "1" else 0), result.output
    assert all(role in result.stdout for role in ("actor", "reference", "critic", "reward"))
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []
    assert "…" not in result.stdout


def test_fsdp_collects_layers() -> None:
    strategy = "actor_rollout_ref.actor.strategy=fsdp"
    result = iiverl("plan", "grpo_megatron.yaml", SMALL, strategy)
    assert "fsdp, each model over all 8 devices" in result.stdout
    assert "gathered" in result.stdout


def test_whole_gradients_are_offered_where_they_fit_and_counted() -> None:
    strategy, key = (
        "actor_rollout_ref.actor.strategy=fsdp",
        "actor_rollout_ref.actor.fsdp_config.gradient_sync",
    )
    command = ["plan", "grpo_megatron.yaml", SMALL, strategy]

    def gradients(*more: str) -> float:
        printed = iiverl(*command, *more).stdout
        return float(re.findall(r"^gradients +([0-9.]+)", printed, re.MULTILINE)[0])

    assert f"With {key}: mini_batch" in iiverl(*command).stdout
    assert "takes 30.5 GB more" in " ".join(iiverl(*command).stdout.split())
    assert gradients(f"{key}=mini_batch") - gradients() == pytest.approx(30.5, abs=0.11)
    assert "mini_batch" not in iiverl(*command, f"{key}=mini_batch").stdout
    small = ["--device-memory", "50", "actor_rollout_ref.rollout.gpu_memory_utilization=0.6"]
    assert "mini_batch" not in iiverl(*command, *small).stdout
    refused = iiverl(*command, f"{key}=mini_batch", *small)
    assert refused.exit_code == 3
    assert f"set {key} to micro_batch" in " ".join(refused.stdout.split())


def test_compiled_blocks_pay_from_some_step_on_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, key = (
        "actor_rollout_ref.actor.strategy=fsdp",
        "actor_rollout_ref.actor.fsdp_config.compile_blocks",
    )

    def printed(*more: str) -> str:
        return " ".join(iiverl("plan", "grpo_megatron.yaml", SMALL, strategy, *more).stdout.split())

    assert f"blocks are not compiled ({key}): on a CPU" in printed()
    assert "which never pays" in printed()
    assert f"blocks are compiled ({key})" in printed(f"{key}=true")
    assert "blocks" not in iiverl("plan", "grpo_megatron.yaml", SMALL).stdout
    # 6 FLOPs per weight and token of full length, over 8 devices, half of which are saved at twice the speed.
    run = load(EXAMPLE / "grpo_megatron.yaml").run
    tokens = run.data.train_batch_size * run.rollout.n * 2048
    step = 6 * 7.6e9 * tokens / 8 / 1e12
    monkeypatch.setitem(tradeoffs.MEASURED, "GPU", tradeoffs.Measured(10 * step, 2.0, 1e12))
    assert "2.00 times as fast, which pays from 20 steps on" in printed()
    assert "not measured" not in printed()


def test_a_model_that_is_not_at_hand_is_one_line() -> None:
    result = iiverl("plan", "grpo_megatron.yaml", f"{MODEL}=org/name")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {MODEL}: there is no config.json of 'org/name'")
    assert result.stderr.count("\n") == 1


def test_a_model_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 768}')
    result = iiverl("plan", "grpo_megatron.yaml", f"{MODEL}={tmp_path}")
    assert result.exit_code == 2
    assert "does not say hidden_size" in result.stderr


def test_a_wrong_configuration_is_told_as_by_validate() -> None:
    wrong = ["grpo_megatron.yaml", SMALL, "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=3"]
    result = iiverl("plan", *wrong)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot be divided into model copies of 3" in result.stderr
    assert set(result.stderr.splitlines()) <= set(iiverl("validate", *wrong).stderr.splitlines())


def test_a_backend_need_not_be_installed_to_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    result = iiverl("plan", "grpo_megatron.yaml", SMALL, "--backend", "megatron")
    assert result.exit_code == 0
    assert "megatron, tensor 2" in result.stdout


def test_the_size_of_a_checkpoint_and_the_time_to_write_it() -> None:
    command = ("plan", "grpo_megatron.yaml", SMALL, "--disk-bandwidth", "5")
    checkpoint = json.loads(iiverl(*command, "--json").stdout)["checkpoint"]
    assert checkpoint["seconds"] == pytest.approx(checkpoint["bytes"] / 5e9)
    assert checkpoint["bytes_per_rank"] < checkpoint["bytes"]
    printed = " ".join(iiverl(*command).stdout.split())
    assert f"A checkpoint has {checkpoint['bytes'] / 1e9:.1f} GB, at most " in printed
    assert f"{checkpoint['seconds']:.0f} s at 5 GB/s" in printed


def test_the_table_of_the_page_on_checkpoints_is_what_is_printed() -> None:
    """Its rows have a model, devices, layout, and the numbers that the command above it prints for them."""
    page = (EXAMPLE.parents[1] / "docs" / "checkpoints.md").read_text("utf-8")
    rows = re.findall(r"^\| (\S+) \| `(.*?)` \| (\S+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert len(rows) == 3
    for model, options, total, per_rank, seconds in rows:
        command = ("plan", "grpo_megatron.yaml", f"{MODEL}=models/{model}", *options.split(), "--json")
        checkpoint = json.loads(iiverl(*command).stdout)["checkpoint"]
        assert f"{checkpoint['bytes'] / 1e9:.0f}" == total
        assert f"{checkpoint['bytes_per_rank'] / 1e9:.0f}" == per_rank
        assert f"{checkpoint['bytes'] / 1e9 / 10:.0f}" == seconds


def test_devices_are_divided_by_an_estimate_or_by_a_run(tmp_path: Path) -> None:
    plan = ("plan", "grpo_megatron.yaml", SMALL, f"trainer.default_local_dir={tmp_path}/none")
    assert "divided" not in iiverl(*plan).stdout
    estimated = iiverl(*plan, "--divide", "16")
    assert estimated.exit_code == 0, estimated.output
    assert "16 devices, divided between training and generating" in estimated.stdout
    assert "Estimated for H100, at 40% of its FLOP/s" in estimated.stdout
    assert max(map(len, estimated.stdout.splitlines())) <= 80
    usual = {"timing_s/gen": 40.0, "response_length/mean": 300.0, "response_length/max": 1500.0}
    steps = [{"step": i, "timing_s/step": 60.0, "prompt_length/mean": 99.0, **usual} for i in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)) + "\n")
    measured = iiverl(*plan, "--divide", "16", "--run", str(tmp_path))
    assert "By the medians of 7 steps" in measured.stdout
    assert "40 s of generating and 20 s of training" in " ".join(measured.stdout.split())
    divided = (
        "trainer.rollout_devices=8",
        "trainer.max_staleness=1",
        f"trainer.default_local_dir={tmp_path}",
    )
    printed = json.loads(iiverl(*plan, *divided, "--json").stdout)["division"]
    assert printed["devices"] == 16 and printed["measured"]["steps"] == 7
    assert printed["current"]["training"] == printed["current"]["generating"] == 8
    for each in printed["divisions"][1:]:
        assert each["training"] + each["generating"] == 16 and each["training"] % 2 == 0
        assert 0 <= each["times"]["training_idle"] <= 1 and 0 <= each["times"]["generating_idle"] <= 1
    beside = [each["times"]["step"] for each in printed["divisions"] if each["max_staleness"] == 1]
    assert beside[0] <= printed["current"]["times"]["step"]


def test_what_cannot_be_divided_is_an_error(tmp_path: Path) -> None:
    plan = ("plan", "grpo_megatron.yaml", SMALL)
    for options, message in (
        (("--divide", "16", "--run", str(tmp_path)), "0 steps after the first, and 3 are needed"),
        (("--divide", "16", "--device", "abacus"), "--device: nothing is known of abacus"),
        ((ENGINES_OF_TWO, "--divide", "3"), "3 devices cannot be divided: an engine has 2"),
    ):
        result = iiverl(*plan, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr and result.stderr.count("\n") == 1
