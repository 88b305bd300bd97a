"""The command: it starts, stops when told to, and leaves nothing behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from iiverl_cli.main import app
from iiverl_reward_client.server.command import main
from iiverl_reward_client.verifiers.worker import load


@contextmanager
def command(folder: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `iiverl reward-server` until the block ends; gives it and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "iiverl_cli_of_test", "reward-server", "--workers", "1", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        address = re.search(r"http://\S+", line)
        yield process, address[0] if address else line
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "iiverl_cli_of_test.py").write_text("from iiverl_cli.main import main\nmain()\n")
    (tmp_path / "own.py").write_text(
        "import os, time\ndef slow(s):\n    time.sleep(s.answer)\n    return {'score': 1, 'pid': os.getpid()}\nother = slow\n"
    )
    return tmp_path


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_finishes_what_it_has_begun(folder: Path, number: signal.Signals) -> None:
    with command(folder, "--port", "0", "--verifier", "own.py:slow") as (process, address):
        workers = workers_of(process.pid)
        assert workers
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
            info = json.dumps({"type": "slow", "answer": 1.0})
            body = json.dumps({"llm_output": "", "verification_info": info})
            head = f"POST /reward HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close"
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            while httpx.get(f"{address}/v1/health").json()["in_flight"] == 0:
                time.sleep(0.02)
            process.send_signal(number)
            assert connection.makefile("rb").read().endswith(b'{"score":1.0}')
        assert process.wait(timeout=10) == 0
        assert gone(workers, seconds=0)


def test_killed_outright_it_leaves_no_process_for_long(folder: Path) -> None:
    arguments = ("--port", "0", "--verifier", "own.py:slow", "--verifier", "own.py:other")
    with command(folder, *arguments, REWARD_SERVER_TIME_LIMIT="0.5") as (process, address):
        with pytest.raises(httpx.ReadTimeout):
            info = json.dumps({"type": "slow", "answer": 60})
            httpx.post(f"{address}/reward", json={"llm_output": "", "verification_info": info}, timeout=0.2)
        workers = workers_of(process.pid)
        assert len(workers) == 2
        process.kill()
        assert gone(workers, seconds=8)


def test_settings_of_a_file_and_options(folder: Path) -> None:
    (folder / ".env").write_text("REWARD_SERVER_TOKEN=hush\nREWARD_SERVER_BIND_PORT=1\n")
    with command(folder, "--port", "0", LLM_JUDGE_MODEL="m") as (process, address):
        assert httpx.get(f"{address}/metrics").status_code == 401
        allowed = httpx.get(f"{address}/v1/capabilities", headers={"Authorization": "Bearer hush"}).json()
        assert "LLM_JUDGE_BASE_URL" in allowed["unavailable"]["llm_judge"]
        process.terminate()
        assert process.stderr is not None
        assert "hush" not in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--verifier", "own.py:none"], "has no attribute 'none'"),
        (["--verifier", "nowhere.py:slow"], "does not exist"),
        (["--env-file", "nowhere.env"], "cannot be read"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:0"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(folder)
    ended = CliRunner().invoke(app, ["reward-server", "--port", "0", *arguments])
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: ")
    assert said in ended.stderr


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = CliRunner().invoke(app, ["reward-server", "--port", str(port)])
    assert ended.exit_code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr


@pytest.mark.parametrize(
    "entry", [("iiverl_reward_client.server",), ("iiverl_reward_client.server.command",)]
)
def test_the_server_of_the_client_package_has_the_same_command(folder: Path, entry: tuple[str, ...]) -> None:
    """`python -m` and the script of `iiverl-reward-client` serve without the package `iiverl-cli`."""
    script = f"import sys; from {entry[0]} import main; sys.exit(main())"
    run = ["-c", script] if entry[0].endswith("command") else ["-m", *entry]
    process = subprocess.Popen(
        [sys.executable, *run, "--port", "0", "--workers", "1", "--verifier", "own.py:slow"],
        stderr=subprocess.PIPE, text=True, cwd=folder,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        address = re.search(r"http://\S+", process.stderr.readline())
        assert address and "slow" in httpx.get(f"{address[0]}/v1/capabilities").json()["types"]
        process.terminate()
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_both_commands_have_one_parser(capsys: pytest.CaptureFixture[str]) -> None:
    ended = CliRunner().invoke(app, ["reward-server", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main(["--help"], program="iiverl reward-server")
    assert (ended.exit_code, stopped.value.code) == (0, 0)
    assert ended.stdout == capsys.readouterr().out
    assert "--verifier FILE.py:FUNCTION" in ended.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--port", "70000"], ["--port", "-1"], ["--port", "x"], ["--workers", "0"], ["--nothing"], ["more"]],
)
def test_wrong_arguments_are_told_and_nothing_is_started(arguments: list[str]) -> None:
    ended = CliRunner().invoke(app, ["reward-server", *arguments])
    assert ended.exit_code == 2
    assert "iiverl reward-server: error: " in ended.stderr and arguments[0] in ended.stderr


@pytest.mark.parametrize("run", ["iiverl", "python -m"])
def test_a_missing_extra_is_told_in_a_line(run: str) -> None:
    """Without fastapi there is a line that says what to install for the package that was installed."""
    start = {
        "iiverl": "from iiverl_cli.main import main; sys.argv = ['iiverl', 'reward-server']; main()",
        "python -m": "sys.argv = ['x']; runpy.run_module('iiverl_reward_client.server', run_name='__main__')",
    }[run]
    hide = (
        "import importlib.util, runpy, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'fastapi' else find(name, *rest)\n"
        "sys.modules['fastapi'] = None\n"
    )
    done = subprocess.run([sys.executable, "-c", hide + start], capture_output=True, text=True, check=False)
    command = "make setup" if run == "iiverl" else "pip install 'iiverl-reward-client[server]'"
    assert done.returncode == 2
    assert done.stderr == f"error: the reward server needs fastapi. Install it: {command}\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(): return 1", "f has the signature f()"),
        ("def f(a, b): return 1", "f has the signature f(a, b)"),
        ("def f(*, submission): return 1", "f has the signature f(*, submission)"),
        ("def f(submission): yield 1", "f yields instead of returning a score"),
        ("async def f(submission): yield 1", "f yields instead of returning a score"),
        ("class f:\n    def __init__(self, submission): pass", "f is a class"),
        ("f = 1.0", "f is of type float"),
    ],
)
def test_a_verifiers_signature_is_checked_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(source)
    ended = CliRunner().invoke(app, ["reward-server", "--port", "0", "--verifier", "own.py:f"])
    assert ended.exit_code == 2
    assert ended.stderr == (
        f"error: the verifier {tmp_path / 'own.py'}:f cannot be used: {said}; a verifier must be a function of one "
        "argument: def f(submission: Submission) -> float | dict\n"
    )


@pytest.mark.parametrize(
    "source",
    [
        "def f(submission): return 1",
        "async def f(submission): return 1",
        "def f(submission, strict=True): return 1",
        "def f(*all): return 1",
        "import functools\ndef g(a, b): return 1\nf = functools.partial(g, b=2)",
        "class A:\n    def __call__(self, submission): return 1\nf = A()",
    ],
)
def test_whatever_takes_one_argument_is_a_verifier(tmp_path: Path, source: str) -> None:
    (tmp_path / "own.py").write_text(source)
    assert callable(load(f"{tmp_path / 'own.py'}:f"))
