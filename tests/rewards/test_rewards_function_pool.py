"""A reward function in processes of its own: limits, crashes, neighbours, output, and the end of the run."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest

from iiverl_core.config import CustomRewardFunctionConfig
from iiverl_core.errors import ConfigError
from iiverl_core.rewards.function_pool import FunctionPool
from iiverl_reward_client import Failed, Outcome, Scored
from rollouts import id_of

pytestmark = pytest.mark.timeout(60)

ENDLESS = "a" * 40 + "b"
"""A text for which the pattern `(a+)+$` takes years; it is matched in C, without a look at signals or other threads."""

Score = Callable[..., list[Outcome]]


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Callable[..., FunctionPool]]:
    """Makes a pool of a function with the given body, and closes it after the test."""
    pools: list[FunctionPool] = []

    def make(body: str, *, before: str = "", is_async: bool = False, **settings: Any) -> FunctionPool:
        file = tmp_path / "my_reward.py"
        head = "async def" if is_async else "def"
        file.write_text(
            f"import asyncio, os, random, re, signal, time\n{before}\n"
            f"{head} compute_score(data_source, solution_str, ground_truth, extra_info=None):\n{indent(body, '    ')}\n"
        )
        pools.append(
            FunctionPool(CustomRewardFunctionConfig(path=str(file), **settings), tmp_path / "printed.log")
        )
        return pools[-1]

    yield make
    for each in pools:
        each.close()


@pytest.fixture
def score(pool: Callable[..., FunctionPool], make_sample: Callable[..., Any]) -> Score:
    """Scores texts by a function with the given body, in a step of its own."""

    def score(body: str, texts: list[str], **settings: Any) -> list[Outcome]:
        scorer = pool(body, **settings)
        for group, text in enumerate(texts):
            scorer.submit(make_sample(text, key=(group, 0)))
        outcomes = scorer.collect([id_of(group, 0) for group in range(len(texts))])
        assert list(outcomes) == [id_of(group, 0) for group in range(len(texts))]
        return list(outcomes.values())

    return score


def scores(outcomes: list[Outcome]) -> list[float | None]:
    return [outcome.score if isinstance(outcome, Scored) else None for outcome in outcomes]


def failure(outcome: Outcome) -> Failed:
    assert isinstance(outcome, Failed)
    return outcome


@pytest.mark.parametrize("workers", [1, 3])
def test_outcomes_do_not_depend_on_the_number_of_processes(score: Score, workers: int) -> None:
    body = (
        "time.sleep(0.02 * (len(solution_str) % 3))\n"
        "drawn = random.random()\n"
        "return {'score': len(solution_str) + drawn, 'letters': list({*solution_str}), 'where': os.getpid()}"
    )
    outcomes = score(body, ["abcdefgh"[: i % 8] for i in range(60)], workers=workers)
    seen = [
        (outcome.score, tuple(outcome.info["letters"])) for outcome in outcomes if isinstance(outcome, Scored)
    ]
    assert [int(value) for value, _ in seen] == [i % 8 for i in range(60)]
    processes = {outcome.components["where"] for outcome in outcomes if isinstance(outcome, Scored)}
    assert len(processes) <= workers and os.getpid() not in processes
    alone = score(body, ["abcdefgh"[: i % 8] for i in range(60)], workers=1)
    assert [outcome.score for outcome in alone if isinstance(outcome, Scored)] == [value for value, _ in seen]
    assert [tuple(o.info["letters"]) for o in alone if isinstance(o, Scored)] == [
        letters for _, letters in seen
    ]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_call_without_end_is_a_timeout_with_its_row_and_its_neighbours_are_scored(
    score: Score, is_async: bool
) -> None:
    body = "await asyncio.sleep(0.1)\n" * is_async + "return float(bool(re.match('(a+)+$', solution_str)))"
    texts = ["a", "b", ENDLESS, "aa", "b", ENDLESS, *["a"] * 10]
    outcomes = score(body, texts, is_async=is_async, timeout=1.0)
    for text, outcome in zip(texts, outcomes, strict=True):
        if text == ENDLESS:
            assert failure(outcome).kind == "timeout"
        else:
            assert outcome == Scored(float("b" not in text))
    assert re.search(
        r"compute_score took longer than 1 s \(custom_reward_function\.timeout\), for .*row \d+",
        failure(outcomes[2]).detail,
    )


def test_a_coroutine_that_waits_too_long_is_a_timeout_and_its_process_goes_on(score: Score) -> None:
    body = "await asyncio.sleep(60 if solution_str == 'x' else 0)\nreturn os.getpid()"
    outcomes = score(body, ["a", "x", "b"], is_async=True, timeout=0.5)
    assert failure(outcomes[1]).kind == "timeout"
    assert scores(outcomes)[0] == scores(outcomes)[2] is not None


def test_coroutines_are_awaited_side_by_side(score: Score) -> None:
    """All 32 have begun before the first one ends."""
    before = "begun = 0\nall_begun = asyncio.Event()"
    body = (
        "global begun\nbegun += 1\nif begun == 32:\n    all_begun.set()\n"
        "await asyncio.wait_for(all_begun.wait(), 20)\nreturn 1.0"
    )
    assert scores(score(body, ["a"] * 32, before=before, is_async=True)) == [1.0] * 32


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("end", "how"), [("os._exit(3)", "exit code 3"), ("os.abort()", "signal 6, SIGABRT")]
)
def test_a_call_that_ends_its_process_has_failed_alone(
    score: Score, end: str, how: str, is_async: bool
) -> None:
    body = "await asyncio.sleep(0.1)\n" * is_async + f"if solution_str == 'x':\n    {end}\nreturn 1.0"
    outcomes = score(body, ["a", "x", "b", "c"], is_async=is_async)
    assert scores(outcomes) == [1.0, None, 1.0, 1.0]
    failed = failure(outcomes[1])
    assert failed.kind == "function" and how in failed.detail and "row" in failed.detail


def test_after_many_timeouts_in_a_row_the_rest_of_the_step_is_not_called(
    pool: Callable[..., FunctionPool], make_sample: Callable[..., Any]
) -> None:
    scorer = pool("time.sleep(60 if solution_str == 'x' else 0)\nreturn 1.0", timeout=0.1, workers=2)
    for group in range(100):
        scorer.submit(make_sample("x", key=(group, 0)))
    outcomes = scorer.collect([id_of(group, 0) for group in range(100)])
    kinds = [failure(outcome).kind for outcome in outcomes.values()]
    assert kinds == ["timeout"] * 100
    scorer.submit(make_sample("a"))  # another chance
    assert list(scorer.collect([id_of()]).values()) == [Scored(1.0)]


def test_timeouts_of_a_step_fail_no_call_of_the_next_which_is_submitted_already(
    pool: Callable[..., FunctionPool], make_sample: Callable[..., Any]
) -> None:
    scorer = pool("time.sleep(60 if solution_str == 'x' else 0)\nreturn 1.0", timeout=0.1, workers=1)
    first = [make_sample("x", key=(group, 0)) for group in range(12)]
    second = [replace(each, id=each.id._replace(step=each.id.step + 1), text="a") for each in first]
    for each in (*first, *second):
        scorer.submit(each)
    kinds = [failure(outcome).kind for outcome in scorer.collect([each.id for each in first]).values()]
    assert kinds == ["timeout"] * 12
    assert list(scorer.collect([each.id for each in second]).values()) == [Scored(1.0)] * 12


def test_signals_work_as_in_a_script(score: Score) -> None:
    """Libraries such as Math-Verify limit their time by an alarm."""
    body = (
        "def ring(*_):\n    raise TimeoutError\n"
        "signal.signal(signal.SIGALRM, ring)\nsignal.setitimer(signal.ITIMER_REAL, 0.2)\n"
        "try:\n    time.sleep(20)\nexcept TimeoutError:\n    return 0.5\n"
    )
    assert scores(score(body, ["a"])) == [0.5]


def test_what_it_prints_is_in_a_file(
    score: Score, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert scores(score("print('said', solution_str)\nos.system('echo shouted >&2')\nreturn 1", ["x"])) == [
        1.0
    ]
    assert (tmp_path / "printed.log").read_text() == "said x\nshouted\n"
    assert capfd.readouterr() == ("", "")
    assert str(tmp_path / "printed.log") in caplog.text


def test_a_process_of_many_open_files_may_start_others(score: Score) -> None:
    """The file descriptors that a child is given have large numbers then."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, before[1]), before[1]))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1200)]
    try:
        assert scores(score("return 1", ["a"])) == [1]
    finally:
        for fd in opened:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_it_reads_nothing(score: Score) -> None:
    (outcome,) = score("return {'score': 1, 'line': repr(input())}", ["x"])
    assert "EOFError" in failure(outcome).detail


