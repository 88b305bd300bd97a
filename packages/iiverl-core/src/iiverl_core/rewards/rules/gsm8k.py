"""The rule of `openai/gsm8k`: the number after the last `####` is the answer."""

import re
from decimal import Decimal, InvalidOperation

# "#### -1,234.50": a blank after the marker, commas only between groups of three digits. The number must not continue
# ("3/4", "1,2", "2^5"), since its first part is not the answer then.
_ANSWER = re.compile(
    r"""\#\#\#\#[ \t]+
        (?P<sign>[-+−]?)(?:\\?\$)?(?P<inner_sign>[-−]?)
        (?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)
        (?![ \t]*[/^][ \t]*[0-9]|[.,]?[0-9])""",
    re.VERBOSE,
)


def score(response: str, ground_truth: str | int | float) -> float:
    """Score 1 if the last `#### number` of the response equals the ground truth, else 0.

    Strict as in verl: without the marker there is no answer. Commas, dollar signs, trailing zeros and a full stop do
    not matter. The ground truth may be the number or a solution that ends in `#### number`, as in the dataset.

    Raises:
        ValueError: the ground truth is not a number.
    """
    expected = _ground_truth(ground_truth)
    return 1.0 if _last_number(response) == expected else 0.0


def answer(response: str) -> str | None:
    """Return the number after the last marker in plain notation, or None if there is none."""
    number = _last_number(response)
    return None if number is None else f"{number.normalize():f}"


def _last_number(response: str) -> Decimal | None:
    answers = list(_ANSWER.finditer(response))
    if not answers:
        return None
    last = answers[-1]
    value = Decimal(last["number"].replace(",", ""))
    negative = last["sign"] in ("-", "−") or last["inner_sign"] != ""
    return value.copy_negate() if negative else value


def _ground_truth(ground_truth: str | int | float) -> Decimal:
    text = str(ground_truth).rpartition("####")[2].strip()
    try:
        value = Decimal(text.replace(",", "").replace("$", "").replace("−", "-"))
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite():
        raise ValueError(f"the ground truth of a gsm8k row is a number such as 72, not {ground_truth!r}")
    return value
