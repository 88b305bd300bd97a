"""Ordinary programs run in the sandbox as they do outside it."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iiverl_reward_client.verifiers.sandbox import Execution, Limits, Sandbox, UnsupportedLanguage


def test_standard_input_to_standard_output(sandbox: Sandbox) -> None:
    source = "n = int(input())\nprint(sum(int(input()) for _ in range(n)))"
    assert sandbox.run(source, "3\n1\n2\n39\n") == Execution("42\n", "", 0, "exit")


def test_an_exception_has_its_traceback_and_exit_code(sandbox: Sandbox) -> None:
    execution = sandbox.run("print('before', flush=True)\n1 / 0")
    assert (execution.stdout, execution.exit_code, execution.ended) == ("before\n", 1, "exit")
    assert "ZeroDivisionError" in execution.stderr and "line 2" in execution.stderr


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_an_exit_code_is_the_programs(sandbox: Sandbox, code: int) -> None:
    assert sandbox.run(f"raise SystemExit({code})").exit_code == code


def test_a_signal_is_no_exit(sandbox: Sandbox) -> None:
    execution = sandbox.run("import os; os.abort()")
    assert (execution.exit_code, execution.ended) == (None, "signal")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=2000))
def test_any_text_goes_in_and_comes_out(sandbox: Sandbox, text: str) -> None:
    source = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    assert sandbox.run(source, text).stdout == text


@pytest.mark.parametrize("source", ["print('a\ud800')", "x = 'nul \0'", "\ufeffprint(1)", "", "(" * 5000])
def test_odd_sources_are_the_programs_affair(sandbox: Sandbox, source: str) -> None:
    assert sandbox.run(source, "\udfff").ended in ("exit", "signal")


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_a_program_runs_under_any_umask(sandbox: Sandbox, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert sandbox.run("import json; print(1)").stdout == "1\n"
    finally:
        os.umask(before)


def test_output_that_is_not_utf_8_equals_no_text(sandbox: Sandbox) -> None:
    assert sandbox.run("import os; os.write(1, b'\\xff!')").stdout == "\udcff!"


def test_standard_streams_by_their_names(sandbox: Sandbox) -> None:
    source = "print(open('/dev/stdin').read(), file=open('/dev/stdout', 'w'))"
    assert sandbox.run(source, "by name").stdout == "by name\n"


def test_scratch_files_threads_and_child_processes(sandbox: Sandbox) -> None:
    execution = sandbox.run(
        "import multiprocessing, pathlib, subprocess, sys, tempfile, threading\n"
        "pathlib.Path('here').write_text('1')\n"
        "with tempfile.TemporaryFile() as file: file.write(b'2')\n"
        "results = []\n"
        "threads = [threading.Thread(target=results.append, args=(i,)) for i in range(3)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "with multiprocessing.Pool(2) as pool: results += pool.map(abs, [-4, -5])\n"
        "print(results, subprocess.check_output([sys.executable, '-c', 'print(6)'], text=True), end='')\n"
    )
    assert (execution.stdout, execution.exit_code) == ("[0, 1, 2, 4, 5] 6\n", 0), execution.stderr


def test_each_run_has_a_scratch_folder_of_its_own(sandbox: Sandbox) -> None:
    source = "import os; print(os.listdir('.')); open('left', 'w').write('x')"
    assert [sandbox.run(source).stdout for _ in range(2)] == ["[]\n", "[]\n"]


def test_hashes_are_the_same_in_every_run(sandbox: Sandbox) -> None:
    assert sandbox.run("print(hash('a'))").stdout == sandbox.run("print(hash('a'))").stdout


def test_callers_at_once_get_their_own_answers_at_the_same_time(sandbox: Sandbox) -> None:
    barrier = threading.Barrier(8)

    def call(number: int) -> str:
        barrier.wait()
        return sandbox.run("print(int(input()) ** 2)", str(number)).stdout

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(8))) == [f"{i * i}\n" for i in range(8)]


def test_a_slow_program_delays_no_other(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(sandbox.run, "import time; time.sleep(60)", limits=Limits(wall_seconds=1.5))
        assert sandbox.run("print(1)").stdout == "1\n"
        assert not slow.done()
        assert slow.result().ended == "timeout"


def test_the_program_gets_its_time_not_counting_the_sandboxs_start(sandbox: Sandbox) -> None:
    began = time.monotonic()
    assert sandbox.run("import time; time.sleep(60)", limits=Limits(wall_seconds=0.5)).ended == "timeout"
    assert 0.5 <= time.monotonic() - began < 5


def test_another_language_is_refused_by_its_name(sandbox: Sandbox) -> None:
    with pytest.raises(UnsupportedLanguage, match="'rust'"):
        sandbox.run("fn main() {}", language="rust")


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="processes must be positive, not 0"):
        Limits(processes=0)
