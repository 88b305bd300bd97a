"""`iiverl reward check` and `iiverl reward rescore` as a user types them."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from iiverl_cli.main import app
from rewards.score_server import ScoreServer

RUNNABLE = """\
data: {train_files: train.jsonl, val_files: val.jsonl, train_batch_size: 4, prompt_key: messages}
actor_rollout_ref:
  model: {path: org/name}
  actor: {ppo_mini_batch_size: 4}
  rollout: {name: hf, n: 4}
algorithm: {adv_estimator: grpo, use_kl_in_reward: false}
reward_api: {enable: true}
trainer: {n_gpus_per_node: 2}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with a configuration and its data."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUNNABLE)
    write("train.jsonl", *"12345")
    write("val.jsonl", "7")


def write(name: str, *answers: str, type: str = "math_verifiable", column: str = "verification_info") -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": f"question {i}"}],
            column: json.dumps({"type": type, "answer": {"value": answer}}),
        }
        for i, answer in enumerate(answers)
    ]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def iiverl(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["reward", *arguments])


def check(url: str, *arguments: str) -> Result:
    return iiverl("check", "run.yaml", f"reward_api.api_url={url}", *arguments)


def closed_url() -> str:
    with ScoreServer() as server:
        return server.url


def test_check_tells_of_server_rows_and_scores() -> None:
    with ScoreServer() as server:
        result = check(server.url, "--rows", "2")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1][0] == server.url and lines[1][2] == "ms"
    assert lines[1][3:] == ["7", "math_verifiable"]
    assert f"{server.url} does not verify llm_judge: no judge is set" in result.stdout
    assert ["train.jsonl", "5"] in lines and ["val.jsonl", "1"] in lines
    assert lines[-4:] == [
        ["0", "math_verifiable", "wrong", "0.000"],
        ["0", "math_verifiable", "right", "1.000"],
        ["1", "math_verifiable", "wrong", "0.000"],
        ["1", "math_verifiable", "right", "1.000"],
    ]
    assert {sample["llm_output"] for sample in server.samples} == {
        f"question {row}\n\\boxed{{{answer}}}"
        for row, right in enumerate("12")
        for answer in (right, "this is not the answer")
    }


def test_check_takes_a_server_that_says_nothing_of_itself() -> None:
    with ScoreServer(old=True) as server:
        result = check(server.url, "--rows", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].split()[3:] == ["-", "-"]
    assert result.stdout.splitlines()[-1].split() == ["0", "math_verifiable", "right", "1.000"]


def test_check_notes_that_right_answers_score_nothing() -> None:
    with ScoreServer(lambda text, info: 0.0) as server:
        result = check(server.url)
    assert result.exit_code == 0
    assert result.stderr.startswith("note: no row's own answer")


def test_check_of_a_server_that_is_not_there() -> None:
    url = closed_url()
    result = check(url)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: the reward server {url} does not answer (transport: ")


def test_check_of_rows_that_cannot_be_verified() -> None:
    with ScoreServer() as server:
        write("val.jsonl", "1", type="llm_judge")
        judged = check(server.url)
        write("train.jsonl", "1", column="verification")
        renamed = check(server.url)
    assert judged.exit_code == renamed.exit_code == 2
    assert (
        judged.stderr.startswith("error: val.jsonl, row 0 (the first is 0), column")
        and "'llm_judge': no judge is set" in judged.stderr
    )
    assert "there is no such column. Columns: verification." in renamed.stderr


@pytest.mark.parametrize(("kind", "code"), [("bad_request", 2), ("server", 1)])
def test_check_of_samples_that_are_not_scored(kind: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)  # retries without waiting
    with ScoreServer(lambda text, info: {"error": {"kind": kind, "detail": "broken"}}) as server:
        result = check(server.url, "--rows", "1")
    assert result.exit_code == code
    assert f"error: 2 of 2 samples could not be scored (100.0%): {kind} 2." in result.stderr
    assert f"{kind}: {server.url}: broken" in result.stdout


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["reward_api.enable=false"], "reward_api.enable is false"),
        (["reward_api.api_urll=x"], "did you mean reward_api.api_url?"),
        (
            ["reward_api.api_url=URL", "reward_api.token_env=NO_SUCH_TOKEN"],
            "NO_SUCH_TOKEN, which holds the reward server's token, is not set",
        ),
        (["reward_api.api_url=localhost:8000"], "is not a URL; it has to begin with http:// or https://"),
        (["data.train_files=other.jsonl", "reward_api.api_url=URL"], "other.jsonl does not exist"),
    ],
)
def test_check_refuses_what_is_wrong(overrides: list[str], told: str) -> None:
    with ScoreServer() as server:
        result = iiverl("check", "run.yaml", *(each.replace("URL", server.url) for each in overrides))
    assert result.exit_code == 2
    assert told in result.stderr
    assert "Traceback" not in result.output


