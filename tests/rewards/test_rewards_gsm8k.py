"""The gsm8k rule: what counts as the answer, and when two answers are the same number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.rewards.rules import gsm8k

RIGHT = [
    ("Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = 72.\n#### 72", "72"),
    ("#### 5\nNo, that forgets the second day.\n#### 72", "72"),
    ("#### 72.", "72"),
    ("#### 72 clips.", "72"),
    ("**#### 72**", "72"),
    ("#### $72", "72"),
    (r"#### \$72", "72"),
    ("#### $1,234.50 in all", "1234.5"),
    ("#### 1,234,567", "1234567"),
    ("#### 1234567", "1,234,567"),
    ("#### 72.00", "72"),
    ("#### 072", "72"),
    ("#### .5", "0.5"),
    ("####   72", "72"),
    ("####\t72", "72"),
    ("##### 72", "72"),
    ("#### -3", "-3"),
    ("#### −3", "-3"),
    ("#### -$3", "-3"),
    ("#### $-3", "-3"),
    ("#### +3", "3"),
    ("#### 0", "-0"),
    ("#### 20%", "20"),
    ("#### 60 / day", "60"),
    ("#### 3, 4 and 5", "3"),
    ("#### 12\n#### no idea", "12"),
    ("#### 1" + "0" * 40, "1" + "0" * 40),
    ("#### 72", 72),
    ("#### 72", 72.0),
    ("#### 0.5", 0.5),
    ("#### 72", "She sold 24 clips.\n#### 72"),
    ("#### 1234", " $1,234 "),
]

WRONG = [
    ("", "72"),
    ("The answer is 72.", "72"),
    (r"\boxed{72}", "72"),
    ("### 72", "72"),
    ("####72", "72"),
    ("####\n72", "72"),
    ("#### 72\nWait.\n#### 71", "72"),
    ("#### x = 72", "72"),
    ("#### seventy-two", "72"),
    ("#### -72", "72"),
    ("#### 72", "-72"),
    ("#### - 72", "-72"),
    ("#### 72.5", "72"),
    ("#### 721", "72"),
    ("#### 3/4", "3"),
    ("#### 3 / 4", "3"),
    ("#### 2^5", "2"),
    ("#### 1,2", "1"),
    ("#### 1,2", "12"),
    ("#### 1,23,456", "123456"),
    ("#### 1.2.3", "1.2"),
    ("#### 1" + "0" * 39 + "1", "1" + "0" * 40),
]


@pytest.mark.parametrize(("response", "ground_truth"), RIGHT)
def test_right(response, ground_truth):
    assert gsm8k.score(response, ground_truth) == 1.0


@pytest.mark.parametrize(("response", "ground_truth"), WRONG)
def test_wrong(response, ground_truth):
    assert gsm8k.score(response, ground_truth) == 0.0


@pytest.mark.parametrize(
    "ground_truth", ["", "none", "72 clips", "nan", "inf", float("nan"), None, True, "#### ", [72], "1/2"]
)
def test_a_ground_truth_that_is_no_number_is_told(ground_truth):
    with pytest.raises(ValueError, match="is a number such as 72"):
        gsm8k.score("#### 72", ground_truth)


PIECES = st.sampled_from(["####", " ", "\n", "-", "$", ",", ".", "/", "7", "72", "1,000", "٣", "²", "x"])


@given(st.lists(PIECES | st.text(max_size=5), max_size=30).map("".join))
def test_any_text_has_a_score(response):
    assert gsm8k.score(response, "72") in (0.0, 1.0)


@given(st.integers(-(10**15), 10**15), st.text(alphabet="abc #\n.", max_size=30), st.booleans())
def test_every_integer_is_recognised(number, before, commas):
    written = f"{number:,}" if commas else str(number)
    assert gsm8k.score(f"{before}#### {written}", str(number)) == 1.0
    assert gsm8k.score(f"{before}#### {written}", str(number + 1)) == 0.0


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    "response", ["#" * 300_000, "#### " * 60_000, "####" + " " * 300_000, "#### " + "1" * 300_000 + "/2"]
)
def test_long_text_takes_no_long_time(response):
    assert gsm8k.score(response, "72") == 0.0
