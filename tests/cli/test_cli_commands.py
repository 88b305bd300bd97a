"""The commands as a user types them."""

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from iiverl_cli.main import app
from iiverl_core.errors import ConfigError, IIVerlError

RUNNABLE = """\
data:
  train_files: train.jsonl
  val_files: null
  train_batch_size: 4
actor_rollout_ref:
  model: {path: org/name}
  actor: {ppo_mini_batch_size: 4}
  rollout: {name: hf, n: 4}
algorithm: {adv_estimator: grpo, use_kl_in_reward: false}
trainer: {n_gpus_per_node: 2}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration that can run, and its data."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUNNABLE)
    Path("train.jsonl").write_text(
        8 * '{"prompt": "1+1?", "data_source": "openai/gsm8k", "ground_truth": "2"}\n'
    )
    return tmp_path


def iiverl(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def codes(result: Result) -> list[str]:
    """Severity, code and key of each diagnostic that a command wrote."""
    return re.findall(r"\b(?:error|warning)\[C\d+\]: [^:\s]+", result.stderr)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], list]:
    """Put a function in the place of the training loop; the list gets what it is called with."""

    def put(loop: Callable[..., None]) -> list:
        calls: list = []

        def recorded(loaded: object, stop: object) -> None:
            calls.append(loaded)
            loop(loaded)

        controller = types.ModuleType("iiverl_core.controller")
        controller.train = recorded  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "iiverl_core.controller", controller)
        return calls

    return put


@pytest.mark.parametrize(
    "arguments",
    [
        ["run.yaml", "trainer.total_epochs=2"],
        ["--config_path", "run.yaml", "trainer.total_epochs=2"],
        ["trainer.total_epochs=2", "--config-path", "run.yaml"],
        ["run.yaml", "--backend", "fsdp", "trainer.total_epochs=2"],
    ],
)
def test_training_gets_the_configuration(train, arguments: list[str]) -> None:
    calls = train(lambda _: None)
    result = iiverl("train-ppo", *arguments)
    assert result.exit_code == 0, result.output
    assert result.output == ""
    assert calls[0].config.trainer.total_epochs == 2
    assert calls[0].config.actor_rollout_ref.rollout.n == 4


def test_training_does_not_start_with_errors(train) -> None:
    calls = train(lambda _: None)
    result = iiverl("train-ppo", "run.yaml", "trainer.nodes=2", "data.seed=x")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert codes(result) == ["error[C012]: trainer.nodes", "error[C015]: data.seed"]
    assert not calls


def test_training_does_not_start_with_what_cannot_run_here(train) -> None:
    calls = train(lambda _: None)
    fire = "actor_rollout_ref.rollout.use_fire_sampling"
    result = iiverl("train-ppo", "run.yaml", f"{fire}=true", "data.train_files=other.parquet")
    assert result.exit_code == 2
    assert {"error[C901]: data.train_files", f"error[C032]: {fire}"} <= set(codes(result))
    assert iiverl("train-ppo", "run.yaml", f"{fire}=true").exit_code == 3
    assert not calls


def test_training_starts_with_warnings(train) -> None:
    calls = train(lambda _: None)
    result = iiverl("train-ppo", "run.yaml", "trainer.default_hdfs_dir=hdfs://x")
    assert result.exit_code == 0
    assert codes(result) == ["warning[C031]: trainer.default_hdfs_dir"]
    assert calls


@pytest.mark.parametrize(
    ("error", "code"), [(IIVerlError("the worker died"), 1), (ConfigError("no such row"), 2)]
)
def test_an_error_for_the_user_has_no_traceback(train, error: Exception, code: int) -> None:
    def loop(_: object) -> None:
        raise error

    train(loop)
    result = iiverl("train-ppo", "run.yaml")
    assert result.exit_code == code
    assert result.stderr == f"error: {error}\n"


def test_any_other_error_keeps_its_traceback(train) -> None:
    def loop(_: object) -> None:
        raise ZeroDivisionError("a mistake of the program")

    train(loop)
    result = iiverl("train-ppo", "run.yaml")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_valid_file_is_called_valid() -> None:
    result = iiverl("validate", "run.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "run.yaml is valid\n", "")


def test_what_cannot_run_here_is_valid_and_told() -> None:
    result = iiverl("validate", "run.yaml", "actor_rollout_ref.model.external_lib=no_such_module")
    assert result.exit_code == 3
    assert result.stdout == "run.yaml is valid, with 1 warning; 1 of them keeps it from running here\n"
    assert codes(result) == ["warning[C907]: actor_rollout_ref.model.external_lib"]


def test_an_invalid_file_is_refused() -> None:
    result = iiverl(
        "validate", "--config_path", "run.yaml", "data.train_batch_size=6", "trainer.default_hdfs_dir=x"
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == "run.yaml is not valid: 1 error, 1 warning"


@pytest.mark.parametrize("command", [["train-ppo"], ["validate"], ["config", "show"]])
def test_what_is_no_file_is_one_line(command: list[str]) -> None:
    missing = iiverl(*command, "other.yaml")
    assert missing.exit_code == 2
    assert missing.stderr.splitlines()[0].startswith("other.yaml: error[C001]: ")
    assert missing.stdout == ""
    assert iiverl(*command, ".").stderr.splitlines()[0].startswith(".: error[C001]: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train-ppo"], "name the YAML file, as in: iiverl train-ppo run.yaml"),
        (["validate", "trainer.nnodes=1", "run.yaml"], "the YAML file comes before trainer.nnodes=1"),
        (
            ["validate", "python3", "-m", "verl.trainer.main_ppo", "--config-name=mine"],
            "there is no file mine.yaml",
        ),
        (["train-ppo", "run.yaml", "--bakend", "fsdp"], "--backend"),
        (["trian-ppo"], "train-ppo"),
    ],
)
def test_bad_usage_says_what_is_expected(arguments: list[str], told: str) -> None:
    result = iiverl(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert "Traceback" not in result.output


def test_a_backend_is_named() -> None:
    result = iiverl("validate", "run.yaml", "--backend", "fsdpp")
    assert result.exit_code == 2
    assert codes(result)[0] == "error[C016]: --backend"


def test_show_prints_the_configuration_and_origins() -> None:
    result = iiverl("config", "show", "run.yaml", "data.seed=5", "--changed")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[:5] == [
        "data:",
        "  train_files: [train.jsonl]  # run.yaml:2",
        "  val_files: null             # run.yaml:3",
        "  train_batch_size: 4         # run.yaml:4",
        "  seed: 5                     # command line",
    ]
    whole = iiverl("config", "show", "run.yaml").stdout
    assert "total_epochs: 30" in whole
    assert "# default, same as data.max_response_length" in whole


def test_show_prints_an_invalid_file_with_the_problems_behind_it() -> None:
    result = iiverl("config", "show", "run.yaml", "data.seed=x", "data.nope=1")
    assert result.exit_code == 2
    assert result.output.splitlines()[0] == "data:"
    assert re.search(r"  seed: 1 +# default; the value from command line is invalid\n", result.stdout)
    assert codes(result) == ["error[C012]: data.nope", "error[C015]: data.seed"]
    assert result.output.index("trainer:") < result.output.index("error[C012]")


@pytest.mark.parametrize("command", [["train-ppo"], ["validate"], ["plan"], ["config", "show"]])
def test_unknown_keys_can_be_allowed(train, command: list[str]) -> None:
    train(lambda _: None)
    Path("model").mkdir()
    Path("model", "config.json").write_text(
        '{"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, '
        '"num_hidden_layers": 2, "num_attention_heads": 4}'
    )
    given = ("run.yaml", "actor_rollout_ref.model.path=./model", "trainer.later.key=1")
    refused, allowed = iiverl(*command, *given), iiverl(*command, *given, "--allow-unknown")
    assert (refused.exit_code, codes(refused)) == (2, ["error[C012]: trainer.later.key"])
    assert (allowed.exit_code, codes(allowed)) == (0, ["warning[C012]: trainer.later.key"])


def test_version() -> None:
    result = iiverl("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("iiverl 0.")