def test_check_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "very-secret")
    with ScoreServer(token="very-secret") as server:
        allowed = check(server.url, "reward_api.token_env=REWARD_TOKEN")
        refused = check(server.url)
    assert allowed.exit_code == 0, allowed.output
    assert refused.exit_code == 2
    assert "HTTP 401: a token is needed" in refused.output


def test_check_does_without_what_the_run_needs() -> None:
    with ScoreServer() as server:
        result = check(server.url, "actor_rollout_ref.rollout.name=vllm")
    assert result.exit_code == 0, result.output


def test_check_imports_neither_torch_nor_ray() -> None:
    with ScoreServer() as server:
        program = (
            "import atexit, sys\n"
            "atexit.register(lambda: print([m for m in ('torch', 'ray') if m in sys.modules], file=sys.stderr))\n"
            f"sys.argv = ['iiverl', 'reward', 'check', 'run.yaml', 'reward_api.api_url={server.url}']\n"
            "from iiverl_cli.main import main; main()"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.fixture
def dump() -> str:
    """A file with a score that is right, one that is too high, and one that is missing."""
    info = json.dumps({"type": "math_verifiable", "answer": {"value": "1"}})
    rows = {
        "llm_output": [r"a \boxed{1}", r"b \boxed{2}", r"c \boxed{1}"],
        "verification_info": [info] * 3,
        "score": [1.0, 1.0, None],
    }
    pq.write_table(pa.table(rows), "5.parquet")
    return "5.parquet"


def test_rescore_reports_what_changed(dump: str) -> None:
    with ScoreServer() as server:
        result = iiverl("rescore", dump, "--url", server.url, "--out", "again.parquet")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "3 samples of 1 file: 1 same, 0 higher, 1 lower, 0 failed, 1 that had no score before",
        "mean score 1.0000 -> 0.5000 (2 samples scored both times)",
        "",
        "file       row  before  after  text",
        r"5.parquet  1    1.000   0.000  'b \\boxed{2}'",
        "wrote again.parquet",
    ]
    rows = pq.read_table("again.parquet").to_pylist()
    assert [row["new_score"] for row in rows] == [1.0, 0.0, 1.0]
    assert [row["score"] for row in rows] == [1.0, 1.0, None]


def test_rescore_with_a_token(dump: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScoreServer(token="very secret") as server:
        monkeypatch.setenv("REWARD_TOKEN", "very-secret")
        refused = iiverl("rescore", dump, "--url", server.url, "--token-env", "REWARD_TOKEN")
        missing = iiverl("rescore", dump, "--url", server.url, "--token-env", "NO_SUCH_TOKEN")
    with ScoreServer(token="very-secret") as server:
        result = iiverl("rescore", dump, "--url", server.url, "--token-env", "REWARD_TOKEN")
    assert refused.exit_code == 1
    assert "bad_request 3" in refused.stderr and "very-secret" not in refused.output
    assert missing.exit_code == 2
    assert missing.stderr == "error: --token-env: the environment variable NO_SUCH_TOKEN is not set\n"
    assert result.exit_code == 0, result.output


def test_rescore_counts_what_failed(dump: str) -> None:
    def score(text: str, info: dict) -> object:
        return {"error": {"kind": "function", "detail": "cannot"}} if text.startswith("a") else 1.0

    with ScoreServer(score) as server:
        result = iiverl("rescore", dump, "--url", server.url)
    assert result.exit_code == 0
    assert result.stdout.startswith("3 samples of 1 file: 1 same, 0 higher, 0 lower, 1 failed, 1 that had")
    assert f"function: {server.url}: cannot" in result.stderr


def test_rescore_refuses_what_is_wrong(dump: str) -> None:
    url = closed_url()
    away = iiverl("rescore", dump, "--url", url)
    assert away.exit_code == 1
    assert away.stderr.startswith(f"error: no reward server answers: {url} (transport: ")
    for arguments, told in (
        (["none.parquet", "--url", url], "none.parquet does not exist"),
        ([dump, "--url", "localhost"], "a reward server's URL looks like"),
        ([dump, "--url", url, "--protocol", "grpc"], "one of auto, reward, v1, openrlhf, slime"),
        ([dump, "--url", url, "--out", dump], "is one of the input files"),
        ([dump], "--url"),
    ):
        result = iiverl("rescore", *arguments)
        assert result.exit_code == 2, arguments
        assert told in result.stderr
        assert "Traceback" not in result.output
