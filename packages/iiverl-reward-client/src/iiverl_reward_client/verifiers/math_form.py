r"""Compare how two answers are written: text, units, bases, brackets and operators.

For `math_verifiable`. Math-Verify compares values: it multiplies the letters of `listen`, drops units and subscripts,
takes `(0,1)` for `\{0,1\}`, and evaluates `\int_0^1 x^2\,dx`. Every function takes time linear in the answers' lengths.
"""

import re

_WRAPPER = re.compile(r"\\(?:text(?:rm|bf|it|sf)?|mbox|hbox|math(?:rm|bf|it|sf)|operatorname)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"(?:\\[,;:!> ]|~|\\q?quad(?![a-zA-Z])|\s)+")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_LETTER_RUN = re.compile(r"[^\W\d_]+")
_PLAIN_TEXT = re.compile(r"[^\W\d_][^\W\d_ .,'’-]*(?:[ .,'’-]+[^\W\d_]+)*[.]?")
_PARENTHESES = re.compile(r"\(([^()]*)\)")
_TIME = re.compile(r"\d{1,2}:\d{2}(?!\d)")
_DAY_HALF = re.compile(r"\b([ap])\.?\s?m\b\.?", re.IGNORECASE)
# Words that are mathematics, and products of the usual variables.
_SYMBOLS = frozenset(
    {"pi", "inf", "infty", "infinity", "oo", "sqrt", "sin", "cos", "tan", "log", "ln", "exp"}
)
_PRODUCT = re.compile(r"[a-z]{2}|[abc]{3}|[xyz]{3}|[pqr]{3}|[kmn]{3}")


def as_text(answer: str) -> str:
    """Normalize an answer that is text: wrappers, spaces, case and a final full stop do not count."""
    text = _SPACES.sub(" ", _WRAPPER.sub(r"\1", answer).replace("$", " ")).strip(" .{}")
    half = _DAY_HALF.sub(lambda match: f" {match[1]}m", text)
    text = _SPACES.sub(" ", half).strip().casefold()
    single = _PARENTHESES.fullmatch(text)
    text = single[1].strip() if single else text
    return text if any(each.isalnum() for each in text) else ""


def trimmed(answer: str) -> str:
    """Strip white space and a final full stop, which ends a sentence; an ellipsis stays."""
    text = answer.strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def is_text(answer: str) -> bool:
    """Return whether an answer is words, letters in order (`TFF`), or a time of day, and no mathematics."""
    if _TIME.match(_SPACES.sub("", answer)):
        return True
    wrapped = _WRAPPER.sub("", answer).strip(" $.")
    text = _SPACES.sub(" ", _WRAPPER.sub(r"\1", answer)).strip(" $")
    if _COMMAND.search(text) or not _PLAIN_TEXT.fullmatch(text):
        return False
    runs = _LETTER_RUN.findall(text)
    if not wrapped:
        return any(len(run) > 1 for run in runs)
    if text.casefold() in _SYMBOLS or (len(runs) == 1 and _PRODUCT.fullmatch(text)):
        return False
    return len(runs[0]) > 1 and any(len(run) > 1 for run in runs)


def differ(given: str, expected: str) -> bool:
    """Return whether two answers differ in what Math-Verify overlooks: base, brackets, unit, half of the day."""
    bases = _base(given), _base(expected)
    if all(bases) and bases[0] != bases[1]:
        return True
    brackets = _brackets(given), _brackets(expected)
    if all(brackets) and brackets[0] != brackets[1] and "{" in f"{brackets[0]}{brackets[1]}":
        return True
    units = _unit(given), _unit(expected)
    return all(units) and units[0] != units[1]


_NUMERAL_WITH_BASE = re.compile(r"([0-9A-F]+)_(?:\{\s*(?:\\text\{)?\s*(\w+)\s*\}?\s*\}|(\w))")


def _base(answer: str) -> str | None:
    r"""Return `1010_{2}` in one spelling; None if the answer is no numeral with a base."""
    match = _NUMERAL_WITH_BASE.fullmatch(_SPACES.sub("", answer.strip(" $")))
    return f"{match[1].lstrip('0')}_{match[2] or match[3]}" if match else None


_SIZES = re.compile(r"\\(?:left|right|[bB]ig{1,2}[lr]?)(?![a-zA-Z])")


def _brackets(answer: str) -> str | None:
    """Return the brackets around a list with commas, such as `()`, `[)` or `{}`."""
    text = _SPACES.sub("", _SIZES.sub("", answer.strip(" $")))
    text = text.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}")
    opening = r"\{" if text.startswith(r"\{") else text[:1]
    closing = r"\}" if text.endswith(r"\}") else text[-1:]
    if opening not in ("(", "[", r"\{") or closing not in (")", "]", r"\}") or "," not in text:
        return None
    depth = 0
    for position, character in enumerate(text):  # "(0,1) \cup (2,3)" is not in one pair of brackets
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and position < len(text) - 1 and character in ")]}":
            return None
    return opening[-1] + closing[-1]


