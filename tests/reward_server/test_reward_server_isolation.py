"""A verification that goes wrong costs its own result and nothing else."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

MATH = {"value": "420"}
OWN = """
import asyncio, os, signal, subprocess, sys, time
def burn(s):
    return 1 if s.answer == 0 else burn(s) if sum(range(10**9)) else 0
def nap(s):
    time.sleep(s.answer); return 1
def eat(s):
    held = [bytearray(b"x") * 2**20 for _ in range(400)]
    time.sleep(5); return 1
def end(s):
    os.kill(os.getpid(), signal.SIGKILL)
def leave(s):
    sys.exit("no more")
def noise(s):
    print("noise"); sys.stdout.flush(); os.write(1, b"more\\n"); return input() if s.answer else 0.5
def fault(s):
    raise ValueError("what is " + s.response)
def nothing(s):
    return float("nan")
def secrets(s):
    return {"score": 1, "seen": sorted(set(os.environ) & {"REWARD_SERVER_TOKEN", "LLM_JUDGE_API_KEY", "HOME"})}
def child(s):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "a-child-of-a-verifier"])
    time.sleep(60)
async def later(s):
    await asyncio.sleep(0.01); return {"score": 0.5, "prompt": s.prompt or "", "mark": s.verification_info["type"]}
"""


@pytest.fixture
def own(tmp_path: Path) -> Any:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return lambda *names: [f"{path}:{name}" for name in names]


def test_a_pathological_response_scores_zero_and_costs_no_other(start: Any) -> None:
    server = start(workers=2, time_limit=60, response_time_limit=0.5, accept_unevaluated=True)
    good = ("\\boxed{420}", "math_verifiable", MATH)
    assert server.rewards(good, good)[0]["score"] == 1.0  # both processes have been there
    results = server.rewards(("\\boxed{9^{9^{9^{9}}}}", "math_verifiable", MATH), *[good] * 20)
    assert (results[0]["score"], set(results[0]["info"])) == (0.0, {"reason"})
    assert [result["score"] for result in results[1:]] == [1.0] * 20
    assert server.rewards(good)[0]["score"] == 1.0


def test_a_slow_verifier_delays_no_other(start: Any, own: Any) -> None:
    server = start(*own("nap"))
    quick = ("```\nb\n```", "swe_verifiable", {"input": "a", "ground_truth": "b"})
    server.rewards(quick)
    slow = threading.Thread(target=server.rewards, args=[("", "nap", 1.5)] * 2)
    slow.start()
    answers = []
    while slow.is_alive() and len(answers) < 30:
        answers.append(server.reward(*quick).json["score"])
    assert answers == [1.0] * 30
    assert slow.is_alive()
    slow.join()


@pytest.mark.parametrize(
    ("name", "kind", "detail"),
    [
        ("burn", "timeout", "burn: verifying took longer than 1 s"),
        ("eat", "server", "eat: verifying took more than 200 MiB of memory"),
        ("end", "server", "end: the verifier's process was ended by signal 9"),
        ("leave", "function", "leave: SystemExit: no more (own.py, line 13)"),
        ("fault", "function", "fault: ValueError: what is x (own.py, line 17)"),
        ("nothing", "function", "nothing: returned nan of type float, which is not a finite number"),
    ],
)
def test_what_goes_wrong_in_a_users_verifier(start: Any, own: Any, name: str, kind: str, detail: str) -> None:
    server = start(*own(name), time_limit=1 if name == "burn" else 10, memory_bytes=200 * 2**20)
    for _ in range(2):  # the second time, in the process that replaced the first
        (result,) = server.rewards(("x", name, 1))
        assert result["error"] == {"kind": kind, "detail": detail, "retry_after": None}


def test_a_users_verifier_scores(start: Any, own: Any) -> None:
    server = start(*own("later", "noise"))
    assert {"later", "noise"} <= set(server.get("/v1/capabilities").json["types"])
    (result,) = server.rewards(("q<｜Assistant｜>a", "later", None))
    assert result == {
        "id": "",
        "score": 0.5,
        "components": {},
        "info": {"prompt": "q<｜Assistant｜>", "mark": "later"},
    }
    assert server.reward("q", "noise", 0).body == b'{"score":0.5}'
    (result,) = server.rewards(("", "noise", 1))
    assert "EOFError" in result["error"]["detail"]


def test_a_verifier_does_not_see_the_servers_secrets(
    start: Any, own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REWARD_SERVER_TOKEN", "LLM_JUDGE_API_KEY", "HOME"):
        monkeypatch.setenv(name, "x")
    (result,) = start(*own("secrets")).rewards(("", "secrets", 0))
    assert result["info"] == {"seen": ["HOME"]}


def test_what_a_verifier_started_ends_with_it(start: Any, own: Any) -> None:
    (result,) = start(*own("child"), time_limit=1).rewards(("", "child", 0))
    assert result["error"]["kind"] == "timeout"
    deadline = time.monotonic() + 5
    while any("a-child-of-a-verifier" in name for name in commands()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text().replace("\0", " "))
        except OSError:
            continue
    return found
