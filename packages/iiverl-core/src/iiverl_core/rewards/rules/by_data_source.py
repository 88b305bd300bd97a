"""Map data sources to rules. A data source without a rule is an error before the run, never a zero."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from iiverl_core.errors import ConfigError
from iiverl_core.rewards.rules import geometry3k, gsm8k, math
from iiverl_core.samples import Prompt


@dataclass(frozen=True)
class Rule:
    """How responses of a data source are scored.

    `score` is a pure function of a response (any text) and the row's ground truth that returns a score between 0 and 1;
    it raises `ValueError` for a ground truth that the rule cannot use. `answer` extracts the answer of a response in a
    normal form, or None; responses to a prompt vote with it.
    """

    score: Callable[[str, Any], float]
    answer: Callable[[str], str | None]


RULES: dict[str, Rule] = {
    "openai/gsm8k": Rule(gsm8k.score, gsm8k.answer),
    "lighteval/MATH": Rule(math.score, math.answer),
    "DigitalLearningGmbH/MATH-lighteval": Rule(math.score, math.answer),
    "HuggingFaceH4/MATH-*": Rule(math.score, math.answer),
    "hiyouga/geometry3k": Rule(geometry3k.score, math.answer),
}
"""Rules by data source; `*` in a name matches any text."""

_NEED_A_SANDBOX = frozenset({"apps", "codecontests", "codeforces", "taco"})

_CUSTOM_FUNCTION = (
    "set custom_reward_function.path to a Python file that defines "
    "compute_score(data_source, solution_str, ground_truth, extra_info)"
)


class UnknownDataSource(ConfigError):  # noqa: N818
    """No built-in rule scores the data source."""

    def __init__(self, data_source: str, where: str = "") -> None:
        self.data_source = data_source
        self.where = where
        super().__init__(self._message())

    def __reduce__(self) -> tuple[type["UnknownDataSource"], tuple[str, str]]:
        return UnknownDataSource, (self.data_source, self.where)

    def _message(self) -> str:
        place = f"{self.where}: " if self.where else ""
        if not self.data_source:
            return (
                f"{place}there is no data_source, by which the built-in rules are chosen. Add the column "
                f"data_source ({', '.join(RULES)}) to the dataset, name the column that holds it as data.data_source_key, "
                f"or {_CUSTOM_FUNCTION}."
            )
        problem = f"{place}no built-in rule scores the data_source {self.data_source!r}"
        if self.data_source in _NEED_A_SANDBOX:
            return (
                f"{problem}: its programs have to run in a sandbox, which a reward server provides (verification "
                f"type code_verifiable). Score it there, or {_CUSTOM_FUNCTION}."
            )
        by_lower_case = {name.lower(): name for name in RULES}
        near = get_close_matches(self.data_source.lower(), by_lower_case, n=2, cutoff=0.6)
        meant = f" (did you mean {' or '.join(by_lower_case[name] for name in near)}?)" if near else ""
        return f"{problem}{meant}. Known: {', '.join(RULES)}. For other data sources, {_CUSTOM_FUNCTION}."


def rule_for(data_source: str) -> Rule:
    """Find the rule of a data source.

    Raises:
        UnknownDataSource: there is no rule.
    """
    for name, rule in RULES.items():
        if fnmatchcase(data_source, name):
            return rule
    raise UnknownDataSource(data_source)


def check_data_sources(prompts: Iterable[Prompt]) -> None:
    """Check that every prompt has a rule, and the ground truth that the rule needs.

    Raises:
        UnknownDataSource: a data source has no rule.
        ConfigError: a ground truth is missing or invalid.
    """
    rules: dict[str, Rule] = {}
    for prompt in prompts:
        source = prompt.data_source
        if source not in rules:
            try:
                rules[source] = rule_for(source)
            except UnknownDataSource:
                raise UnknownDataSource(source, where=prompt.place) from None
        _check_ground_truth(prompt, rules[source])


def _check_ground_truth(prompt: Prompt, rule: Rule) -> None:
    place = f"{prompt.place}, data_source {prompt.data_source!r}"
    if prompt.ground_truth is None:
        raise ConfigError(
            f"{place}: there is no ground truth for the built-in rule to compare with. Give the row "
            f"reward_model.ground_truth or ground_truth, name the column that holds it as data.ground_truth_key, or "
            f"{_CUSTOM_FUNCTION}."
        )
    try:
        rule.score("", prompt.ground_truth)
    except ValueError as error:
        raise ConfigError(
            f"{place}: {error}. Every response to it would score 0: fix or drop the row."
        ) from None