_UNIT_NAMES = {
    name: unit
    for unit, names in {
        "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "dm": "dm decimeter decimetre",
        "m": "m meter metre", "km": "km kilometer kilometre", "in": "in inch inche", "ft": "ft foot feet",
        "yd": "yd yard", "mi": "mi mile", "mg": "mg milligram", "g": "g gram", "kg": "kg kilogram",
        "lb": "lb pound", "oz": "oz ounce", "t": "ton tonne", "ml": "ml milliliter millilitre",
        "l": "l liter litre", "gal": "gal gallon", "ms": "ms millisecond", "s": "s sec second",
        "min": "min minute", "h": "h hr hour", "d": "day", "week": "week wk", "month": "month",
        "year": "year yr", "mph": "mph", "cent": "cent", "dollar": "dollar", "am": "am", "pm": "pm",
        "degree": "degree deg", "radian": "radian rad",
    }.items()
    for name in names.split()
}  # fmt: skip
_TRAILING_WORDS = re.compile(r"(?<=[\d})])([a-z][a-z. /]*)(?:\^\{?(\d)\}?)?$")
_TRAILING_WRAPPED = re.compile(r"(?<=[\d})])\s*\\(?:text(?:rm)?|mbox|hbox|mathrm)\{([^{}]*)\}")


def _unit(answer: str) -> str | None:
    """Return the unit behind a number in one spelling, with its exponent; None if there is none that is known."""
    text = _SPACES.sub(" ", answer.strip(" $.")).casefold()
    text = _TRAILING_WRAPPED.sub(r"\1", text).replace("} ^", "}^")
    text = re.sub(r"(?<=[\d})]) (?=[a-z])", "", text)
    match = _TRAILING_WORDS.search(text)
    if match is None:
        return None
    words = _DAY_HALF.sub(r"\1m", match[1].strip()).replace(".", "").replace("/", " per ").split()
    power = match[2] or ""
    for word, exponent in (("square", "2"), ("sq", "2"), ("cubic", "3"), ("cu", "3")):
        if words and words[0] == word:
            words, power = words[1:], exponent
    names = [_UNIT_NAMES.get(word) or _UNIT_NAMES.get(word.removesuffix("s")) for word in words]
    if not names or names[0] is None:
        return None
    return " ".join(name or word for name, word in zip(names, words, strict=True)) + power


_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(
    rf"(?<=[\d}}])\s*(?:\\[,;: ]|~)*\s*(?:\\(?:text(?:rm)?|mbox|hbox|mathrm)\{{\s*({'|'.join(_SCALES)})s?\b([^{{}}]*)\}}"
    rf"|\b({'|'.join(_SCALES)})s?\b)",
    re.IGNORECASE,
)


_DIGIT_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;: ]|~)\d{3})+(?!\d)")
_THIN_SPACE = re.compile(r"(?<!\\)\\[,;: ]|~")


def readable(answer: str) -> str:
    r"""Write an answer so that Math-Verify reads it: `12\,345` as 12345, `12\,cm` as `12 cm`, and words as powers of ten."""
    joined = _DIGIT_GROUPS.sub(lambda match: _THIN_SPACE.sub("", match[0]), answer)
    return without_scale_words(_THIN_SPACE.sub(" ", joined))


def without_scale_words(answer: str) -> str:
    r"""Write `5\text{ million people}` as `5 \cdot 10^{6}\text{ people}`."""

    def power(match: re.Match[str]) -> str:
        rest = rf"\text{{{match[2]}}}" if match[2] and match[2].strip() else ""
        return rf" \cdot 10^{{{_SCALES[(match[1] or match[3]).lower()]}}}{rest}"

    return _SCALE.sub(power, answer)


