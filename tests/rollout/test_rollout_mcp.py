"""Tools of MCP servers: a real server answers beside functions, and what ends with it is one rollout."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from iiverl_core.errors import ConfigError
from iiverl_core.rollout.tools import OUTPUT, ToolRollouter
from iiverl_reward_client import Failed
from rollout.chat_templates import tokenizer_of
from rollout.test_rollout_tools import NAME, call, results, rollout, run_of

SERVER = '''
import os, sys, time
from pathlib import Path
from mcp.server import MCPServer

server = MCPServer("letters")
(Path(os.environ["PIDS"]) / str(os.getpid())).touch()


@server.tool()
def repeat(text: str, times: int = 2) -> str:
    """Repeat a text."""
    print("repeating", file=sys.stderr, flush=True)
    return text * times


@server.tool()
def letters(text: str) -> list[str]:
    """Split a text."""
    return list(text)


@server.tool()
def refuse() -> str:
    """Refuse."""
    from mcp.server.mcpserver.exceptions import ToolError
    raise ToolError("not today")


@server.tool()
def die() -> str:
    """End the server."""
    os._exit(3)


@server.tool()
def hang() -> str:
    """Never answer."""
    time.sleep(600)


server.run("stdio")
'''


def servers(folder: Path, script: str = SERVER) -> dict[str, Any]:
    path = folder / "server.py"
    path.write_text(script)
    (folder / "pids").mkdir(exist_ok=True)
    return {"words": {"command": sys.executable, "args": [str(path)], "env": {"PIDS": str(folder / "pids")}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mcp")


@pytest.fixture(scope="module")
def rollouter(folder: Path) -> Iterator[ToolRollouter]:
    run = run_of(folder, tools={"names": ["add"], "mcp_servers": servers(folder), "timeout": 3.0})
    made = ToolRollouter(run, tokenizer_of(NAME))
    yield made
    made.close()


def test_a_server_and_functions_answer_side_by_side(rollouter: ToolRollouter, folder: Path) -> None:
    text = "\n".join([call("repeat", text="ab"), call("add", a=2), call("letters", text="xy")])
    done = rollout(rollouter, text, "Done.")
    assert results(done) == ["abab", "3", "x\ny"]
    prompt = str(tokenizer_of(NAME).decode(done.sequences[0].token_ids))
    assert '"description": "Repeat a text."' in prompt and '"times"' in prompt
    assert "repeating" in (folder / "run" / OUTPUT).read_text()


def test_errors_of_a_server_are_messages_to_the_model(rollouter: ToolRollouter) -> None:
    text = "\n".join([call("refuse"), call("repeat", text=["no"]), call("subtract")])
    done = rollout(rollouter, text, "Oh.")
    refused, wrong, unknown = results(done)
    assert refused.startswith("Error: ") and "not today" in refused
    assert wrong.startswith("Error: ") and "repeat" in wrong
    assert unknown.startswith("Error: there is no function 'subtract'")
    assert done.counts["tool_errors"] == 3 and done.outcome is None


def test_a_server_that_ends_fails_the_rollout_alone(rollouter: ToolRollouter) -> None:
    done = rollout(rollouter, call("die"), "never")
    assert isinstance(done.outcome, Failed) and done.outcome.kind == "environment"
    assert "die ended its process" in done.outcome.detail
    assert results(rollout(rollouter, call("repeat", text="a"), "Fine.")) == ["aa"]


def test_a_call_that_takes_too_long_ends_with_its_server(rollouter: ToolRollouter, folder: Path) -> None:
    done = rollout(rollouter, call("hang"), "Oh.")
    assert results(done) == ["Error: hang took longer than 3 s"]
    rollouter.close()  # and nothing is left running, not even the server that hung
    pids = [int(path.name) for path in (folder / "pids").iterdir()]
    assert pids
    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if running(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(") ")[2][0] != "Z"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise SystemExit(1)", "mcp_servers.words: the server did not list its tools"),
        (SERVER.replace("def repeat", "def add"), "mcp_servers.words: there are two tools 'add'"),
    ],
)
def test_a_server_that_cannot_be_used_is_reported_before_the_run(
    tmp_path: Path, script: str, message: str
) -> None:
    run = run_of(tmp_path, tools={"names": ["add"], "mcp_servers": servers(tmp_path, script)})
    with pytest.raises(ConfigError, match=message):
        ToolRollouter(run, tokenizer_of(NAME))