def test_neighbouring_files_and_classes_of_its_own(score: Score, tmp_path: Path) -> None:
    (tmp_path / "its_helper.py").write_text("class Kept:\n    x = 1\ndef f(text):\n    return len(text)\n")
    body = "return {'score': f(solution_str), 'none': lambda: 0, 'kept': Kept(), 'text': 'ok'}"
    (outcome,) = score(body, ["four"], before="from its_helper import Kept, f")
    assert isinstance(outcome, Scored) and outcome.score == 4.0
    assert "info" in outcome.info or outcome.info["text"] == "ok"  # the helper need not be importable here


def test_an_exception_shows_the_users_lines(score: Score) -> None:
    (outcome,) = score("return 1 / 0", ["x"])
    assert failure(outcome).detail == (
        "my_reward.py, line 4, in compute_score: return 1 / 0\nZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize(
    ("before", "message"),
    [("1 / 0", "line 2, in <module>: 1 / 0\nZeroDivisionError"), ("os._exit(4)", "exit code 4")],
)
def test_a_file_that_cannot_be_imported_is_one_error(score: Score, before: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        score("return 1", ["x"], before=before)


def test_close_ends_the_processes_and_what_they_started(
    pool: Callable[..., FunctionPool], make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    started = tmp_path / "started"
    scorer = pool(f"os.system('echo $$ > {started}.new; mv {started}.new {started}; sleep 300')\nreturn 1.0")
    scorer.submit(make_sample())
    pid = _pid_in(started)
    scorer.close()
    assert _ends(pid)


DRIVER = """
from pathlib import Path
from iiverl_core.config import CustomRewardFunctionConfig
from iiverl_core.rewards.function_pool import FunctionPool
from iiverl_core.samples import Prompt, Rollout, SampleId
pool = FunctionPool(CustomRewardFunctionConfig(path={file!r}), Path({file!r} + ".log"))
pool.submit(Rollout(SampleId("train", 1, 0, 0), Prompt(0, (1,), ""), "", "", "stop", 0, 0.0, ()))
pool.collect([SampleId("train", 1, 0, 0)])
"""


def test_a_killed_run_leaves_no_process(tmp_path: Path) -> None:
    file, started = tmp_path / "hangs.py", tmp_path / "started"
    file.write_text(
        "import os, re\nfrom pathlib import Path\n"
        "def compute_score(**_):\n"
        f"    Path('{started}.new').write_text(str(os.getpid()))\n    os.rename('{started}.new', '{started}')\n"
        f"    re.match('(a+)+$', {ENDLESS!r})\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", DRIVER.format(file=str(file))])
    pid = _pid_in(started)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert _ends(pid)


def _pid_in(file: Path) -> int:
    deadline = time.monotonic() + 30
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return int(file.read_text())


def _ends(pid: int) -> bool:
    """Whether a process ends within seconds; a zombie has ended."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False