# Operators by kind: an answer may have those of the kinds that its reference has.
_NAMED = {
    "integral": r"\\i{1,3}nt|\\oint",
    "sum": r"\\sum|\\prod|\\bigcup|\\bigcap",
    "limit": r"\\lim(?:sup|inf)?",
    "divisor": r"\\gcd|\\lcm|\\operatorname\s*\{\s*(?:gcd|lcm)\s*\}|\\(?:text|mathrm)\s*\{\s*(?:gcd|lcm)\s*\}|(?<![a-z])(?:gcd|lcm)",
    "modulo": r"\\b?mod",
    "choice": r"\\[dt]?binom|\\choose",
    "factorial": r"!",
    "extremum": r"\\(?:max|min|sup|inf)(?:imum)?",
    "determinant": r"\\det|\\begin\s*\{vmatrix\}|\\operatorname\s*\{\s*(?:det|tr|rank)\s*\}",
    "rounding": r"\\[lr](?:floor|ceil)|\\(?:floor|ceil)",
    "derivative": r"\\[dt]?frac\s*\{\s*(?:d|\\partial|\\mathrm\s*\{\s*d\s*\})[^{}]*\}\s*\{\s*(?:d|\\partial|\\mathrm\s*\{\s*d\s*\})",
    "absolute value": r"\\left\s*\||\\lvert(?![a-zA-Z])|\\vert(?![a-zA-Z]).*?\\vert|\|[^|{}]+\|",
    "division": r"\\div(?![a-zA-Z])|÷",
    "trigonometric": r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?",
    "logarithm": r"\\(?:log|ln|lg)",
}
_LETTERS_MAY_FOLLOW = ("factorial", "derivative", "absolute value", "division")
_NAMED_PATTERNS = {
    kind: re.compile(rf"(?:{pattern})" + ("" if kind in _LETTERS_MAY_FOLLOW else "(?![a-zA-Z])"))
    for kind, pattern in _NAMED.items()
}
_NUMBER = r"\d[\d.]*"
_TIMES = r"(?:\\cdot|\\times|\\ast|\*|×|·)"
# "3 \times 10^{8}", "10^{8}" and "3e8" are how a number is written.
_SCIENTIFIC = re.compile(rf"(?:{_NUMBER}{_TIMES}|(?<![\d.)}}]))10\^(?:\{{-?\d+\}}|\d)|{_NUMBER}[eE][-+]?\d+")
_PRODUCT_OF_NUMBERS = re.compile(rf"[\d}})]{_TIMES}[({{\[]?-?\d|(?<=\d)\)\(-?\d")
_PLAIN_NUMBER = re.compile(
    r"-?(?:\d[\d,]*(?:\.\d*)?|\.\d+|\d+/\d+|\\[dtc]?frac(?:\{-?\d+\}|\d)(?:\{-?\d+\}|\d))"
)
_SUM_OR_POWER = re.compile(r"(?<=[\d})a-zA-Z])[-+^]|\\(?:sqrt|pm)(?![a-zA-Z])")
_QUOTIENT = re.compile(r"\\[dtc]?frac\{?-?\d|[\d)}]/\(?-?\d")
_WHOLE_NUMBER = re.compile(r"-?\d[\d,]*")
_BETWEEN_NUMBERS = re.compile(r"\\?[(){}\[\]]|,|;|\\(?:cup|infty)(?![a-zA-Z])")
_UNIT_OR_DEGREE = re.compile(
    r"\^\{?\\circ\}?|\\(?:text(?:rm)?|mbox|hbox|mathrm)\{[^{}]*\}(?:\^\{?-?\d\}?)?|(?<=\d)[a-zA-Z]+\^\{?\d\}?$"
)


def restates(given: str, expected: str) -> bool:
    r"""Return whether an answer has operators that its reference does not have, and so may restate the problem.

    For a reference of plain numbers (`3`, `(1,2)`) these are also sums, powers and roots of numbers, and for whole numbers
    quotients; `3 \times 10^8` is a number.
    """
    for pattern in _NAMED_PATTERNS.values():
        if pattern.search(given) and not pattern.search(expected):
            return True
    value = _SCIENTIFIC.sub("1", _value(given))
    if _PRODUCT_OF_NUMBERS.search(value) and not re.search(_TIMES, expected):
        return True
    plain = _value(expected)
    numbers = [plain] if _PLAIN_NUMBER.fullmatch(plain) else _BETWEEN_NUMBERS.sub(" ", plain).split()
    if not all(_PLAIN_NUMBER.fullmatch(number) for number in numbers):
        return False
    whole = all(_WHOLE_NUMBER.fullmatch(number) for number in numbers)
    return bool(_SUM_OR_POWER.search(value) or (whole and _QUOTIENT.search(value)))


def _value(answer: str) -> str:
    """Return what is behind the last equals sign, without spaces, units and degrees."""
    text = _SPACES.sub("", _SIZES.sub("", answer).replace("−", "-")).strip("$.")
    return _UNIT_OR_DEGREE.sub("", text.rpartition("=")[2])
