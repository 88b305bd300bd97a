"""The sample that is sent to a reward server."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RewardSample:
    """One output of a model, and what a reward server needs to score it.

    `llm_output` is the prompt and the response, decoded with special tokens; `prompt` and `response` are the two parts,
    for servers that need them separately. `verification_info` is a JSON document as a string, or a mapping. `label` is
    the reference answer in the protocols of OpenRLHF and slime, by default `verification_info`. `id` is chosen by the
    caller and need not be unique.

    Only the texts are checked here. `verification_info` and `label` come from datasets: if one cannot be sent, that
    sample gets a `Failed` of kind `bad_request`.

    Raises:
        TypeError: `id`, `llm_output`, `prompt` or `response` is not a string.
    """

    id: str
    llm_output: str
    verification_info: str | Mapping[str, Any] = ""
    prompt: str | None = None
    response: str | None = None
    label: Any = None

    def __post_init__(self) -> None:
        for name in ("id", "llm_output"):
            if not isinstance(value := getattr(self, name), str):
                raise TypeError(f"RewardSample.{name} must be a string, not {type(value).__name__}")
        for name in ("prompt", "response"):
            if not isinstance(value := getattr(self, name), str | None):
                raise TypeError(f"RewardSample.{name} must be a string or None, not {type(value).__name__}")


def checked(sample: Any) -> RewardSample:
    """Return `sample` if it is a `RewardSample`.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(sample, RewardSample):
        raise TypeError(f"expected a RewardSample, not {type(sample).__name__}")
    return sample
