import time

import pytest

from iiverl_core.telemetry.timers import Timers, duration


def test_parts_nest_add_up_and_are_drained():
    timers = Timers()
    with timers("step"):
        with timers("gen"):
            time.sleep(0.02)
        with timers("gen"):
            time.sleep(0.02)
        with timers("adv"):
            pass
    seconds = timers.drain()
    assert list(seconds) == ["timing_s/gen", "timing_s/adv", "timing_s/step"]
    assert 0.04 <= seconds["timing_s/gen"] <= seconds["timing_s/step"] < 1
    assert seconds["timing_s/adv"] < 0.02
    assert timers.drain() == {}


def test_a_part_that_raises_is_timed():
    timers = Timers()
    with pytest.raises(KeyError), timers("ref"):
        raise KeyError
    assert list(timers.drain()) == ["timing_s/ref"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (8.4, "8s"),
        (59.6, "1m00s"),
        (72, "1m12s"),
        (3 * 3600 + 5 * 60 + 59, "3h05m"),
        (52 * 3600, "2d04h"),
        (-1, "0s"),
    ],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text
