import builtins
import fcntl
import io
import logging
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.telemetry.bars import fit_row
from iiverl_core.telemetry.progress import Progress
from iiverl_core.telemetry.timers import Phase, short

STEP = {"critic/score/mean": 0.4124, "timing_s/step": 0.82}


def test_a_line_a_step_where_there_is_no_terminal():
    out = io.StringIO()
    with Progress(100, start_step=10, stream=out) as progress:
        with progress.phase("generate", total=8) as phase:
            phase.advance(8, tokens=100)
        progress.step_done(11, STEP)
        progress.log("step:11 - a:1.0")
        progress.step_done(12, {"timing_s/step": 1.22})
        progress.step_done(100, STEP)
    assert out.getvalue().splitlines() == [
        "step 11/100  reward 0.412  0.82 s/step  1m13s left",
        "step:11 - a:1.0",
        "step 12/100  reward 0.412  1.02 s/step  1m30s left",
        "step 100/100  reward 0.412  0.95 s/step",
    ]


def test_no_line_per_step_if_something_else_logs_one():
    out = io.StringIO()
    with Progress(2, step_lines=False, stream=out) as progress:
        progress.step_done(1, STEP)
        progress.log("step 2/2")
    assert out.getvalue() == "step 2/2\n"


def test_without_reward_and_without_a_measured_time():
    out = io.StringIO()
    with Progress(5, stream=out) as progress:
        time.sleep(0.06)
        progress.step_done(1, {})
    assert re.fullmatch(r"step 1/5  0\.(0[6-9]|1\d) s/step  \ds left\n", out.getvalue())


def test_a_long_phase_says_what_it_does_even_if_nothing_calls():
    out = io.StringIO()
    with Progress(5, stream=out, every=0.2) as progress:
        with progress.phase("generate", total=64) as phase:
            phase.advance(16, tokens=4000)
            time.sleep(0.5)
        with progress.phase("update"):
            time.sleep(0.3)
        time.sleep(0.3)  # between phases there is nothing to say
    lines = out.getvalue().splitlines()
    assert 2 <= len(lines) <= 4
    assert re.fullmatch(r"  generate  16/64  \d+\.\dk tok/s  \ds", lines[0])
    assert re.fullmatch(r"  update  \ds", lines[-1])
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_quick_phase_says_nothing():
    out = io.StringIO()
    with Progress(5, stream=out) as progress, progress.phase("update", total=3) as phase:
        phase.advance()
    assert out.getvalue() == ""


def test_an_inner_phase_gives_the_outer_one_back():
    with Progress(5, stream=io.StringIO()) as progress, progress.phase("validate") as outer:
        with pytest.raises(ValueError), progress.phase("generate"):
            assert progress.phase_now and progress.phase_now.name == "generate"
            raise ValueError
        assert progress.phase_now is outer
    assert progress.phase_now is None


def test_calls_are_cheap():
    with Progress(10**6, stream=io.StringIO()) as progress, progress.phase("generate", total=1000) as phase:
        start = time.perf_counter()
        for step in range(1000):
            phase.advance(1, tokens=10)
            progress.step_done(step, STEP)
        assert (time.perf_counter() - start) / 1000 < 1e-3


def test_phases_describe_themselves():
    assert re.fullmatch(r"3/8  \S+ tok/s  0s", describe(Phase("a", 8), n=3, tokens=5))
    assert describe(Phase("a"), n=3) == "3  0s"
    assert describe(Phase("a"), n=0) == "0s"


def describe(phase: Phase, n: int, tokens: int = 0) -> str:
    phase.advance(n, tokens)
    return phase.describe()


@pytest.mark.parametrize(("x", "text"), [(0, "0"), (950.4, "950"), (12345, "12.3k"), (1.26e6, "1.3M")])
def test_short_counts(x: float, text: str):
    assert short(x) == text


PROGRAM = """
import logging, sys, time
from iiverl_core.telemetry import Progress
logging.basicConfig(format="logged %(message)s")
with Progress(3) as progress:
    with progress.phase("generate", total=64) as phase:
        phase.advance(16, tokens=4000)
        time.sleep(0.6)
        logging.warning("this")
        print("printed that")
        progress.log("step:1 - " + "a:1.0 - " * 20 + "[end]")
        if "interrupt" in sys.argv:
            print("waiting")
            time.sleep(30)
    progress.step_done(1, {"critic/score/mean": 0.5, "timing_s/step": 2.0})
    time.sleep(0.4)
logging.warning("after")
"""


@dataclass
class Answer:
    """A line typed in answer to a prompt after some seconds, and all that was written meanwhile."""

    prompt: bytes
    line: bytes
    after: float = 0.0
    meanwhile: bytes = b""


def on_a_terminal(
    *args: str,
    program: str = PROGRAM,
    answers: Sequence[Answer] = (),
    columns: int = 80,
    seconds: float = 20,
    **environment: str,
) -> tuple[int, str]:
    """Run a program on a pseudo-terminal and return its exit code and all that it wrote."""
    main, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # A session of its own, with the terminal as its controlling one, so that ^C typed there reaches it.
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    env |= {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "24"} | environment
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + program,
            *args,
        ],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env=env,
        start_new_session=True,
    )
    os.close(secondary)
    written, seen = b"", 0
    deadline = time.monotonic() + seconds
    left = list(answers)
    due = None
    while time.monotonic() < deadline:
        if left and due is None and left[0].prompt in written[seen:]:
            seen = written.index(left[0].prompt, seen) + len(left[0].prompt)
            due = time.monotonic() + left[0].after
        if due is not None and time.monotonic() >= due:
            answer, due = left.pop(0), None
            answer.meanwhile, seen = written[seen:], len(written)
            os.write(main, answer.line)
        if not select.select([main], [], [], 0.05)[0]:
            continue
        try:
            chunk = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(main)
    return child.wait(timeout=5), written.decode()


