"""The MATH and geometry3k rules: finding the box, and when two answers are written alike."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.rewards.rules import geometry3k, math
from iiverl_core.rewards.rules.math import last_boxed
from iiverl_core.rewards.rules.normal_form import normal_form

BOXES = [
    (r"The answer is $\boxed{42}$.", "42"),
    (r"First $\boxed{41}$, but then $\boxed{42}$.", "42"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\sqrt{\frac{a^{2}}{b_{1}}}} and more {braces}", r"\sqrt{\frac{a^{2}}{b_{1}}}"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{ 5 }", "5"),
    (r"\boxed {5}", "5"),
    ("\\boxed{\n5\n}", "5"),
    (r"$\boxed 5$ is it", "5"),
    (r"$\boxed\frac{1}{2}$", r"\frac{1}{2}"),
    (r"\fbox{7}", "7"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
    (r"\boxed{a \\}", r"a \\"),
    (r"\boxed{}", ""),
    (r"\boxed{1} \boxedfoo{2}", "1"),
    ("no box, {42}", None),
    ("", None),
    (r"\boxed{\frac{1}{2}", None),
    (r"\boxed{1} and \boxed{2", "1"),
]


@pytest.mark.parametrize(("text", "content"), BOXES)
def test_the_last_box(text, content):
    assert last_boxed(text) == content


SAME = [
    ("42", "42."),
    ("42", " 42 "),
    ("42", "$42$"),
    ("42", r"\text{42}"),
    ("42", "+42"),
    ("42", "x = 42"),
    ("42", "42.0"),
    ("-42", "−42"),
    ("1234", "1,234"),
    ("1234", "1 234"),
    ("1234", r"1{,}234"),
    ("10236", r"10,\!236"),
    ("11111111100", r"11,\! 111,\! 111,\! 100"),
    ("1234.5", "1,234.50"),
    ("-1234", "-1,234"),
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\tfrac12"),
    (r"\frac{1}{2}", r"\frac 1 2"),
    (r"\frac{1}{2}", r"\frac1{2}"),
    (r"\frac{1}{2}", r"\frac{1}2"),
    (r"\frac{1}{2}", r"\frac { 1 } { 2 }"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "1 / 2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", ".50"),
    (r"\frac{1}{72}", r"\frac1{72}"),
    (r"-\frac{1}{2}", "-1/2"),
    (r"-\frac{1}{2}", "-0.5"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"-\frac{1}{2}", r"\frac{1}{-2}"),
    (r"\frac{5}{4}", "1.25"),
    (r"\frac{3\pi}{4}", r"3\pi/4"),
    (r"\frac{\sqrt{2}}{2}", r"\sqrt2/2"),
    (r"\frac{\pi}{4}", r"\frac\pi4"),
    (r"\frac{x+1}{2}", r"\dfrac{x + 1}2"),
    (r"\frac{\frac{1}{2}}{3}", r"\frac{\frac12}3"),
    (r"1\frac{1}{2}", "1 1/2"),
    (r"1\frac{1}{2}", r"1 \dfrac 1 2"),
    (r"2\sqrt{3}", r"2\sqrt3"),
    (r"2\sqrt{3}", "2√3"),
    (r"2\sqrt{221}", r"2 \sqrt { 221 }"),
    (r"\sqrt[3]{2}", r"\sqrt[3]2"),
    (r"2\pi", "2π"),
    ("90", r"90^\circ"),
    ("90", r"90^{\circ}"),
    ("90", "90°"),
    ("90", r"90\text{ degrees}"),
    ("50", r"50\%"),
    ("50", "50%"),
    ("50", "50 percent"),
    ("5", r"\$5"),
    ("5", "$5"),
    ("5", r"5 \text{ cm}"),
    ("5", r"5\text{ cm}^2"),
    ("5", r"5~\mathrm{cm}^{2}"),
    ("5", r"5\,\mbox{inches}"),
    ("5", "5 cm"),
    ("5", "5 square units"),
    ("5", "5 miles per hour"),
    ("5", r"5 \text{ sq. ft.}"),
    (r"\frac{1}{2}", r"\frac{1}{2}\text{ hour}"),
    (r"5\pi", r"5\pi \text{ m}"),
    ("(1,2)", r"\left(1, 2\right)"),
    ("(1,2)", r"\bigl( 1,\, 2 \bigr)"),
    (r"\{1,2\}", r"\left\{ 1, 2 \right\}"),
    (r"\{1,2\}", r"\lbrace 1,2\rbrace"),
    ("1,2", r"1 \text{ and } 2"),
    ("1,2", "1 or 2"),
    ("1,2,3", r"1, 2, \text{ and } 3"),
    ("Evelyn", r"\text{Evelyn}"),
    ("B", r"\text{(B)}"),
    ("B", r"\textbf{B}"),
    (r"x\leq 3", r"x \le 3"),
    (r"x\neq 3", r"x≠3"),
    ("x^2+1", "x^{2} + 1"),
    ("x_1", "x_{1}"),
    (r"[-2,7)\cup(7,\infty)", r"[-2, 7) ∪ (7, ∞)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    (r"\pi r^2", r"\pi  r^{2}"),
]

DIFFERENT = [
    ("42", "24"),
    ("42", "-42"),
    ("42", ""),
    ("12", "1 2"),
    ("12", "1,2"),
    ("01", "0,1"),
    ("100200", "(100,200)"),
    (r"\frac{11}{2}", "1 1/2"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"\frac{1}{3}", "0.33"),
    (r"0.\overline{3}", "0.3"),
    ("0.333", "0.333..."),
    ("5!", "5"),
    ("3x", "3"),
    ("x", "X"),
    ("x^{10}", "x^10"),
    ("x^2", "x2"),
    ("2,1", "1,2"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    ("320", r"3 \text{ hours } 20 \text{ minutes}"),
    ("5", r"5\text{ million}"),
    (r"5\text{ thousand}", r"5\text{ million}"),
    (r"8:00 \text{ a.m.}", r"8:00 \text{ p.m.}"),
    (r"2\mathbf{i}+3\mathbf{j}", "2+3"),
    (r"\text{odd}", r"\text{even}"),
    ("[1,2)", "[1,2]"),
    (r"10_{5}", r"10_{6}"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_written_alike(one, other):
    assert normal_form(one) == normal_form(other)
    assert math.score(rf"So the answer is $\boxed{{{other}}}$.", one) == 1.0


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_not_written_alike(one, other):
    assert normal_form(one) != normal_form(other)
    assert math.score(rf"So the answer is $\boxed{{{other}}}$.", one) == 0.0


def test_a_response_without_a_box_scores_nothing():
    assert math.score("The answer is 42.", "42") == 0.0
    assert math.score(r"\boxed{42", "42") == 0.0


def test_the_ground_truth_may_be_a_whole_solution():
    assert math.score(r"\boxed{42}", r"We add, and get $\boxed{42}$.") == 1.0
    assert math.score(r"\boxed{We add}", r"We add, and get $\boxed{42}$.") == 0.0


@pytest.mark.parametrize("ground_truth", ["", "  ", "$", r"so $\boxed{}$"])
def test_an_empty_ground_truth_is_told(ground_truth):
    with pytest.raises(ValueError, match="ground truth of a MATH row"):
        math.score(r"\boxed{42}", ground_truth)


LATEX = st.sampled_from(
    [
        r"\boxed{",
        r"\boxed",
        r"{",
        r"}",
        r"\frac",
        r"\dfrac",
        r"\sqrt",
        r"[",
        r"]",
        r"(",
        r")",
        r"\text{",
        r"\mathrm{",
        r"^",
        r"_",
        r"\circ",
        r"\left",
        r"\right",
        r".",
        r",",
        r"$",
        r"%",
        r"/",
        r"=",
        r"-",
        r"+",
        r"1",
        r"23",
        r"0.5",
        r"x",
        r"cm",
        r"\\",
        r"\!",
        r"\,",
        r"\quad",
        r"and",
        r"or",
    ]
)
SOUP = st.lists(LATEX | st.sampled_from([" ", "\n"]) | st.text(max_size=3), max_size=40).map("".join)


@given(SOUP)
def test_any_text_has_a_score(text):
    assert math.score(text, "42") in (0.0, 1.0)
    assert math.score(rf"\boxed{{{text}}}", r"\frac{1}{2}") in (0.0, 1.0)
    assert 0.0 <= geometry3k.score(text, "42") <= 1.0


@given(st.text(alphabet=string.ascii_letters + string.digits + " +-*/=(),.", min_size=1, max_size=30))
def test_every_answer_equals_itself(answer):
    if normal_form(answer):
        assert math.score(rf"\boxed{{{answer}}}", answer) == 1.0


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_numbers_keep_their_value(digits, places):
    decimal = f"{digits / 10**places:.{places}f}" if places else str(digits)
    if decimal.startswith("-0") and not decimal.strip("-0."):
        decimal = decimal[1:]
    grouped = f"{float(decimal):,.{places}f}"
    assert normal_form(grouped) == normal_form(decimal)
    assert normal_form(str(int(digits) + 10**13)) != normal_form(decimal)


PIECES = re.findall(r"\S+", r"{ } \ \boxed{ \frac{ \frac{{} \text{ \sqrt[ ^ \quad 9 0. 1, 5cm \frac1 $ \left")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("piece", [*PIECES, " ", "1 ", "\\ ", "and "])
def test_long_answers_take_no_long_time(piece):
    answer = piece * (200_000 // len(piece))
    assert math.score(answer, "42") == 0.0
    assert math.score(f"\\boxed{{{answer}}}", "42") == 0.0
    assert normal_form(answer) != "42"


GEOMETRY = [
    (r"<think>The angles add up to 180.</think> \boxed{48}", 1.0),
    ("\n<think>\nline\n</think>\n$\\boxed{48}$ is the answer", 1.0),
    (r"<think>so \boxed{48}</think> that is \boxed{48}", 1.0),
    (r"\boxed{48}", 0.9),
    (r"Well, <think>…</think> \boxed{48}", 0.9),
    (r"<think>so \boxed{48}</think> 48", 0.9),
    (r"<think>so \boxed{48}", 0.9),
    (r"<think>…</think> \boxed{47}", 0.1),
    (r"<think>…</think> \boxed{48} or \boxed{47}", 0.1),
    (r"<think>…</think> 48", 0.0),
    ("48", 0.0),
    ("", 0.0),
]


@pytest.mark.parametrize(("response", "expected"), GEOMETRY)
def test_geometry_scores_answer_and_form(response, expected):
    assert geometry3k.score(response, "48") == pytest.approx(expected, abs=1e-12)


def test_geometry_ground_truths_are_compared_in_normal_form():
    assert geometry3k.score(r"<think></think>\boxed{2\sqrt{221}}", r"2 \sqrt { 221 }") == 1.0
