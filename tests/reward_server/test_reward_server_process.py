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