def test_bars_on_a_terminal_with_lines_above_them():
    code, written = on_a_terminal()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n")
    assert code == 0
    assert re.search(r"step 0/3 +━+", plain)
    assert re.search(r"  generate +━+╺?━* 16/64  \d+\.\dk tok/s", plain)
    assert re.search(r"step 1/3 +━+╺?━* reward 0\.500  2\.00 s/step  4s left", plain)
    said = "step:1 - " + "a:1.0 - " * 20 + "[end]"
    assert {"logged this", "printed that", said, "logged after"} <= set(plain.splitlines())
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # the cursor is shown again
    assert "generate" not in plain[plain.rindex("step 1/3") :]


def test_ctrl_c_gives_the_terminal_back():
    code, written = on_a_terminal("interrupt", answers=[Answer(b"waiting", b"\x03")])
    assert code != 0
    assert "KeyboardInterrupt" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert written.rindex("\x1b[?25h") < written.index("KeyboardInterrupt")


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_terminal_that_takes_no_escape_codes_gets_plain_lines(environment: dict[str, str]):
    code, written = on_a_terminal(**environment)
    assert code == 0
    assert "\x1b" not in written
    assert "step 1/3  reward 0.500  2.00 s/step  4s left" in written.splitlines()


def test_a_file_gets_no_escape_codes_even_if_colours_are_forced():
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm", "TTY_COMPATIBLE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, check=True)
    assert b"step 1/3  reward 0.500  2.00 s/step  4s left\n" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr


DEBUGGED = """
import threading, time
from iiverl_core.telemetry import Progress
def compute_score():
    score = 0.25
    {ask}
    print("scored", score)
with Progress(3) as progress:
    with progress.phase("generate", total=64):
        time.sleep(0.5)
        thread = threading.Thread(target=compute_score)
        thread.start()
        time.sleep(0.5)
        progress.log("from another thread")
        thread.join()
        progress.step_done(1, {{"critic/score/mean": 0.5}})
        time.sleep(1.5)
"""

ASKING = {
    "breakpoint": ("breakpoint()", b"(Pdb) ", [b"p score * 3\n", b"c\n"]),
    "input": ("score = float(input('which score? '))", b"which score? ", [b"0.75\n"]),
}


@pytest.mark.parametrize("how", ASKING)
def test_nothing_moves_under_a_debugger_or_a_prompt(how: str):
    ask, prompt, lines = ASKING[how]
    answers = [Answer(prompt, line, after=1.5) for line in lines]
    code, written = on_a_terminal(program=DEBUGGED.format(ask=ask), answers=answers)
    assert code == 0, written
    assert [answer.meanwhile for answer in answers] == [b""] * len(lines)
    before, asked = written.split(prompt.decode(), 1)
    assert "step 0/3" in before and before.endswith("\x1b[2K")  # the bars were there, and were erased
    assert "0.75" in asked
    assert asked.index("scored") < asked.index("from another thread") < asked.index("step 1/3")


def test_plain_lines_wait_for_a_prompt_too():
    answer = Answer(b"which score? ", b"0.75\n", after=1.5)
    program = DEBUGGED.format(ask=ASKING["input"][0]).replace("Progress(3)", "Progress(3, every=0.3)")
    code, written = on_a_terminal(program=program, answers=[answer], TERM="dumb")
    assert code == 0, written
    assert answer.meanwhile == b""
    assert "from another thread" in written.partition("which score?")[2]


def test_input_is_given_back():
    before = builtins.input
    with Progress(3, stream=io.StringIO()):
        assert builtins.input != before
    assert builtins.input is before


@pytest.mark.parametrize("columns", [30, 60, 200])
def test_labels_are_never_cut(columns: int):
    program = PROGRAM.replace('"generate"', '"weights to the engine"').replace(
        "Progress(3)", "Progress(30000)"
    )
    code, written = on_a_terminal(program=program, columns=columns)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n")
    bars = [line for line in plain.splitlines() if line.startswith(("step 0", "step 1/", "  weights"))]
    assert code == 0 and bars
    assert "…" not in plain
    if columns >= 30:
        assert all(
            "step 0/30000" in bar or "step 1/30000" in bar or "  weights to the engine" in bar for bar in bars
        )
        assert all(len(bar.rstrip()) <= columns for bar in bars)
    if columns >= 60:
        assert any("weights to the engine" in bar and "16/64" in bar and "━" in bar for bar in bars)


@given(st.integers(1, 40), st.lists(st.text("ab", min_size=1, max_size=12), max_size=4), st.integers(1, 200))
def test_a_row_of_a_bar_fits_and_only_whole_parts_are_left_out(label: int, parts: list[str], columns: int):
    text = "  ".join(parts)
    width, (kept,) = fit_row(["x" * label], [text], columns)
    assert width == 0 or 6 <= width <= 24
    if width:
        assert kept == text
        assert max(label, 14) + width + len(text) + 2 <= columns
    else:
        assert parts[: len(kept.split("  "))] == kept.split("  ") or not kept
        assert not kept or max(label, 14) + 1 + len(kept) <= columns


def test_handlers_write_where_they_wrote_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    handler = logging.StreamHandler()
    log = logging.getLogger("iiverl.test")
    log.addHandler(handler)
    try:
        with Progress(3):
            assert handler.stream is sys.stderr is not err
            log.warning("above")
        assert handler.stream is sys.stderr is err
    finally:
        log.removeHandler(handler)
    assert "above" in out.getvalue()
    assert err.getvalue() == ""
