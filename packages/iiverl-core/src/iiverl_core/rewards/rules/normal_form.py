r"""Normalize answers of mathematics datasets.

Two answers are equal if their normal forms are the same string, as in evaluations of MATH since Hendrycks et al.
(arXiv:2103.03874). Nothing is computed, so `\frac{2}{4}` is not `\frac{1}{2}` and `x+1` is not `1+x`; only a decimal
is written as a fraction.

The passes run in the order of this file. Each takes time linear in the length of the answer, which a model wrote and
may be anything.
"""

import re
from fractions import Fraction
from typing import TypeAlias

_Spellings: TypeAlias = tuple[tuple[re.Pattern[str], str], ...]


def _spellings(*pairs: tuple[str, str]) -> _Spellings:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_CHARACTERS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "π": r"\pi ",
        "√": r"\sqrt ",
        "∞": r"\infty ",
        "×": r"\times ",
        "·": r"\cdot ",
        "±": r"\pm ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∪": r"\cup ",
        "°": "",
        "~": " ",
    }
)

_LAYOUT = _spellings(
    # Between digits, "10,\!236" and "10{,}236" can only be thousands.
    (r"(?<=\d)(?:,\\!|\{,\}|\\,) ?(?=\d{3}(?!\d))", ""),
    (r"\\?[$%]|(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])", " "),
    (r"\\(?:left|right)(?![a-zA-Z]) ?\.?", ""),
    (r"\\(?:[bB]ig{1,2}[lr]?|displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
    (r"\^ ?(?:\\circ(?![a-zA-Z])|\{ ?\\circ ?\})|\\degrees?(?![a-zA-Z])", ""),
    (r" {2,}", " "),
)

_NAMES = _spellings(
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\le(?![a-zA-Z])", r"\\leq"),
    (r"\\ge(?![a-zA-Z])", r"\\geq"),
    (r"\\ne(?![a-zA-Z])", r"\\neq"),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    # A list in words, and a mixed number before its space is removed.
    (r"\\text ?\{ ?,? ?(?:and|or) ?\}| (?:and|or) ", ","),
    (r"(?<=\d) (\d+) ?/ ?(\d+)", r"\\frac{\1}{\2}"),
)

# A space separates "\pi r" and "1 2"; all others are cosmetic.
_SPACE = re.compile(r"(\\[a-zA-Z]+ (?=[a-zA-Z])|\d (?=\d))| ")

_UNITS = (
    "degrees?|deg|percent|dollars?|cents?|units?|inch(?:es)?|in|feet|foot|ft|yards?|yd|miles?|mi|mm|cm|dm|km"
    "|(?:centi|kilo)?met(?:er|re)s?|(?:kilo)?grams?|kg|pounds?|lbs?|ounces?|oz|lit(?:er|re)s?|ml|gallons?"
    "|seconds?|sec|minutes?|min|hours?|hrs?|days?|weeks?|months?|years?|mph"
)

_WORDS = _spellings(
    # Text after a quantity is its unit and is removed with its exponent. "a.m." and "p.m." distinguish times and stay,
    # as "million" does, and text between two numbers, which would become one.
    (
        r"(?<=[^+\-*/=(,\[{<>&|:_^])"
        r"(?:\\(?:text|mbox|hbox|textrm)\{(?![ap]\.?m\b|(?:hundred|thousand|million|billion|trillion|dozen)s?\b)[^{}]*\}|\\mathrm\{[^{}]{2,}\})"
        r"(?:\^(?:\{\d\}|\d))?(?!\d)",
        "",
    ),
    (r"\\(?:text(?:rm|bf|it|sf)?|mbox|hbox|math(?:rm|bf|it|sf)|boldsymbol)\{([^{}]*)\}", r"\1"),
    (rf"(?<=[\d}}])(?:square|sq\.?|cubic|cu\.?)?(?:{_UNITS})(?:per[a-z]+)?\.?(?:\^(?:\{{\d\}}|\d))?$", ""),
)

_BRACES = _spellings(
    # The arguments of "\frac12" are "1" and "2"; that of "\sqrt3" is "3"; that of "x^{2}" needs no braces.
    (r"\\frac ?(\d|[a-zA-Z]|\\[a-zA-Z]+)", r"\\frac{\1}"),
    (r"\\frac(\{[^{}]*\}) ?(\d|[a-zA-Z]|\\[a-zA-Z]+)", r"\\frac\1{\2}"),
    (r"\\frac(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}) ?(\d|[a-zA-Z]|\\[a-zA-Z]+)", r"\\frac\1{\2}"),
    (r"\\sqrt(\[[^\[\]]*\])? ?(\d|[a-zA-Z]|\\[a-zA-Z]+)", r"\\sqrt\1{\2}"),
    (r"([\^_])\{(\w)\}", r"\1\2"),
)

_ENDS = _spellings(
    (r",{2,}", ","),
    (r"(?:(?<!\.)\.|[,;:])$", ""),
    (r"^[a-zA-Z]{1,2}=(?=[^=]*$)", ""),
    (r"^\+", ""),
    (r"^(-?)(\d*(?:\\[a-zA-Z]+(?:\{[^{}]*\})?|[a-zA-Z])|\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"^\\frac\{-([^{}+\-]+)\}(?=\{[^{}]*\}$)", r"-\\frac{\1}"),
    (r"^\\frac(\{[^{}+\-]+\})\{-([^{}+\-]+)\}$", r"-\\frac\1{\2}"),
    (r"^\(([A-Z])\)$", r"\1"),  # the choice "(B)" is "B"
)

_THOUSANDS = re.compile(r"(-?[0-9]{1,3})((?:[, ][0-9]{3})+)((?:\.[0-9]+)?)")
# A decimal with more digits is a rounded result, which no common fraction equals.
_DECIMAL = re.compile(r"(-?)([0-9]{0,15})\.([0-9]{1,15})")


def normal_form(answer: str) -> str:
    r"""Rewrite an answer so that the usual spellings of equal answers become equal strings.

    Spaces, `\left`, units, degree, percent and dollar signs are removed; `\dfrac12`, `1/2` and `0.5` become `\frac{1}{2}`;
    `1,234` becomes `1234`.
    """
    text = " ".join(answer.translate(_CHARACTERS).split())
    text = _rewrite(_rewrite(text, _LAYOUT).strip(), _NAMES)
    text = _SPACE.sub(lambda space: space[1] or "", text)
    for spellings in (_WORDS, _BRACES, _ENDS):
        text = _rewrite(text, spellings)
    return _fraction_of_decimal(_without_thousands(text))


def _rewrite(text: str, spellings: _Spellings) -> str:
    for pattern, replacement in spellings:
        text = pattern.sub(replacement, text)
    return text


def _without_thousands(text: str) -> str:
    """Join "1,234" and "1 234" if that is the whole answer: "(100,200)" is a point."""
    number = _THOUSANDS.fullmatch(text)
    return number[1] + re.sub("[, ]", "", number[2]) + number[3] if number else text


def _fraction_of_decimal(text: str) -> str:
    number = _DECIMAL.fullmatch(text)
    if number is None:
        return text
    sign, whole, places = number.groups()
    value = Fraction(int(whole + places), 10 ** len(places))
    spelled = str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return sign + spelled if value else spelled
