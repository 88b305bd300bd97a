import io
import logging
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from iiverl_core.telemetry.phase import Phase, short
from iiverl_core.telemetry.progress import Progress

STEP = {"critic/score/mean": 0.4124, "timing_s/step": 0.82}


def test_a_line_a_step_where_there_is_no_terminal():
    out = io.StringIO()
    with Progress(100, start_step=10, stream=out) as progress:
        with progress.phase("generate", total=8) as phase:
            phase.advance(8, tokens=100)
        progress.step_done(11, STEP)
        progress.say("step:11 - a:1.0")
        progress.step_done(12, {"timing_s/step": 1.22})
        progress.step_done(100, STEP)
    assert out.getvalue().splitlines() == [
        "step 11/100  reward 0.412  0.82 s/step  1m13s left",
        "step:11 - a:1.0",
        "step 12/100  reward 0.412  1.02 s/step  1m30s left",
        "step 100/100  reward 0.412  0.95 s/step",
    ]


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
        progress.say("step:1 - " + "a:1.0 - " * 20 + "[end]")
        if "interrupt" in sys.argv:
            print("waiting")
            time.sleep(30)
    progress.step_done(1, {"critic/score/mean": 0.5, "timing_s/step": 2.0})
    time.sleep(0.4)
logging.warning("after")
"""


def on_a_terminal(*args: str, interrupt_at: bytes | None = None, term: str = "xterm") -> tuple[int, str]:
    """Run the program on a pseudo-terminal of 80 columns and return its exit code and all that it wrote."""
    main, secondary = pty.openpty()
    # A session of its own, with the terminal as its controlling one, so that ^C typed there reaches it.
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {
        "TERM": term,
        "COLUMNS": "80",
        "LINES": "24",
    }
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)" + PROGRAM,
            *args,
        ],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        env=env,
        start_new_session=True,
    )
    os.close(secondary)
    written = b""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not select.select([main], [], [], 0.1)[0]:
            continue
        try:
            chunk = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        written += chunk
        if interrupt_at and interrupt_at in written:
            os.write(main, b"\x03")
            interrupt_at = None
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
    code, written = on_a_terminal("interrupt", interrupt_at=b"waiting")
    assert code != 0
    assert "KeyboardInterrupt" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    assert written.rindex("\x1b[?25h") < written.index("KeyboardInterrupt")


def test_a_terminal_that_cannot_redraw_gets_plain_lines():
    code, written = on_a_terminal(term="dumb")
    assert code == 0
    assert "\x1b" not in written
    assert "step 1/3  reward 0.500  2.00 s/step  4s left" in written.splitlines()


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
